"""Compare: one question to the base model and a run, or to two runs, side by side."""

import difflib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import gradio as gr

from ...errors import UserError
from ..components import DIFFERENCES, INSTANT, MODEL_JOB, Page, metrics_help, run_tables
from ..run_store import describe_run, get_run, run_names, zip_run
from ..sessions import MAX_PROMPT, TICK, model_job

BASE_MODEL = "the base model"
ROUTES = {"as trained": None, "all off": "off", "only B_r": "r"}
ROUTES |= {f"only B_f{d}": d for d in range(1, 9)}
EXAMPLES = """What is the name of Harry Potter's red-haired best friend?
Who wrote The Hobbit?
What is the capital of France?
Which train takes students to Hogwarts?""".splitlines()


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        names = [BASE_MODEL, *run_names()]
        left = gr.Dropdown(names, value=BASE_MODEL, label="Left", allow_custom_value=True)
        page.run.render()
        route = gr.Dropdown(list(ROUTES), value="as trained", label="Active experts (right)")
    with gr.Row():
        page.prompt.render()
        ask = gr.Button("Ask both", variant="primary", scale=1)
    inputs = {"left": left, "right": page.run, "route": route, "prompt": page.prompt}
    with gr.Accordion("Sampling", open=False):
        label = "Sample, with the same random numbers on both sides (off: greedy decoding)"
        inputs["sampled"] = gr.Checkbox(False, label=label)
        inputs["temperature"] = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature")
        inputs["seed"] = gr.Number(0, precision=0, label="Sampling seed")
        inputs["length"] = gr.Slider(8, 256, 64, step=8, label="Maximum new tokens")
    with gr.Row():
        left_answer = gr.HighlightedText(label="Left answer", elem_id="before", **DIFFERENCES)
        page.right_answer.render()
    outputs = [left_answer, page.right_answer, gr.Markdown("", elem_id="compare-status")]
    gr.Examples(EXAMPLES, page.prompt, cache_examples=False, run_on_click=False)
    triggers = [ask.click, page.prompt.submit]
    gr.on(triggers, compare_job, inputs_kwargs=inputs, outputs=outputs, **MODEL_JOB)
    gr.on(triggers, lambda prompt: prompt, page.prompt, page.last_question, **INSTANT)
    page.run.change(lambda: gr.Dropdown([BASE_MODEL, *run_names()]), None, left, **INSTANT)
    page.of_run += outputs
    build_record(page)


def build_record(page: Page) -> None:
    """The metrics, answers and files of the selected run."""
    with gr.Accordion("Metrics and files of this run", open=False) as record:
        description = gr.Markdown("", elem_id="run-status")
        metrics, answers, downloads = run_tables("-of-run")
        pack = gr.Button("Create .zip file")
        metrics_help()
    views = [description, metrics, answers, downloads]
    gr.on([page.run.change, record.expand], describe_run, page.run, views, **INSTANT)
    pack.click(zip_run, page.run, [downloads, description], **INSTANT)


@model_job(outputs=3)
def compare_job(**inputs):
    """Yields (left answer, right answer, status); an answer is a list of (text, label or None)."""
    from ...models.generation import stream

    if not inputs["prompt"].strip():
        yield [], [], "Enter a question first."
        return
    yield [], [], "Loading the model."
    base = inputs["left"] == BASE_MODEL
    left, right = get_run(inputs["right" if base else "left"]), get_run(inputs["right"])
    models = [left.base_model if base else routed(left), routed(right, ROUTES[inputs["route"]])]
    temperature = float(inputs["temperature"]) if inputs["sampled"] else 0.0
    options = int(inputs["length"]), temperature, int(inputs["seed"] or 0)
    started, updated, answers = time.monotonic(), 0.0, ["", ""]
    for answers in stream([left.lm, right.lm], models, inputs["prompt"][:MAX_PROMPT], *options):
        if time.monotonic() - updated > TICK:
            updated = time.monotonic()
            yield *([(answer, None)] for answer in answers), "Generating."
    same = answers[0] == answers[1]
    verdict = "Both answers are identical." if same else "Differences are highlighted."
    yield *mark_differences(*answers), f"{verdict} ({time.monotonic() - started:.1f} s)"


def routed(run, force: str | int | None = None) -> Callable[[], AbstractContextManager]:
    """A function whose context gives the unlearned model, with every token sent to `force`.

    Raises:
        UserError: the run has no router, or no such expert.
    """
    if force is None:
        return lambda: nullcontext(run.model)
    if not run.has_router:
        raise UserError("The method of this run has no router, so its experts cannot be selected.")
    experts = run.router.config.n_experts
    if isinstance(force, int) and force > experts:
        raise UserError(f"There is no B_f{force}: this run has {experts} forgetting experts.")

    @contextmanager
    def forced():
        with run.force_route(force):
            yield run.model

    return forced


def mark_differences(left: str, right: str) -> tuple[list, list]:
    """Both texts in pieces: (text, None) where they agree, (text, "differs") where they do not."""
    words, pieces = (left.split(" "), right.split(" ")), ([], [])
    for tag, *spans in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        label = None if tag == "equal" else "differs"
        for side, (start, end) in enumerate((spans[:2], spans[2:])):
            if start < end:
                pieces[side].append((" ".join(words[side][start:end]) + " ", label))
    return pieces
