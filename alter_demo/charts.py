"""Pictures of routes for the page and the notebooks: word clouds, histogram, heat map, flows, sub-domain map.

Backgrounds are transparent; the ink is for a light page, which makes it lighter itself where it is dark (`page.css`).
"""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .tokens import EXPERT_NAMES, NO_EXPERT, TokenRecord

INK = "#5c5c5c"
# Okabe and Ito's palette: distinct for colour-blind readers. A, B_r, B_f1 ... B_f8, no expert
WAYS = ("A", *EXPERT_NAMES, NO_EXPERT)
COLOURS = dict(zip(WAYS, ("#b8860b", "#7f7f7f", "#3a8fd0", "#d55e00", "#009e73", "#b46a92", "#0072b2", "#8c6d31",
                          "#7b6fd0", "#a0522d", INK), strict=True))  # fmt: skip


def look(figure: go.Figure, height: int = 420) -> go.Figure:
    figure.update_layout(
        height=height,
        width=None,
        autosize=True,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 14, "color": INK},
        legend={"orientation": "h", "y": -0.25},
    )
    lines = {"gridcolor": "#88888844", "zerolinecolor": "#88888866", "linecolor": INK, "tickcolor": INK}
    figure.update_xaxes(**lines)
    return figure.update_yaxes(**lines)


def cloud(counts: dict[str, int], way: str = "A"):
    """A word cloud, the same bytes for the same counts; None when there is nothing to show."""
    from wordcloud import WordCloud

    counts = {" ".join(word.split()): n for word, n in counts.items() if n > 0 and word.strip()}
    if not counts:
        return None
    colour = COLOURS.get(way, INK)
    drawn = WordCloud(
        width=560, height=320, mode="RGBA", background_color=None, random_state=0, max_words=80, prefer_horizontal=1.0,
        color_func=lambda *args, **kwargs: colour,
    )  # fmt: skip
    return drawn.generate_from_frequencies(counts).to_image()


def word_table(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """(way, word, times), the most frequent words of each way first."""
    rows = [(way, word, n) for way in WAYS for word, n in sorted(counts.get(way, {}).items(), key=lambda x: -x[1])]
    return pd.DataFrame(rows, columns=["way", "word", "times"])


def histogram(entropies: list[float], threshold: float, q: float) -> go.Figure:
    """How many tokens have which S_q, with the threshold drawn in."""
    figure = go.Figure()
    top = max([*entropies, threshold, 1e-3])
    edges = np.linspace(0, top, 41)
    middles, values = (edges[:-1] + edges[1:]) / 2, np.asarray(entropies)
    for name, on, colour in (
        ("confident", values <= threshold, "#3a8fd0"),
        ("uncertain", values > threshold, "#b8860b"),
    ):
        counts, _ = np.histogram(values[on], edges)  # the bar that the threshold cuts gets both colours
        figure.add_bar(x=middles, y=counts, name=name, marker_color=colour, width=edges[1])
    figure.add_vline(x=threshold, line_width=3, line_color="#d55e00", annotation_text=f"threshold {threshold:.2f}")
    figure.update_layout(xaxis_title=f"S_q (q = {q:g})", yaxis_title="words", bargap=0.05, barmode="stack")
    return look(figure)


def heat_map(records: list[TokenRecord]) -> go.Figure:
    """Tokens by experts: the weight with which each acts."""
    shown = [r for r in records if not r.special]
    weights = np.array([r.weights for r in shown]).T
    labels = [f"{i} {html.escape(r.token.strip() or '·', quote=False)}" for i, r in enumerate(shown, 1)]
    figure = go.Figure(
        go.Heatmap(
            z=weights, x=labels, y=list(EXPERT_NAMES[: len(weights)]), colorscale="Cividis", zmin=0, zmax=1,
            colorbar={"title": "weight"},
        )
    )  # fmt: skip
    figure.update_xaxes(tickangle=-60, title="token")
    return look(figure, 360)


def flows(routing: dict) -> go.Figure:
    """Answer tokens of each sub-domain to the experts that they are sent to (Sankey)."""
    table = np.array(routing["flows"])
    domains = [f"sub-domain {d}" for d in range(1, len(table) + 1)]
    experts = ["B_r or none", *EXPERT_NAMES[1 : table.shape[1]]]
    links = [(d, e, int(n)) for (d, e), n in np.ndenumerate(table) if n]
    colours = [COLOURS[name] for name in EXPERT_NAMES[: table.shape[1]]]
    figure = go.Figure(
        go.Sankey(
            node={"label": domains + experts, "color": [INK] * len(domains) + colours, "pad": 18},
            link={"source": [d for d, _, _ in links], "target": [len(domains) + e for _, e, _ in links],
                  "value": [n for *_, n in links], "color": [f"{colours[e]}88" for _, e, _ in links]},
        )
    )  # fmt: skip
    return look(figure, 360)


def domain_map(routing: dict) -> go.Figure:
    """The forget samples by what the router sees, in two principal components."""
    points = pd.DataFrame(routing["map"]["points"])
    figure = go.Figure()
    symbols = ("circle", "diamond", "square", "cross", "x", "triangle-up", "star", "hexagon")
    for d, rows in points.groupby("domain"):
        figure.add_scatter(
            x=rows["x"], y=rows["y"], mode="markers", name=f"sub-domain {d} ({len(rows)})",
            marker={"color": COLOURS[f"B_f{d}"], "symbol": symbols[d - 1], "size": 9},
            text=[html.escape(t, quote=False) for t in rows["text"]], hoverinfo="text",
        )  # fmt: skip
    figure.update_layout(xaxis_title="first component", yaxis_title="second component")
    return look(figure)


def shares(routing: dict) -> go.Figure:
    """Which share of the answer tokens of each set goes to which expert."""
    figure = go.Figure()
    sets = list(routing["tokens"])
    table = np.array([routing["tokens"][s] for s in sets], float)
    share = table / table.sum(1, keepdims=True).clip(1)
    for e in range(table.shape[1]):
        figure.add_bar(
            x=share[:, e], y=sets, orientation="h", name="B_r or none" if e == 0 else EXPERT_NAMES[e],
            marker_color=COLOURS[EXPERT_NAMES[e]], text=[f"{n:.0f}" if n else "" for n in table[:, e]],
        )  # fmt: skip
    figure.update_layout(barmode="stack", xaxis_title="share of the answer tokens")
    return look(figure, 360).update_layout(legend_y=-0.4)
