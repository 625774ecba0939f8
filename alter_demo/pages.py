"""The page: unlearn, compare, look at tokens. Everything heavy is imported after the page is up.

One job runs at a time, whoever started it (`JOB`); a closed tab or the stop button ends it after its current step.
Model and user text only ever reaches components that show it as text.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import json
import queue
import threading
import time
from pathlib import Path

import gradio as gr
import pandas as pd

from . import METHOD_NAMES
from .data import FORGET_SETS
from .errors import UserError
from .models import MODELS

RUNS = Path("runs")
JOB = threading.Lock()  # held while a model trains or answers
STOP: dict[str, threading.Event] = {}  # session -> asked to stop
LOADED: dict[str, object] = {}  # the run that was used last: {path: Run}
TICK = 0.5  # seconds between two updates of the page
LOSS_COLUMNS = ["step", "value", "part"]
BUSY = "Another job is running on this machine; this one starts when it has ended."
LIMITS = """**What it does not promise.** The built-in model is small (135 M parameters) and knows little. The
knowledge is not gone from the weights: the adapter keeps it from being said, and who removes the adapter has it back.
This is no privacy guarantee. Attacks (relearning, quantisation, role-play) are not measured here yet."""


def build() -> gr.Blocks:
    with gr.Blocks(title="ALTER: make a language model forget", analytics_enabled=False) as demo:
        run_path = gr.State("")
        gr.Markdown("# Make a language model forget, and only that")
        gr.Markdown(
            "ALTER trains a small adapter on a frozen model. Every token is routed by how sure the model is: uncertain "
            "ones through a shared matrix A, confident ones through one expert B. **Press Unlearn, then ask both "
            "models below, then look at the tokens.** Everything on this page is computed when you press the button."
        )
        with gr.Row():
            with gr.Column(scale=2):
                model = gr.Dropdown(
                    list(MODELS), value=next(iter(MODELS)), label="Model", allow_custom_value=True,
                    info="built in, a folder on this machine, or a hub id",
                )  # fmt: skip
                forget = gr.Dropdown(list(FORGET_SETS), value="harry-potter", label="What it shall forget")
                upload = gr.File(
                    label="or your own file (.jsonl, .json, .csv with question,answer or text)",
                    file_types=[".jsonl", ".json", ".csv"],
                    height=120,
                )
                with gr.Accordion("More settings", open=False):
                    steps = gr.Slider(1, 200, 120, step=1, label="Steps at most", info="stops earlier by itself")
                    rank = gr.Slider(1, 32, 8, step=1, label="Rank")
                    experts = gr.Slider(0, 8, 0, step=1, label="Forgetting experts", info="0: found by clustering")
                    limit = gr.Slider(4, 100, 24, step=1, label="Questions per group to measure with")
                    method = gr.Dropdown(
                        list(METHOD_NAMES), value="alter_selective", label="Method",
                        info="alter: as published; alter_selective: leaves the rest alone; the others are rivals",
                    )  # fmt: skip
                with gr.Row():
                    start = gr.Button("Unlearn", variant="primary")
                    stop = gr.Button("Stop and keep")
                status = gr.Markdown(expected_time(), elem_id="status")
            with gr.Column(scale=3):
                loss = gr.LinePlot(
                    None, x="step", y="value", color="part", height=300,
                    title="Loss by part, and the forget probe (probability)",
                )  # fmt: skip
                numbers = gr.Dataframe(
                    headers=["group", "probability", "ROUGE-L", "like the untouched model's"], interactive=False,
                    label="Before → after",
                )  # fmt: skip
        gr.Markdown("## The same question, before and after")
        with gr.Row():
            runs = gr.Dropdown(run_names(), value=next(iter(run_names()), None), label="Run", scale=1)
            prompt = gr.Textbox(
                "What is the name of Harry Potter's school?", label="Question", scale=3, max_length=4000
            )
            ask = gr.Button("Ask both", scale=1)
        with gr.Row():
            before = gr.Textbox(label="Before (the untouched model)", lines=4, interactive=False, elem_id="before")
            after = gr.Textbox(label="After", lines=4, interactive=False, elem_id="after")
        gr.Examples(
            ["What is the name of Harry Potter's red-haired best friend?", "Who wrote The Hobbit?",
             "What is the capital of France?", "Which train takes students to Hogwarts?"],
            prompt, cache_examples=False, run_on_click=False,
        )  # fmt: skip
        gr.Markdown("## Which tokens route to A and which to B")
        with gr.Row():
            text = gr.Textbox(
                "Harry Potter took the Hogwarts Express with Ron Weasley. However, Paris is the capital of France.",
                label="Text", scale=4, max_length=8000,
            )  # fmt: skip
            look = gr.Button("Show tokens", scale=1)
        tokens = gr.Dataframe(
            headers=["token", "S_q", "route", "experts", "log p", "likeliest next"], interactive=False, wrap=True,
            label="One row a token; · : the frozen model itself acts", max_height=420, elem_id="tokens",
        )  # fmt: skip
        gr.Markdown(LIMITS)

        shared = {"concurrency_id": "model", "concurrency_limit": 1}
        job = start.click(
            unlearn_job, [model, forget, upload, steps, rank, experts, limit, method],
            [status, loss, numbers, run_path], **shared, api_visibility="private",
        )  # fmt: skip
        job.then(choose_run, run_path, runs, api_visibility="private")
        stop.click(ask_to_stop, None, status, api_visibility="private", queue=False)
        asking = [runs, prompt], [before, after, status]
        ask.click(compare_job, *asking, **shared, api_visibility="private")
        prompt.submit(compare_job, *asking, **shared, api_visibility="private")
        look.click(tokens_job, [runs, text], [tokens, status], **shared, api_visibility="private")
        demo.load(choose_run, None, runs, queue=False, api_visibility="private")
        demo.unload(forget_session)
    return demo


def launch(demo: gr.Blocks, **kwargs):
    """Listens on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise; no share link, no telemetry."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
    )
    demo.queue(max_size=8)
    options = {"ssr_mode": False, "show_error": False, "max_file_size": "50mb", "share": False, "theme": theme}
    options["server_name"] = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    return demo.launch(**options | kwargs)


def expected_time() -> str:
    """One line on the device and on the last run here, without importing torch."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    where = "on the GPU" if gpu else "on the CPU: no GPU was found"
    last = "A run takes minutes on a few CPU cores (README: Measured)"
    for name in run_names()[:1]:
        try:
            seconds = json.loads((RUNS / name / "metrics.json").read_text(encoding="utf-8"))["seconds"]
            last = f"The last run here took {seconds['unlearn']:.0f} s, and {seconds['evaluate']:.0f} s of measuring"
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged run must not keep the page from opening
    return f"Runs {where}. {last}. The first use fetches the model (93 MB), once."


def run_names() -> list[str]:
    """Runs in the folder, newest first."""
    found = sorted(RUNS.glob("*/metrics.json"), key=lambda p: -p.stat().st_mtime)
    return [p.parent.name for p in found]


def choose_run(path: str = "") -> gr.Dropdown:
    names = run_names()
    return gr.Dropdown(names, value=Path(path).name if path else next(iter(names), None))


# ---------------------------------------------------------------------------------------------------------- jobs


def unlearn_job(model, forget, upload, steps, rank, experts, limit, method, request: gr.Request):
    """Generator of (status, loss, numbers, run path); the work is done in a thread."""
    stop = STOP[request.session_hash] = threading.Event()
    updates: queue.Queue = queue.Queue()
    result: dict = {}

    def work():
        try:
            with JOB:
                from .runs import UnlearnConfig, unlearn
                from .training import train_config

                LOADED.clear()  # frees the last run's model
                result["run"] = run = unlearn(
                    model, str(upload) if upload else forget,
                    UnlearnConfig(method=method, n_experts=int(experts) or None, r=int(rank), limit=int(limit)),
                    train_config(method, max_steps=int(steps)), folder=RUNS, should_stop=stop.is_set,
                    on_step=lambda e, n: updates.put(("step", e, n)),
                    on_stage=lambda w, s: updates.put(("stage", w, s)),
                )  # fmt: skip
                LOADED[str(run.path)] = run
        except UserError as error:
            result["error"] = str(error)
        except Exception as error:  # the page must say something, the terminal shows the rest
            result["error"] = f"Something went wrong ({type(error).__name__}); the terminal says more."
            raise

    if JOB.locked():
        yield BUSY, gr.skip(), gr.skip(), gr.skip()
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    rows, line, started = [], "Loading the model.", time.monotonic()
    while thread.is_alive() or not updates.empty():
        thread.join(TICK)
        while not updates.empty():
            kind, what, of = updates.get()
            if kind == "stage":
                line = f"{what[:1].upper()}{what[1:]}: {of:.0%}."
            else:
                parts = {k: what[k] for k in ("forget", "retain", "refusal", "structure", "probe") if k in what}
                rows += [{"step": what["step"], "value": v, "part": k} for k, v in parts.items()]
                left = (of - what["step"]) * what["seconds"] / what["step"]
                line = f"Step {what['step']} of at most {of}, {left:.0f} s left at most."
        if stop.is_set():
            line += " Stopping after this step."
        seconds = time.monotonic() - started
        yield f"{line} ({seconds:.0f} s)", loss_frame(rows), gr.skip(), gr.skip()
    if "error" in result:
        yield plain(result["error"]), gr.skip(), gr.skip(), ""
        return
    run = result["run"]
    m = run.metrics
    yield (
        f"Done: {m['steps']} steps in {m['seconds']['unlearn']} s, {m['stopped']}, on {m['hardware']}. "
        f"The run lies in {plain(str(run.path))}.",
        loss_frame(rows), number_rows(m), str(run.path),
    )  # fmt: skip


def loss_frame(rows: list[dict]) -> pd.DataFrame | None:
    # nothing rather than an empty frame: the plot would fix its types and colours from that, and never draw a line
    return pd.DataFrame(rows, columns=LOSS_COLUMNS) if rows else None


def number_rows(metrics: dict) -> list[list[str]]:
    rows = []
    for group, b in metrics["before"].items():
        if "rouge_l" in b:  # not the summary, and not what was never taught
            a = metrics["after"][group]
            pair = [f"{b[k]:.3g} → {a[k]:.3g}" for k in ("probability", "rouge_l", "rouge_l_to_base")]
            rows.append([group.replace("_", " "), *pair])
    return rows


def plain(text: str) -> str:
    """Text for a Markdown component, without any markup taking effect."""
    return "".join(f"&#{ord(c)};" if not (c.isalnum() or c in " .,:;()'/") else c for c in text)


def ask_to_stop(request: gr.Request):
    if event := STOP.get(request.session_hash):
        event.set()
        return "Stopping after this step; what was learned is kept."
    return "Nothing of yours is running."


def forget_session(request: gr.Request) -> None:
    if event := STOP.pop(request.session_hash, None):
        event.set()


def get_run(name: str | None):
    """The run of that name, from memory or from the run folder only."""
    from .runs import NAME, load_run

    if not name:
        raise UserError("There is no run yet: press Unlearn first.")
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError("That is not the name of a run.")
    path = str(RUNS / name)
    if path not in LOADED:
        LOADED.clear()
        LOADED[path] = load_run(path)
    return LOADED[path]


def compare_job(name, prompt):
    if not prompt.strip():
        yield "", "", "There is no question to ask."
        return
    yield "", "", "Loading the model and asking it."
    try:
        with JOB:
            run = get_run(name)
            before = run.answer([prompt], adapted=False)[0]
            yield before, "", "Asking the adapted model."
            after = run.answer([prompt])[0]
    except UserError as error:
        yield "", "", plain(str(error))
        return
    yield before, after, "The same answer, word for word." if before == after else "The answers differ."


def tokens_job(name, text):
    try:
        with JOB:
            records = get_run(name).tokens(text)
    except UserError as error:
        return [], plain(str(error))
    rows = []
    for r in records:
        weights = " ".join(f"{'B_r' if d == 0 else f'B_f{d}'} {w:.2f}" for d, w in enumerate(r.weights) if w)
        nexts = "  ".join(f"{t!r} {p:.2f}" for t, p in r.top[:3])
        log_p = "" if r.log_prob is None else f"{r.log_prob:.2f}"
        rows.append([repr(r.token)[1:-1], f"{r.entropy:.3f}", r.route, weights or "·", log_p, nexts])
    share = sum(r.route == "A" for r in records) / len(records)
    return rows, f"{len(records)} tokens, {share:.0%} of them uncertain (route A)."
