"""Charts of routes: word clouds, histogram, heat map, flows, sub-domain map.

Backgrounds are transparent. The ink is for a light page; the page makes it lighter in dark mode.
`routing` is `phase_one.routing` of a run's metrics.
"""

import html
from collections import Counter

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .traces import TokenTrace
from .words import EXPERT_NAMES, NO_EXPERT

INK, CLEAR = "#5c5c5c", "rgba(0,0,0,0)"
AXES = {"gridcolor": "#88888844", "zerolinecolor": "#88888866", "linecolor": INK, "tickcolor": INK}
WAYS = ("A", *EXPERT_NAMES, NO_EXPERT)  # where a word can go
# based on the palette of Okabe and Ito, which colour-blind readers can tell apart
PALETTE = ("#b8860b", "#7f7f7f", "#3a8fd0", "#d55e00", "#009e73", "#b46a92", "#0072b2", "#8c6d31",
           "#7b6fd0", "#a0522d", INK)  # fmt: skip
COLOURS = dict(zip(WAYS, PALETTE, strict=True))
SYMBOLS = ("circle", "diamond", "square", "cross", "x", "triangle-up", "star", "hexagon")
UNROUTED = "B_r or none"


def cloud(counts: dict[str, int], way: str = "A"):
    """A word cloud as an image in the colour of `way`; None without words."""
    from wordcloud import WordCloud

    counts = {" ".join(word.split()): n for word, n in counts.items() if n > 0 and word.strip()}
    if not counts:
        return None
    colour = COLOURS.get(way, INK)
    image = {"width": 560, "height": 320, "mode": "RGBA", "background_color": None}
    words = {"max_words": 80, "prefer_horizontal": 1.0, "random_state": 0}  # reproducible bytes
    figure = WordCloud(**image, **words, color_func=lambda *args, **kwargs: colour)
    return figure.generate_from_frequencies(counts).to_image()


def word_table(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """The words of each route or expert, the most frequent first."""
    rows = [(way, *pair) for way in WAYS for pair in Counter(counts.get(way, {})).most_common()]
    return pd.DataFrame(rows, columns=["route", "word", "count"])


def histogram(entropies: list[float], threshold: float, q: float) -> go.Figure:
    """The distribution of S_q over words, with the threshold."""
    edges = np.linspace(0, max([*entropies, threshold, 1e-3]), 41)
    centres, values = (edges[:-1] + edges[1:]) / 2, np.asarray(entropies)
    figure, high = go.Figure(), values > threshold
    for name, way, selected in (("confident", "B_f1", ~high), ("uncertain", "A", high)):
        counts, _ = np.histogram(values[selected], edges)  # the threshold may cut a bar in two
        figure.add_bar(x=centres, y=counts, name=name, marker_color=COLOURS[way], width=edges[1])
    line = {"line_width": 3, "line_color": COLOURS["B_f2"]}
    figure.add_vline(x=threshold, annotation_text=f"threshold {threshold:.2f}", **line)
    figure.update_layout(xaxis_title=f"S_q (q = {q:g})", yaxis_title="words")
    return style(figure).update_layout(bargap=0.05, barmode="stack")


def heat_map(traces: list[TokenTrace]) -> go.Figure:
    """The weight of each expert on each token."""
    shown = [trace for trace in traces if not trace.special]
    tokens = [f"{i} {escape(trace.token.strip() or '·')}" for i, trace in enumerate(shown, 1)]
    weights = np.array([trace.weights for trace in shown]).T
    names = list(EXPERT_NAMES[: len(weights)])
    scale = {"zmin": 0, "zmax": 1, "colorscale": "Cividis", "colorbar": {"title": "weight"}}
    figure = go.Figure(go.Heatmap(z=weights, x=tokens, y=names, **scale))
    return style(figure.update_xaxes(tickangle=-60, title="token"), 360)


def flows(routing: dict) -> go.Figure:
    """The number of answer tokens that go from each sub-domain to each expert (Sankey)."""
    table = np.array(routing["flows"])  # (sub-domains, experts)
    n_domains, n_experts = table.shape
    domain, expert = table.nonzero()
    colours = [COLOURS[name] for name in EXPERT_NAMES[:n_experts]]
    labels = [f"sub-domain {d}" for d in range(1, n_domains + 1)]
    labels += [UNROUTED, *EXPERT_NAMES[1:n_experts]]
    link = {
        "source": domain.tolist(),
        "target": (n_domains + expert).tolist(),
        "value": table[domain, expert].tolist(),
        "color": [f"{colours[e]}88" for e in expert],
    }
    node = {"label": labels, "color": [INK] * n_domains + colours, "pad": 18}
    return style(go.Figure(go.Sankey(node=node, link=link)), 360)


def domain_map(routing: dict) -> go.Figure:
    """The forget samples as the router sees them, in two principal components."""
    figure = go.Figure()
    for d, rows in pd.DataFrame(routing["map"]["points"]).groupby("domain"):
        marker = {"color": COLOURS[f"B_f{d}"], "symbol": SYMBOLS[d - 1], "size": 9}
        name, text = f"sub-domain {d} ({len(rows)})", [escape(text) for text in rows["text"]]
        figure.add_scatter(x=rows["x"], y=rows["y"], name=name, marker=marker, text=text)
    figure.update_traces(mode="markers", hoverinfo="text")
    figure.update_layout(xaxis_title="first component", yaxis_title="second component")
    return style(figure)


def shares(routing: dict) -> go.Figure:
    """The share of answer tokens that goes to each expert, for each set."""
    table = np.array(list(routing["tokens"].values()), float)  # (sets, experts)
    share = table / table.sum(1, keepdims=True).clip(1)
    figure = go.Figure()
    for e, expert in enumerate(EXPERT_NAMES[: table.shape[1]]):
        name, text = expert if e else UNROUTED, [f"{n:.0f}" if n else "" for n in table[:, e]]
        bar = {"name": name, "text": text, "marker_color": COLOURS[expert]}
        figure.add_bar(x=share[:, e], y=list(routing["tokens"]), orientation="h", **bar)
    figure.update_layout(barmode="stack", xaxis_title="share of the answer tokens")
    return style(figure, 360).update_layout(legend_y=-0.4)


def style(figure: go.Figure, height: int = 420) -> go.Figure:
    """Give a figure the common layout."""
    figure.update_layout(height=height, width=None, autosize=True, font={"size": 14, "color": INK})
    figure.update_layout(paper_bgcolor=CLEAR, plot_bgcolor=CLEAR)
    figure.update_layout(margin={"l": 60, "r": 20, "t": 30, "b": 50})
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure.update_xaxes(**AXES).update_yaxes(**AXES)


def escape(text: str) -> str:
    """Text for plotly's labels, which accept some HTML."""
    return html.escape(text, quote=False)
