"""Token X-ray: entropy, route and experts of each token of a text."""

import time

import gradio as gr

from ..components import INSTANT, MODEL_JOB, Page, token_xray
from ..run_store import download_folder, get_run
from ..sessions import MAX_PROMPT, MAX_TEXT, model_job

TEXT = "Harry Potter took the Hogwarts Express. However, Paris is the capital of France."


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        text = gr.Textbox(TEXT, label="Text", lines=2, scale=4, max_length=MAX_TEXT)
        label = "Question that the text answers (optional)"
        question = gr.Textbox("", label=label, scale=2, max_length=MAX_PROMPT)
    with gr.Row():
        show = gr.Button("Show tokens", variant="primary")
        copy = gr.Button("Use the right answer from Compare")
        save = gr.Button("Save as HTML")
    status = gr.Markdown("", elem_id="xray-status")
    tokens = token_xray({}, "tokens")
    file = gr.File(label="Saved X-ray", interactive=False, visible=False)
    inputs = {"run": page.run, "text": text, "question": question}
    show.click(xray_job, inputs_kwargs=inputs, outputs=[tokens, status], **MODEL_JOB)
    copy.click(copy_answer, [page.right_answer, page.last_question], [text, question], **INSTANT)
    save.click(save_xray, tokens, [file, status], **INSTANT)
    page.of_run += [tokens, status]


@model_job(outputs=2)
def xray_job(run, text, question):
    """Yields (X-ray data, status)."""
    from ...inspection.xray import xray_data

    run = get_run(run)
    started = time.monotonic()
    traces = run.trace_tokens(text[:MAX_TEXT], question.strip()[:MAX_PROMPT] or None)
    data = xray_data(traces, run.router.config if run.has_router else None)
    yield data, f"{len(traces)} tokens in {time.monotonic() - started:.1f} s."


def copy_answer(pieces: list[dict] | None, question: str) -> tuple[str, str]:
    return "".join(piece["token"] for piece in pieces or []).strip(), question


def save_xray(data: dict | None):
    """(file, status)"""
    from ...inspection.xray import xray_html

    if not data or not data.get("tokens"):
        return gr.skip(), "There is no X-ray to save yet. Select Show tokens first."
    path = download_folder() / "token-xray.html"
    path.write_text(xray_html(data), encoding="utf-8")
    return gr.File(str(path), visible=True), "Saved as one HTML file that works offline."
