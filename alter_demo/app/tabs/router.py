"""Router: how the sub-domains of a run map to its experts."""

import gradio as gr

from ...errors import UserError
from ..components import INSTANT, MODEL_JOB, TABLE, Page
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
        options = {"column_widths": ["25%", "75%"], "elem_id": "nearest", **TABLE}
        headers = ["sub-domain", "questions nearest to its centre"]
        nearest = gr.Dataframe(headers=headers, label="Nearest questions", **options)
    with gr.Row():
        text = gr.Textbox(TEXT, label="Text", scale=4, max_length=MAX_TEXT)
        show = gr.Button("Show expert weights", variant="primary")
    weights = gr.Plot(label="Expert weights by token")
    outputs, inputs = [flow, domains, share, nearest, status], {"run": page.run, "text": text}
    gr.on([tab.select, page.run.change], show_routing, page.run, outputs, **INSTANT)
    show.click(weights_job, inputs_kwargs=inputs, outputs=[weights, status], **MODEL_JOB)
    page.of_run.append(weights)


def show_routing(name: str | None):
    """(Sankey diagram, map, shares, nearest questions, status), from metrics.json alone."""
    from ...inspection.charts import domain_map, flows, shares

    try:
        routing = read_metrics(name).get("phase_one", {}).get("routing")
        if not routing:
            raise UserError("This run has no routing data: its method has no router.")
        questions = routing["map"]["nearest"].items()
        nearest = [[domain, question] for domain, own in questions for question in own]
        plots = flows(routing), domain_map(routing), shares(routing)
        return *plots, nearest, "Read from the metrics.json of this run."
    except Exception as error:
        return None, None, None, [], error_sentence(error)


@model_job(outputs=2)
def weights_job(run, text):
    """Yields (heat map of tokens by experts, status)."""
    from ...inspection.charts import heat_map

    run = get_run(run)
    if not run.has_router:
        raise UserError("The method of this run has no router, so there are no experts to show.")
    yield heat_map(run.trace_tokens(text[:MAX_TEXT])), "Heat map drawn."
