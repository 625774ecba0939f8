"""What tabs share: the page's state, event options, result tables, the token X-ray."""

from importlib.resources import files

import gradio as gr

from .run_store import run_names
from .sessions import MAX_PROMPT

STATIC = files(__package__) / "static"
XRAY = files("alter_demo.inspection") / "static"
# jobs on a model share one queue; gradio_client may call them too
MODEL_JOB = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "undocumented"}
INSTANT = {"queue": False, "api_visibility": "private"}
TABLE = {"interactive": False, "wrap": True, "max_height": 420}
ANSWERS = TABLE | {"column_widths": ["12%", "28%", "30%", "30%"]}
DIFFERENCES = {"color_map": {"differs": "#b45309"}, "show_legend": False}


def read_static(name: str, folder=STATIC) -> str:
    return (folder / name).read_text(encoding="utf-8")


class Page:
    """Components that connect the tabs. Compare puts those with `render=False` into place."""

    def __init__(self):
        self.open_tab = gr.Textbox(visible=False)  # a State never reaches the browser
        self.tabs = gr.Tabs(render=False)
        options = {"label": "Question", "scale": 4, "max_length": MAX_PROMPT, "render": False}
        self.prompt = gr.Textbox("What is the name of Harry Potter's school?", **options)
        # custom values: the list grows meanwhile, and an unknown name gets our own error
        names = run_names()
        first, options = next(iter(names), None), {"allow_custom_value": True, "render": False}
        self.run = gr.Dropdown(names, value=first, label="Run (right)", **options)
        options = {"elem_id": "after", "render": False, **DIFFERENCES}
        self.right_answer = gr.HighlightedText(label="Right answer", **options)
        self.last_question = gr.State("")  # that `right_answer` answers
        self.of_run: list[gr.components.Component] = []  # cleared when another run is selected
        self.expected_time: list[gr.Markdown] = []  # updated when the page opens


def run_choices(selected: str) -> gr.Dropdown:
    """The choices of `Page.run`; without `selected`, the selection stays."""
    return gr.Dropdown(run_names(), **({"value": selected} if selected else {}))


def run_tables(suffix: str) -> tuple[gr.Dataframe, gr.Dataframe, gr.File]:
    """(metrics, answers, files) of a run, their element ids ending in `suffix`."""
    ids = [f"{name}{suffix}" for name in ("numbers-table", "answers", "saved")]
    headers = ["group", "probability", "ROUGE-L", "ROUGE-L to base model"]
    label = "Metrics, before → after"
    metrics = gr.Dataframe(headers=headers, label=label, elem_id=ids[0], interactive=False)
    headers, label = ["group", "question", "before", "after"], "Answers before and after"
    answers = gr.Dataframe(headers=headers, label=label, elem_id=ids[1], **ANSWERS)
    label = "Run as .zip, metrics as .json"
    return metrics, answers, gr.File(label=label, visible=False, elem_id=ids[2])


def metrics_help() -> None:
    with gr.Accordion("What the metrics mean", open=False):
        gr.Markdown(read_static("metrics.md"))


def token_xray(value: dict, elem_id: str) -> gr.HTML:
    """Token traces, drawn in the browser by `xray.js`; `value` is the dict of `xray.xray_data`.

    A function, since gradio writes a .pyi file into the package for a subclass of a component.
    """
    script = read_static("xray.js", XRAY)
    draw = "const show = () => drawXray(element.querySelector('.xray-root'), props.value || {});"
    script = f"{script}\n{draw}\nshow();\nwatch('value', show);"
    template = "<div class='xray-root'></div>"
    return gr.HTML(value, html_template=template, js_on_load=script, elem_id=elem_id)
