"""Evidence: tables and figures of the stored results."""

import gradio as gr

from ...errors import UserError
from ...files import RESULTS
from ..components import INSTANT, Page, metrics_help
from ..sessions import error_sentence

FIRST_RESULTS = "imaginary-authors-gpu"  # all methods, three seeds


def build(page: Page, tab: gr.Tab) -> None:
    status = gr.Markdown("")
    file = gr.Dropdown([], label="Results file")
    table = gr.Dataframe(interactive=False, wrap=True, label="Results")
    metrics_help()
    with gr.Row():  # a visible label would cover the titles of the figures
        first = gr.Plot(label="Trade-off, rounds or relearning", show_label=False)
        second = gr.Plot(label="Cost", show_label=False)
    # no progress spinner: it would make the empty status line a region that scrolls
    options = {"show_progress": "hidden", **INSTANT}
    view = show_results, file, [table, first, second, status]
    tab.select(list_results, file, file, **options).then(*view, **options)
    file.input(*view, **options)


def results_names() -> list[str]:
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def list_results(selected: str | None) -> gr.Dropdown:
    names = results_names()
    value = next((name for name in (selected, FIRST_RESULTS, *names) if name in names), None)
    return gr.Dropdown(names, value=value)


def show_results(name: str | None):
    """(table, figure, figure, status) of one results file."""
    from ...experiments import report
    from ...experiments.results import read_results
    from ...inspection import charts

    nothing = gr.Dataframe(None), *show_figures([])
    if name not in results_names():
        return *nothing, "No results yet. `python -m alter_demo tofu` creates some."
    try:
        results = read_results(RESULTS / f"{name}.json")
        table = report.result_type(results).frame(results)
        figures = [draw(results) for draw in report.figures_of(results).values()]
        # an image (word clouds) has a tab of its own
        figures = [charts.style(figure, 560) for figure in figures if not hasattr(figure, "save")]
        text = [report.result_type(results).description]
        text += [f"`{command}`" for command in report.commands_of(results)]
        return show_table(table), *show_figures(figures), "\n\n".join(filter(None, text))
    except (UserError, IndexError, KeyError) as error:
        return *nothing, error_sentence(error)


def show_table(table) -> gr.Dataframe:
    """A data frame with three significant digits: a p-value of 1e-11 is not 0."""

    def cell(value) -> str:
        if not isinstance(value, float):
            return str(value)
        return "" if value != value else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    label = "Medians over the seeds" if "seeds" in table else "Results"
    widths = ["170px"] + ["120px"] * (len(table.columns) - 1)
    return gr.Dataframe(table.map(cell), column_widths=widths, label=label)


def show_figures(figures: list) -> list[gr.Plot]:
    """Two plots, hidden where there are fewer figures."""
    return [gr.Plot(f, visible=f is not None) for f in [*figures, None, None][:2]]
