"""Example: a stored run on the first screen, so that a result is there before any model is."""

import gradio as gr

from ..components import INSTANT, Page, read_static, token_xray
from ..run_store import expected_time, read_example


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row(equal_height=True):
        begin = gr.Button("Unlearn on this machine", variant="primary", scale=1)
        page.expected_time.append(gr.Markdown(expected_time(), elem_id="expected"))
    begin.click(lambda: gr.Tabs(selected="unlearn"), None, page.tabs, **INSTANT)
    stored, names = read_example(), ("before", "after", "xray")
    items = {item["question"]: [item[name] for name in names] for item in stored["items"]}
    question, (before, after, traces) = next(iter(items.items()))
    gr.Markdown(read_static("numbers.md").format(**stored), elem_id="numbers")
    choice = gr.Radio(list(items), value=question, label="Question")
    with gr.Row():
        left = gr.Textbox(before, label="Before", lines=3, elem_id="example-before")
        right = gr.Textbox(after, label="After", lines=3, elem_id="example-after")
    gr.Markdown("The answer **before** unlearning, with the router's decision for each token:")
    views = [left, right, token_xray(traces, "example-xray")]
    choice.change(lambda question: items[question], choice, views, **INSTANT)
    gr.Markdown(read_static("stored.md").format(**stored))
