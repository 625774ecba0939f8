"""Drawings from results files: plotly for the page, the same as images for the README."""

from __future__ import annotations

import itertools
import re

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .charts import COLOURS, WAYS, cloud
from .errors import UserError
from .results import REFERENCES
from .tables import FALLING, OURS, attack_runs, forgetting, medians, named, of_shared_seeds, pareto, rounds

COST_BASES = ("asym_lora", "grad_diff")  # what a method's seconds and memory are set beside
SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "cross", "pentagon", "hexagon", "circle-open",
           "square-open", "triangle-up-open", "triangle-down-open", "pentagon-open", "hexagon-open")  # fmt: skip
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
BLUE, GREY, ORANGE = "#0b5fa5", "#6b7280", "#c2570c"


def tradeoff(results: dict) -> go.Figure:
    """Forget quality against model utility for all methods, the retain-only model as a star (ALTER, Fig. 4).

    Our rows and the two references carry their names; the rivals, which may lie close together, have a symbol each.
    """
    table = medians(results)
    y = forgetting(table)
    shown = "p" if y == "forget_quality" else y
    figure = go.Figure()
    front = table.loc[pareto(table)]
    figure.add_scatter(
        x=front["model_utility"], y=front[y], mode="lines", line={"dash": "dot", "color": GREY},
        name="Pareto front", hoverinfo="skip",
    )  # fmt: skip
    symbols = itertools.cycle(SYMBOLS)
    for method, row in table.iterrows():
        ours, reference = method in OURS, method in REFERENCES
        named = ours or reference
        symbol = {"retain": "star", "target": "x"}.get(method) or ("diamond" if ours else next(symbols))
        figure.add_scatter(
            x=[row["model_utility"]], y=[row[y]], mode="markers+text", text=[method if named else ""],
            textposition="top center", name=method, showlegend=not named, cliponaxis=False,
            hovertemplate=f"{method}: utility %{{x:.3f}}, {shown} %{{y:.2g}}<extra></extra>",
            marker={"symbol": symbol, "size": 16 if named else 11,
                    "color": BLUE if ours else ORANGE if reference else GREY},
        )  # fmt: skip
    figure.update_layout(xaxis_title="model utility (higher is better)")
    values = table["model_utility"].dropna()
    margin = 0.2 * max(values.max() - values.min(), 0.05) if len(values) else 0
    if len(values):
        figure.update_xaxes(range=[values.min() - margin, values.max() + margin])  # room for the names
    if y in FALLING:
        figure.update_yaxes(title=FALLING[y], autorange="reversed")
    else:
        figure.update_yaxes(title="forget quality, p of the KS test", type="log", exponentformat="e")
    return plain_look(figure)


def cost(results: dict) -> go.Figure:
    """Seconds and peak memory of each method, relative to AsymLoRA and to full fine-tuning (grad_diff)."""
    table = medians(results).drop(index=list(REFERENCES), errors="ignore")
    figure = go.Figure()
    for base, colour in zip(COST_BASES, (BLUE, GREY), strict=True):
        for column, pattern in (("seconds", ""), ("MB", "/")):
            if base in table.index:
                figure.add_bar(
                    x=table.index, y=table[column] / table.loc[base, column], marker_color=colour,
                    marker_pattern_shape=pattern, name=f"{column} over {base}'s",
                )  # fmt: skip
    figure.add_hline(y=1, line_dash="dot")
    figure.update_layout(barmode="group", yaxis_title="ratio")
    return plain_look(figure)


def sequential(results: dict) -> go.Figure:
    """Over the rounds while the forget set grows: model utility (ALTER, Fig. 5), and what is left of the whole set."""
    table = rounds(results).unstack("method")
    columns = [c for c in ("model utility", "forget probability") if c in table]
    figure = make_subplots(1, len(columns), subplot_titles=columns)
    for col, column in enumerate(columns, 1):
        figure.add_traces(lines(table[column]).data, rows=1, cols=col)
    for trace in figure.data[len(table[columns[0]].columns) :]:
        trace.showlegend = False
    figure.update_xaxes(title="round", dtick=1).update_yaxes(range=[0, 1])
    return plain_look(figure).update_layout(showlegend=True, margin_t=60)


def relearning(results: dict, source: str = "forget") -> go.Figure:
    """ROUGE-L on the forget questions over the steps of relearning, a line a method, medians over the seeds."""
    key = re.compile(rf"relearn_{source}_(\d+)_ROUGE")
    rows = [
        {"method": named(r), "step": int(m[1]), "value": v}
        for r in of_shared_seeds(attack_runs(results)) for k, v in r["metrics"].items() if (m := key.fullmatch(k))
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no relearning: python -m alter_demo attack makes some.")
    table = pd.DataFrame(rows).groupby(["step", "method"])["value"].median().unstack()
    titles = {"xaxis_title": "steps of relearning", "yaxis_title": "ROUGE-L on what was forgotten"}
    return lines(table).update_layout(titles)


def lines(table: pd.DataFrame) -> go.Figure:
    """A line for each column of `table`, ours bold, references grey; symbols tell the others apart without colour."""
    figure, symbols, colours = go.Figure(), itertools.cycle(SYMBOLS), itertools.cycle(PALETTE)
    for method in table:
        ours, reference = method in OURS, method in REFERENCES
        figure.add_scatter(
            x=table.index, y=table[method], mode="lines+markers",
            name="retain (never taught)" if method == "retain" else method,
            marker={"symbol": "diamond" if ours else "star" if reference else next(symbols), "size": 10},
            line={"width": 4 if ours else 2, "dash": "solid" if ours else "dash" if reference else "dot",
                  "color": GREY if reference else next(colours)},
        )  # fmt: skip
    return plain_look(figure)


def heterogeneity(results: dict) -> go.Figure:
    """What A and B of LoRAs of several domains learned, from the same start, in two dimensions (ALTER, Fig. 1)."""
    points = pd.DataFrame(results["runs"][-1]["points"])
    titles = ("what A learned, a point a direction", "what B learned, a point a direction")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    symbols = dict(zip(points["domain"].unique(), itertools.cycle(SYMBOLS), strict=False))
    for (matrix, domain), own in points.groupby(["matrix", "domain"], sort=False):
        figure.add_scatter(
            x=own["x"], y=own["y"], mode="markers", name=domain, showlegend=matrix == "A", row=1,
            col=1 + (matrix == "B"), marker={"symbol": symbols[domain], "size": 11,
                                             "color": PALETTE[list(symbols).index(domain) % len(PALETTE)]},
        )  # fmt: skip
    figure.update_xaxes(title="first component").update_yaxes(title="second component")
    return plain_look(figure).update_layout(margin_t=60)


def word_clouds(results: dict):
    """The clouds of a run's words side by side, A first (ALTER, Fig. 2): an image with a white background."""
    from PIL import Image, ImageDraw

    counts = results["runs"][-1]["words"]["forget"]
    drawn = [(way, image) for way in WAYS if (image := cloud(counts.get(way, {}), way)) is not None]
    width, height = drawn[0][1].size
    columns = min(3, len(drawn))
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * (height + 40)), "white")
    for k, (way, image) in enumerate(drawn):
        x, y = k % columns * width, k // columns * (height + 40)
        ImageDraw.Draw(sheet).text((x + 16, y + 8), way, fill=COLOURS[way], font_size=24)
        sheet.paste(image, (x, y + 40), image)
    return sheet


def plain_look(figure: go.Figure) -> go.Figure:
    return figure.update_layout(
        template="simple_white", width=900, height=560, margin={"l": 70, "r": 30, "t": 30, "b": 60}, font={"size": 14}
    )
