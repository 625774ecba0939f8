"""Example: a stored run on the first screen, so that a result is there before any model is."""

import gradio as gr

from ..components import INSTANT, Page, token_xray
from ..run_store import expected_time, read_example

NO_EXAMPLE = (
    "No stored example found. `python -m alter_demo example runs/NAME` stores a run as one."
)


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row(equal_height=True):
        begin = gr.Button("Unlearn on this machine", variant="primary", scale=1)
        page.expected_time.append(gr.Markdown(expected_time(), elem_id="expected"))
    begin.click(lambda: gr.Tabs(selected="unlearn"), None, page.tabs, **INSTANT)
    if stored := read_example():
        show_example(stored)
    else:
        gr.Markdown(NO_EXAMPLE)


def show_example(stored: dict) -> None:
    numbers, items = stored["numbers"], {item["question"]: item for item in stored["items"]}
    summary = (
        f"### Harry Potter: answer probability down by {numbers['forgot']:.1%} · "
        f"general prompts: {numbers['kept']:.1%} kept · "
        f"neighbouring topics: {numbers['neighbours']:.1%} kept"
    )
    gr.Markdown(summary, elem_id="numbers")
    question, first = next(iter(items.items()))
    choice = gr.Radio(list(items), value=question, label="Question")
    with gr.Row():
        before = gr.Textbox(first["before"], label="Before", lines=3, elem_id="example-before")
        after = gr.Textbox(first["after"], label="After", lines=3, elem_id="example-after")
    gr.Markdown("The answer **before** unlearning, with the router's decision for each token:")
    views = [before, after, token_xray(first["xray"], "example-xray")]
    names = ("before", "after", "xray")
    choice.change(lambda q: [items[q][name] for name in names], choice, views, **INSTANT)
    seconds, similarity = stored["seconds"], stored["after"]["general"]["rouge_l_to_base"]
    gr.Markdown(
        f"This result is stored, not computed live: {stored['model']} on {stored['forget_set']}, "
        f"{stored['steps']} steps in {seconds['unlearn']:.0f} s plus {seconds['evaluate']:.0f} s "
        f"to measure, on {stored['hardware']}, {stored['date']}. The percentages compare the "
        "probability of the correct answers before and after unlearning, on questions that were "
        "not used for training; the five questions above are among them. Answers to general "
        f"prompts match the base model's with ROUGE-L {similarity:.2f} (1 means identical)."
    )
