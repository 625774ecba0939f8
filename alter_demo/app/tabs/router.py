"""Router: how the sub-domains of a run map to its experts."""

import gradio as gr

from ...errors import UserError
from ..components import INSTANT, TABLE, Page
from ..run_store import get_run, read_metrics
from ..sessions import error_sentence, model_job

TEXT = "Harry Potter goes to school at Hogwarts. However, Paris is the capital of France."
MAX_TEXT = 2000  # characters: more tokens are not legible


def build(page: Page, tab: gr.Tab) -> None:
    status = gr.Markdown("", elem_id="router-status")
    with gr.Row():
        flow = gr.Plot(label="Answer tokens, from sub-domain to expert")
        share = gr.Plot(label="Answer tokens of each set, by expert")
    with gr.Row():
        domains = gr.Plot(label="Sub-domains, in the router's features")
        headers, options = ["sub-domain", "questions nearest to its centre"], {"elem_id": "nearest"}
        options |= {"label": "Nearest questions", "column_widths": ["25%", "75%"]}
        nearest = gr.Dataframe(headers=headers, **options, **TABLE)
    with gr.Row():
        text = gr.Textbox(TEXT, label="Text", scale=4, max_length=MAX_TEXT)
        show = gr.Button("Show expert weights", variant="primary")
    weights = gr.Plot(label="Expert weights by token")
    outputs = [flow, domains, share, nearest, status]
    gr.on([tab.select, page.run.change], show_routing, page.run, outputs, **INSTANT)
    model_job(show.click, weights_job, {"run": page.run, "text": text}, [weights, status])
    page.of_run.append(weights)


def show_routing(name: str | None):
    """(Sankey diagram, map, shares, nearest questions, status), from metrics.json alone."""
    from ...inspection import charts

    try:
        routing = read_metrics(name).get("phase_one", {}).get("routing")
        if not routing:
            raise UserError("This run has no routing data: its method has no router.")
        questions = routing["map"]["nearest"].items()
        nearest = [[domain, question] for domain, own in questions for question in own]
        plots = charts.flows(routing), charts.domain_map(routing), charts.shares(routing)
        return *plots, nearest, "Read from the metrics.json of this run."
    except Exception as error:
        return None, None, None, [], error_sentence(error)


def weights_job(run, text):
    """Yields (heat map of tokens by experts, status)."""
    from ...inspection.charts import heat_map

    run = get_run(run)
    if not run.has_router:
        raise UserError("The method of this run has no router, so there are no experts to show.")
    yield heat_map(run.trace_tokens(text[:MAX_TEXT])), "Heat map drawn."
