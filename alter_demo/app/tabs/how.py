"""How it works and its limits: a drawing and a text."""

import gradio as gr

from ..components import Page, read_static


def build(page: Page, tab: gr.Tab) -> None:
    drawing = read_static("architecture.svg")
    gr.HTML(f'<div class="wide" tabindex="0">{drawing}</div>', elem_id="architecture")
    latex = [{"left": "$", "right": "$", "display": False}]
    gr.Markdown(read_static("method.md"), latex_delimiters=latex)
