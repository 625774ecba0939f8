"""Unlearn: choose a model, a forget set and options, watch the training, see the result."""

import threading
import time

import gradio as gr
import pandas as pd

from ...callbacks import Callback
from ...config import PARTS, UnlearnConfig, flat_config, part_of
from ...data.forget_sets import FORGET_SETS, load_forget_set
from ...errors import Interrupted
from .. import run_store, sessions
from ..components import (
    ANSWERS,
    INSTANT,
    MODEL_JOB,
    Page,
    metrics_help,
    read_static,
    run_choices,
    run_tables,
)
from ..sessions import error_sentence, escape_markdown

KEEP_OPEN = "Keep this tab open: a reload stops the training and saves the run without metrics."
METHODS = "alter: as published. alter_selective: leaves other topics unchanged. Others: baselines."
PROBE = "probe, relative to start"
TERMS = {key: key for key in ("forget", "retain", "refusal", "structure")} | {"probe_share": PROBE}
# option of the config -> (value, maximum on the page); a value of 0 is the default
OPTIONS = {"max_steps": (0, 400), "limit": (24, 100), "r": (8, 32), "n_experts": (0, 8)}


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=2):
            inputs = build_inputs()
        with gr.Column(scale=3):  # above the fold on a projector
            with gr.Row():
                start = gr.Button("Unlearn", variant="primary")
                stop = gr.Button("Stop and keep")
            status = gr.Markdown(run_store.expected_time(), elem_id="status")
            gr.Markdown(KEEP_OPEN)
            axes = {"x": "step", "y": "value", "color": "term", "height": 280}
            loss = gr.LinePlot(None, title="Loss terms, and the probe that ends training", **axes)
            headers, label = ["set", "question", "at the start", "now"], "Live answers"
            live = gr.Dataframe(headers=headers, label=label, elem_id="live", **ANSWERS)
    tables = run_tables("")
    metrics_help()
    outputs = [status, loss, live, *tables, name := gr.State("")]
    finished = start.click(unlearn_job, inputs_kwargs=inputs, outputs=outputs, **MODEL_JOB)
    finished.then(run_choices, name, page.run, **INSTANT)
    stop.click(sessions.request_stop, None, status, **INSTANT)
    page.expected_time.append(status)


def build_inputs() -> dict[str, gr.components.Component]:
    """The inputs of `unlearn_job` by name; options have their names in the config."""
    models, sets = sessions.available_models(), list(FORGET_SETS)
    local = sessions.server_address() in sessions.LOOPBACK
    info = "A built-in model, a local folder or a hub id" if local else None
    options = {"allow_custom_value": True, "info": info}
    inputs = {"model": gr.Dropdown(models, value=models[0], label="Model", **options)}
    inputs["forget_set"] = gr.Dropdown(sets, value="harry-potter", label="Forget set")
    with gr.Row():
        options = {"file_types": [".jsonl", ".json", ".csv"], "height": 140}
        inputs["upload"] = gr.File(label="Your own forget set", **options)
        inputs["retain"] = gr.File(label="Your own retain set", **options)
    files = [inputs["upload"], inputs["retain"]]
    inputs["forget_set"].input(lambda: (None, None), None, files, **INSTANT)  # files would win
    gr.Markdown(read_static("files.md"))
    methods = UnlearnConfig.__dataclass_fields__["method"]
    options = {"value": methods.default, "label": "Method", "info": METHODS}
    inputs["method"] = gr.Dropdown(list(methods.metadata["choices"]), **options)
    with gr.Accordion("More settings", open=False):
        inputs |= {name: option_slider(name, *values) for name, values in OPTIONS.items()}
        inputs["seed"] = gr.Number(0, precision=0, label=option_label("seed"))
    return inputs


def option_metadata(name: str) -> dict:
    return PARTS[part_of(name)].__dataclass_fields__[name].metadata


def option_label(name: str) -> str:
    text = option_metadata(name)["help"]
    return text[:1].upper() + text[1:]


def option_slider(name: str, value: int, maximum: int) -> gr.Slider:
    """A slider with the help and the minimum that the config gives."""
    minimum, note = (option_metadata(name)["min"], "") if value else (0, "; 0: default")
    options = {"label": option_label(name), "info": f"option {name}{note}"}
    return gr.Slider(minimum, maximum, value, step=1, **options)


class Progress(Callback):
    """What the page shows of a run. The thread of the job writes it, the handler reads it."""

    live_answers = True

    def __init__(self, stop: threading.Event):
        self.stop, self.started = stop, time.monotonic()
        self.title, self.stage = "", "Loading the model."
        self.losses: list[dict] = []
        self.answers: list[list[str]] = []
        self.first_answers: dict[str, str] = {}

    def should_stop(self):
        return self.stop.is_set()

    def on_stage(self, stage, share):
        self.stage = f"{stage[:1].upper()}{stage[1:]}: {share:.0%}."

    def on_answers(self, step, answers):
        first = self.first_answers = self.first_answers or {q: answer for _, q, answer in answers}
        self.answers = [[group, q, first[q], answer] for group, q, answer in answers]

    def on_step(self, entry, max_steps):
        step = entry["step"]
        # the plot keeps the lines that it is first given, and the probe is measured later
        rows = self.losses or [{"step": 0, "value": 1.0, "term": PROBE}]
        terms = [(key, term) for key, term in TERMS.items() if key in entry]
        new_rows = [{"step": step, "value": entry[key], "term": term} for key, term in terms]
        self.losses = rows + new_rows
        left = (max_steps - step) * entry["seconds"] / step
        self.stage = f"Step {step} of at most {max_steps}, at most {left:.0f} s left."

    def view(self) -> tuple[str, pd.DataFrame | None, list[list[str]]]:
        """(status, losses, live answers)"""
        stopping = "Stopping after this operation. " if self.stop.is_set() else ""
        seconds = time.monotonic() - self.started
        # an empty frame would fix the plot's types, and no line would ever appear
        losses = pd.DataFrame(self.losses) if self.losses else None
        return f"{self.title} {self.stage} {stopping}({seconds:.0f} s)", losses, self.answers


@sessions.GPU(duration=sessions.GPU_SECONDS)
def unlearn_job(request: gr.Request, **inputs):
    """Yields (status, losses, live answers, metrics, answers, files, run name).

    A thread does the work, so that the page is updated meanwhile.
    """
    stop = sessions.STOP[request.session_hash] = threading.Event()
    progress, result = Progress(stop), {}

    def work():
        try:
            with sessions.job(request):
                if sessions.STOP.get(request.session_hash) is not stop:
                    raise Interrupted  # the tab was closed while another job ran
                result["run"] = run_unlearning(inputs, progress)
        except Exception as error:
            result["error"] = error_sentence(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    tables = [[], [], gr.File(visible=False), ""]  # those of an earlier run go
    while thread.is_alive():
        thread.join(sessions.TICK)
        yield *progress.view(), *tables
        tables = [gr.skip()] * 4
    sessions.STOP.pop(request.session_hash, None)
    if "error" in result:
        yield result["error"], gr.skip(), gr.skip(), *tables[:3], ""
    else:
        run = result["run"]
        name = run.path.name
        description, *tables, _ = run_store.describe_run(name)
        files, packed = run_store.zip_run(name)
        status = f"Done: {description} Saved in {escape_markdown(str(run.path))}. {packed}"
        yield status, *progress.view()[1:], *tables, files, name


def run_unlearning(inputs: dict, progress: Progress):
    """Train, save, measure. Returns the Run.

    A stop ends the training, and what was learned is measured; a second stop ends the measuring.
    """
    from ...run_folder import new_run_path
    from ...unlearn import unlearn

    run_store.LOADED.clear()  # frees the models of earlier runs
    model, method = sessions.check_access(inputs["model"]), inputs["method"]
    upload, retain = (str(inputs[key]) if inputs[key] else None for key in ("upload", "retain"))
    forget_set = load_forget_set(upload or inputs["forget_set"], retain)
    progress.title = f"{method} on {escape_markdown(forget_set.name)}."
    values = {name: int(inputs[name] or 0) or None for name in OPTIONS}
    values["seed"] = int(inputs["seed"] or 0)
    config = flat_config(method, values, forget_set.is_plain_text)
    path = new_run_path(run_store.RUNS, None, model, forget_set)
    run = unlearn(model, forget_set, config, [progress])
    progress.stop.clear()
    run.save(path)
    run.evaluate([progress])
    run_store.LOADED[run_store.memory_key(run.path)] = run
    return run
