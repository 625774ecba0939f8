"""Figures from results files: plotly for the page and, as images, for the documents."""

import itertools

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from sklearn.metrics import roc_auc_score, roc_curve

from ..errors import UserError
from ..inspection.charts import COLOURS, WAYS, cloud
from . import tables
from .results import REFERENCES
from .tables import LOWER_IS_BETTER, OURS

SIZE = {"width": 900, "height": 560}
FILLED = ("circle", "square", "triangle-up", "triangle-down", "cross", "pentagon", "hexagon")
SYMBOLS = (*FILLED, *(f"{symbol}-open" for symbol in FILLED if symbol != "cross"))
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
BLUE, GREY, ORANGE = "#0b5fa5", "#6b7280", "#c2570c"
COST_BASES = {"asym_lora": BLUE, "grad_diff": GREY}  # the methods that costs are relative to


def tradeoff(results: dict) -> go.Figure:
    """Forgetting against model utility, one point per method (ALTER, Fig. 4).

    The baselines may lie close together, so they have symbols in place of names.
    """
    table, x = tables.medians(results), "model_utility"
    y, front = tables.forgetting(table), table.loc[tables.pareto(table)]
    line = {"mode": "lines", "line": {"dash": "dot", "color": GREY}, "hoverinfo": "skip"}
    figure = go.Figure().add_scatter(x=front[x], y=front[y], name="Pareto front", **line)
    text = {"mode": "markers+text", "textposition": "top center", "cliponaxis": False}
    hover = f"utility %{{x:.3f}}, {'p' if y == 'forget_quality' else y} %{{y:.2g}}<extra></extra>"
    own, others = {"retain": "star", "target": "x"}, itertools.cycle(SYMBOLS)
    own |= dict.fromkeys(OURS, "diamond")
    for method, row in table.iterrows():
        named = method in (*OURS, *REFERENCES)
        colour = BLUE if method in OURS else ORANGE if named else GREY
        marker = {"symbol": own.get(method) or next(others), "color": colour}
        marker["size"] = 16 if named else 11
        text |= {"text": [method if named else ""], "hovertemplate": f"{method}: {hover}"}
        point = {"x": [row[x]], "y": [row[y]], "name": method, "marker": marker}
        figure.add_scatter(**point, **text, showlegend=not named)
    figure.update_xaxes(title="model utility (higher is better)")
    values = table[x].dropna()
    if len(values):
        margin = 0.2 * max(values.max() - values.min(), 0.05)  # room for the names
        figure.update_xaxes(range=[values.min() - margin, values.max() + margin])
    if y in LOWER_IS_BETTER:
        figure.update_yaxes(title=LOWER_IS_BETTER[y], autorange="reversed")
    else:
        title = "forget quality, p of the KS test"
        figure.update_yaxes(title=title, type="log", exponentformat="e")
    return styled(figure)


def cost(results: dict) -> go.Figure:
    """Seconds and peak memory of each method relative to AsymLoRA and to full fine-tuning."""
    table = tables.medians(results).drop(list(REFERENCES), errors="ignore")
    figure = go.Figure().add_hline(y=1, line_dash="dot")
    for base in [method for method in COST_BASES if method in table.index]:
        for column, pattern in (("seconds", ""), ("peak MB", "/")):
            bars = {"marker_color": COST_BASES[base], "marker_pattern_shape": pattern}
            ratio = table[column] / table.loc[base, column]
            figure.add_bar(x=table.index, y=ratio, name=f"{column} / {base}", **bars)
    return styled(figure).update_layout(barmode="group", yaxis_title="ratio")


def sequential(results: dict) -> go.Figure:
    """Model utility (ALTER, Fig. 5) and forget probability of the whole set over the rounds."""
    table = tables.rounds(results).unstack("method")
    columns = [c for c in ("model utility", "forget probability") if c in table]
    figure = make_subplots(1, len(columns), subplot_titles=columns)
    for col, column in enumerate(columns, 1):
        figure.add_traces(lines(table[column]).data, rows=1, cols=col)
        figure.update_traces(showlegend=col == 1, row=1, col=col)
    figure.update_xaxes(title="round", dtick=1).update_yaxes(range=[0, 1])
    return styled(figure).update_layout(showlegend=True, margin_t=60)


def relearning(results: dict) -> go.Figure:
    """ROUGE-L on the forget questions over the steps of relearning, medians over the seeds."""
    runs = tables.with_shared_seeds(tables.shown_runs(results))
    table = tables.runs_frame(runs).set_index("method")
    table = table.filter(regex=r"^relearn_forget_\d+_ROUGE$")
    if table.empty:
        raise UserError("The results file holds no relearning. Run `python -m alter_demo attack`.")
    table.columns = table.columns.str.extract(r"_(\d+)_", expand=False).astype(int)
    table = table.groupby("method").median().dropna(how="all").T.sort_index()
    titles = {"xaxis_title": "steps of relearning", "yaxis_title": "ROUGE-L on the forget set"}
    return lines(table).update_layout(titles)


def lines(table: pd.DataFrame) -> go.Figure:
    """A line per column: ours bold, references grey; symbols tell the others apart."""
    figure, symbols, colours = go.Figure(), itertools.cycle(SYMBOLS), itertools.cycle(PALETTE)
    for method in table:
        if method in REFERENCES:
            symbol, line = "star", {"width": 2, "dash": "dash", "color": GREY}
        elif method in OURS:
            symbol, line = "diamond", {"width": 4, "dash": "solid", "color": next(colours)}
        else:
            symbol, line = next(symbols), {"width": 2, "dash": "dot", "color": next(colours)}
        name = "retain (never taught)" if method == "retain" else method
        marker = {"symbol": symbol, "size": 10}
        style = {"mode": "lines+markers", "marker": marker, "line": line}
        figure.add_scatter(x=table.index, y=table[method], name=name, **style)
    return styled(figure)


def heterogeneity(results: dict) -> go.Figure:
    """What A and B of LoRAs of several domains learned from one start, in 2D (ALTER, Fig. 1)."""
    points = pd.DataFrame(results["runs"][-1]["points"])
    titles = [f"what {matrix} learned, one point per direction" for matrix in "AB"]
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    domains = list(points["domain"].unique())
    for (matrix, domain), own in points.groupby(["matrix", "domain"], sort=False):
        k = domains.index(domain)
        colour, symbol = PALETTE[k % len(PALETTE)], SYMBOLS[k % len(SYMBOLS)]
        marker = {"symbol": symbol, "size": 11, "color": colour}
        style = {"mode": "markers", "marker": marker, "showlegend": matrix == "A"}
        place = {"row": 1, "col": "AB".index(matrix) + 1}
        figure.add_scatter(x=own["x"], y=own["y"], name=domain, **style, **place)
    figure.update_xaxes(title="first component").update_yaxes(title="second component")
    return styled(figure).update_layout(margin_t=60)


def word_clouds(results: dict):
    """The word clouds of a run's routes side by side, A first (ALTER, Fig. 2), as an image."""
    from PIL import Image, ImageDraw

    counts = results["runs"][-1]["words"]["forget"]
    clouds = [(way, cloud(counts.get(way, {}), way)) for way in WAYS]
    clouds = [(way, image) for way, image in clouds if image is not None]
    width, height = clouds[0][1].size
    columns, height = min(3, len(clouds)), height + 40  # room for a title
    sheet = Image.new("RGB", (columns * width, -(-len(clouds) // columns) * height), "white")
    for k, (way, image) in enumerate(clouds):
        x, y = k % columns * width, k // columns * height
        ImageDraw.Draw(sheet).text((x + 16, y + 8), way, fill=COLOURS[way], font_size=24)
        sheet.paste(image, (x, y + 40), image)
    return sheet


def gate_roc(scores) -> go.Figure:
    """Share of forget prompts that open the gate, against the share of prompts to keep that do.

    Args:
        scores: of `score_prompts`; prompts without `expected` do not count.
    Raises:
        UserError: there are only forget prompts, or only prompts to keep.
    """
    known = [s for s in scores if s["expected"]]
    expected, values = [s["expected"] == "open" for s in known], [s["score"] for s in known]
    if len(set(expected)) < 2:
        raise UserError(
            "A ROC curve needs prompts that should open the gate and prompts that should not. Add "
            'prompts with "expected" to the file of --prompts.'
        )
    shut, opened, _ = roc_curve(expected, values)
    name = f"AUC {roc_auc_score(expected, values):.4f}"
    figure = go.Figure().add_scatter(x=shut, y=opened, name=name, line_color=BLUE)
    figure.update_xaxes(title="prompts to keep that open the gate", range=[0, 1])
    figure.update_yaxes(title="forget prompts that open it", range=[0, 1.02])
    return styled(figure.update_layout(showlegend=True))


def styled(figure: go.Figure) -> go.Figure:
    margin = {"l": 70, "r": 30, "t": 30, "b": 60}
    return figure.update_layout(template="simple_white", **SIZE, margin=margin, font={"size": 14})
