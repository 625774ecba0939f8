"""What the page's buttons do. One job at a time, whoever started it; a closed tab gives its job up at once.

Torch and transformers are imported by the first job, not before the page is up.
"""

from __future__ import annotations

import difflib
import json
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import gradio as gr
import pandas as pd

try:
    from spaces import GPU  # on a Space with ZeroGPU a function asks for the GPU; elsewhere it changes nothing
except ImportError:

    def GPU(duration: int):
        return lambda function: function


from .data import EXAMPLE
from .errors import Interrupted, UserError
from .models import INTERRUPT, MODELS, RUN_NAME
from .results import shortfalls

RUNS = Path("runs")
JOB = threading.Lock()  # held while a model trains or answers
CHANGE = threading.Lock()  # held while OWNER and INTERRUPT change together
STOP: dict[str, threading.Event] = {}  # session -> asked to stop and keep
OWNER: list[str] = []  # session whose job is running
LOADED: dict[tuple[str, int], object] = {}  # runs in memory, two at most
GPU_SECONDS = 120  # that a job may hold a lent GPU
TICK = 0.5  # seconds between two updates of the page
LOSS_COLUMNS = ["step", "value", "part"]
PROBE = "probe, share of its start"
LIVE_COLUMNS = ["set", "question", "at the start", "now"]
MAX_PROMPT, MAX_TEXT = 4000, 20_000
UNTOUCHED = "the untouched model"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ROUTES = ["as trained", "all off", "only B_r", *(f"only B_f{d}" for d in range(1, 9))]
SCRATCH = tempfile.TemporaryDirectory(prefix="alter-", ignore_cleanup_errors=True)  # goes with the process
# what people hand in, too: gradio clears its own folder only if nobody is connected when it ends
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(SCRATCH.name, "gradio")))
MINUTE = 60.0
CLOUD_ITEMS = 30  # questions of a set that a cloud is drawn from


@contextmanager
def job(request: gr.Request | None):
    """Holds the machine. The session may leave meanwhile: `forget_session`."""
    session = getattr(request, "session_hash", None) or ""
    with JOB:
        with CHANGE:
            INTERRUPT.clear()
            OWNER[:] = [session]
        try:
            yield
        finally:
            with CHANGE:
                OWNER.clear()
                INTERRUPT.clear()


def plain(text: str) -> str:
    """Text for a Markdown component, without any markup taking effect, nor a link or a list being made of it."""
    escaped = "".join(f"&#{ord(c)};" if not (c.isalnum() or c in " .,:;()'/") else c for c in text)
    return re.sub(r"(?<=\w)[.:](?=[\w/])|(?<=\d)\.|(?<=\d)\)", lambda m: f"&#{ord(m[0])};", escaped)


def sentence(error: Exception) -> str:
    """What a person reads of an error; the terminal shows the rest."""
    if isinstance(error, UserError):
        return plain(str(error))
    if isinstance(error, Interrupted):
        return "Given up: the tab was closed."
    import traceback

    traceback.print_exception(error)
    return f"Something went wrong ({type(error).__name__}); the terminal says more."


def address() -> str:
    """Where the page listens."""
    return os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[0])


def models_offered() -> list[str]:
    """The built-in models and those that ALTER_MODELS names, folders or hub ids with commas between."""
    return [*MODELS, *(x.strip() for x in os.environ.get("ALTER_MODELS", "").split(",") if x.strip())]


def offered(model: str) -> str:
    """`model`, if whoever asks may have it. Raises UserError where the page is open to others and it isn't offered: the
    folders of this machine, and what its access to the hub reaches, are its owner's, and a run's zip holds weights."""
    if address() not in LOOPBACK and model not in models_offered():
        raise UserError(
            f"This page is open to others and offers {', '.join(models_offered())} only: whoever started it can name "
            "more models in ALTER_MODELS."
        )
    return model


def ask_to_stop(request: gr.Request) -> str:
    if event := STOP.get(request.session_hash):
        event.set()
        return "Stopping; what was learned is kept."
    return "Nothing of yours is running."


def forget_session(request: gr.Request) -> None:
    """The tab was closed."""
    if event := STOP.pop(request.session_hash, None):
        event.set()
    with CHANGE:
        if request.session_hash in OWNER:
            INTERRUPT.set()


# ------------------------------------------------------------------------------------------------------- the runs


def run_names() -> list[str]:
    """Runs in the folder, newest first."""
    found = sorted(RUNS.glob("[!.]*/metrics.json"), key=lambda p: -p.stat().st_mtime)
    return [p.parent.name for p in found]


def run_metrics(name: str) -> dict:
    """metrics.json of a run. Raises UserError for a bad name and a damaged file."""
    path = run_path(name) / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is missing or damaged: make the run again.") from None


def run_path(name: str | None) -> Path:
    if not name:
        raise UserError("There is no run yet: press Unlearn first.")
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise UserError("That is not the name of a run.")
    return RUNS / name


def get_run(name: str | None):
    """The run of that name, from memory or from the run folder only."""
    path = run_path(name)
    if (key := in_memory(path)) not in LOADED:
        from .runs import load_run

        while len(LOADED) > 1:
            LOADED.pop(next(iter(LOADED)))
        LOADED[key] = load_run(path)
    return LOADED[key]


def in_memory(path: Path) -> tuple[str, int]:
    """What stands for a run in LOADED; another one of the same name is another (config.json is written once)."""
    config = path / "config.json"
    return str(path), config.stat().st_mtime_ns if config.is_file() else 0


def expected_time() -> str:
    """One line on the device and on how long a run takes, without importing torch."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    where = "on the GPU" if gpu else "on the CPU: no GPU was found"
    took = "{unlearn:.0f} s, and {evaluate:.0f} s of measuring".format
    last = ""
    for name in run_names():
        with suppress(Exception):  # a damaged run must not keep the page from opening
            if (m := run_metrics(name))["measured"]:
                last = f"the last run here took {took(**m['seconds'])}"
                break
    if not last and (stored := read_example()):
        last = f"Harry Potter took {took(**stored['seconds'])}, on {stored['hardware']}"
    first = "" if run_names() else " The first use fetches the model (93 MB), once."
    return f"Runs {where}; {last or 'a run takes minutes on a few cores'}.{first}"


def read_example() -> dict | None:
    """The stored example, None where the file is absent."""
    return json.loads(EXAMPLE.read_text(encoding="utf-8")) if EXAMPLE.is_file() else None


# -------------------------------------------------------------------------------------------------------- unlearn


@GPU(duration=GPU_SECONDS)
def unlearn_job(model, forget, upload, keep, method, steps, rank, experts, limit, seed, request: gr.Request):
    """Yields (status, loss, live answers, numbers, answers, files, run name); the work is done in a thread."""
    stop = STOP[request.session_hash] = threading.Event()
    updates: queue.Queue = queue.Queue()
    result: dict = {}

    def work():
        try:
            with job(request):
                from .data import load_forget_set
                from .runs import UnlearnConfig, unlearn
                from .training import train_config

                if STOP.get(request.session_hash) is not stop:
                    raise Interrupted  # the tab was closed while another one's job ran
                LOADED.clear()  # frees the last run's model
                made = load_forget_set(str(upload) if upload else forget, str(keep) if keep else None)
                result["what"] = f"{method} on {plain(made.name)}. "
                run = unlearn(
                    offered(model), made,
                    UnlearnConfig(method=method, n_experts=int(experts) or None, r=int(rank), limit=int(limit)),
                    train_config(method, made.of_texts, max_steps=int(steps) or None, seed=int(seed or 0)),
                    folder=RUNS, should_stop=stop.is_set,
                    on_step=lambda e, n: updates.put(("step", e, n)),
                    on_stage=lambda w, s: updates.put(("stage", w, s)),
                    on_answers=lambda step, answers: updates.put(("answers", step, answers)),
                )  # fmt: skip
                LOADED[in_memory(run.path)] = run
                result["path"], result["metrics"] = run.path, run.metrics
        except Exception as error:
            result["error"] = sentence(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    rows, live, first, now, started = [], [], {}, "Loading the model.", time.monotonic()
    measuring = False
    nothing = [[], [], gr.File(visible=False), ""]  # what an earlier run has left is not this one's
    while thread.is_alive() or not updates.empty():
        thread.join(TICK)
        while not updates.empty():
            kind, what, of = updates.get()
            if kind == "stage":
                if rows and not measuring and what.startswith("measuring"):
                    measuring = True
                    stop.clear()  # it has stopped training; pressed again, it stops measuring
                now = f"{what[:1].upper()}{what[1:]}: {of:.0%}."
            elif kind == "answers":
                first = first or {q: a for _, q, a in of}
                live = [[group, q, first[q], a] for group, q, a in of]
            else:
                # the plot keeps the lines that it was first given, and the probe is looked at every few steps only
                rows = rows or [{"step": 0, "value": 1.0, "part": PROBE}]
                names = {k: k for k in ("forget", "retain", "refusal", "structure")} | {"probe_share": PROBE}
                parts = {name: what[k] for k, name in names.items() if k in what}
                rows += [{"step": what["step"], "value": v, "part": k} for k, v in parts.items()]
                left = (of - what["step"]) * what["seconds"] / what["step"]
                now = f"Step {what['step']} of at most {of}, {left:.0f} s left at most."
        stopping = "Stopping as soon as this is done. " if stop.is_set() else ""
        line = f"{result.get('what', '')}{now} {stopping}({time.monotonic() - started:.0f} s)"
        yield line, loss_frame(rows), live, *nothing
        nothing = [gr.skip()] * 4
    STOP.pop(request.session_hash, None)
    if "error" in result:
        yield result["error"], gr.skip(), gr.skip(), *nothing[:3], ""
        return
    m, path = result["metrics"], result["path"]
    done = (
        f"{result['what']}Done: {m['steps']} steps in {m['seconds']['unlearn']} s, {plain(m['stopped'])}, on "
        f"{plain(m['hardware'])}. The run lies in {plain(str(path))}."
    )
    done = " ".join([done, *shortfalls(m)])
    try:
        files = packed(path.name)
    except (UserError, OSError) as error:
        files, done = gr.File(visible=False), f"{done} It could not be packed: {sentence(error)}"
    yield done, loss_frame(rows), live, number_rows(m), answer_rows(path), files, path.name


def packed(name: str | None) -> gr.File:
    """The run as a zip, and its metrics, for download."""
    path, folder = run_path(name), scratch()
    zipped = shutil.make_archive(str(folder / path.name), "zip", path)
    record = shutil.copy(path / "metrics.json", folder / f"{path.name}.json")
    return gr.File([zipped, str(record)], visible=True)


def scratch() -> Path:
    """A new folder for files to download, of which gradio makes copies that it clears; older ones of ours go."""
    files = Path(SCRATCH.name, "files")
    files.mkdir(exist_ok=True)
    for old in files.iterdir():
        with suppress(FileNotFoundError):  # another visitor was quicker
            if time.time() - max(p.stat().st_mtime for p in (old, *old.iterdir())) > MINUTE:
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=files))


def pack(name: str | None):
    """(files, status)"""
    try:
        return packed(name), "Packed."
    except (UserError, OSError) as error:
        return gr.File(visible=False), sentence(error)


def run_view(name: str | None):
    """(what kind of run, numbers, answers, no files yet) of a finished run, from its folder."""
    try:
        m, path = run_metrics(name), run_path(name)
        method, seconds = m["config"]["unlearn"]["method"], m["seconds"]
        about = (
            f"{method} on {m['data']['forget_set']}, {m['model']}, seed {m['seed']}: {m['steps']} steps in "
            f"{seconds['unlearn']} s, and {seconds['evaluate']} s of measuring, on {m['hardware']}, {m['date']}."
        )
        told = " ".join([plain(about), *shortfalls(m)])
        return told, number_rows(m), answer_rows(path), gr.File(visible=False)
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return sentence(error) if isinstance(error, UserError) else "This run's record is damaged.", [], [], gr.skip()


def loss_frame(rows: list[dict]) -> pd.DataFrame | None:
    # nothing rather than an empty frame: the plot would fix its types and colours from that, and never draw a line
    return pd.DataFrame(rows, columns=LOSS_COLUMNS) if rows else None


def answer_rows(path: Path) -> list[list[str]]:
    rows = json.loads((path / "answers.json").read_text(encoding="utf-8"))
    return [[r["group"].replace("_", " "), r["question"], r["before"], r["after"]] for r in rows]


def number_rows(metrics: dict) -> list[list[str]]:
    rows = []
    for group, b in metrics["before"].items():
        if "rouge_l" in b:  # not the summary, and not what was never taught
            a = metrics["after"][group]
            pair = [f"{b[k]:.3g} → {a[k]:.3g}" for k in ("probability", "rouge_l", "rouge_l_to_base")]
            rows.append([group.replace("_", " "), *pair])
    return rows


# -------------------------------------------------------------------------------------------------------- compare


@GPU(duration=GPU_SECONDS)
def compare_job(left, right, route, prompt, sampled, temperature, seed, length, request: gr.Request):
    """Yields (left answer, right answer, status); answers are [(text, mark or None), ...]."""
    if not prompt.strip():
        yield [], [], "There is no question to ask."
        return
    yield [], [], "Loading the model and asking."
    try:
        with job(request):
            from .answers import stream

            runs = [get_run(right if left == UNTOUCHED else left), get_run(right)]
            sides = [side_of(runs[0], adapted=left != UNTOUCHED), side_of(runs[1], route=route)]
            heat = float(temperature) if sampled else 0.0
            lms = [run.lm for run in runs]
            started = seen = time.monotonic()
            texts = ["", ""]
            for texts in stream(lms, sides, prompt[:MAX_PROMPT], int(length), heat, int(seed or 0)):
                if time.monotonic() - seen > TICK:
                    seen = time.monotonic()
                    yield [(texts[0], None)], [(texts[1], None)], "Answering."
    except Exception as error:
        yield [], [], sentence(error)
        return
    said = "The same answer, word for word." if texts[0] == texts[1] else "The answers differ where they are marked."
    yield *marked(*texts), f"{said} ({time.monotonic() - started:.1f} s)"


def side_of(run, adapted: bool = True, route: str = ROUTES[0]):
    """A function that gives the context in which `run` is asked. Raises UserError for a route that it has not."""
    if not adapted:
        return lambda: run.side(False)
    force = {"all off": "off", "only B_r": "r"}.get(route)
    if route.startswith("only B_f"):
        force = int(route.removeprefix("only B_f"))
        if force > run.router.config.n_experts:
            raise UserError(f"This run has {run.router.config.n_experts} forgetting experts, so no {route[5:]}.")
    if force is None:
        return lambda: run.side(True)

    @contextmanager
    def forced():
        with run.only(force):
            yield run.model

    if not run.routed:
        raise UserError("This run's method has no router: only ALTER's routes can be forced.")
    return forced


def marked(left: str, right: str) -> tuple[list, list]:
    """Both texts in pieces, (text, None) where they agree and (text, "differs") where not."""
    a, b = left.split(" "), right.split(" ")
    pieces = ([], [])
    for tag, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        for side, words in ((0, a[a1:a2]), (1, b[b1:b2])):
            if words:
                pieces[side].append((" ".join(words) + " ", None if tag == "equal" else "differs"))
    return pieces


# --------------------------------------------------------------------------------------------------------- tokens


@GPU(duration=GPU_SECONDS)
def xray_job(name, text, question, request: gr.Request):
    """(X-ray data, status)."""
    try:
        with job(request):
            from .xray import xray_data

            run = get_run(name)
            started = time.monotonic()
            records = run.tokens(text[:MAX_TEXT], question.strip()[:MAX_PROMPT] or None)
            data = xray_data(records, run.router.config if run.routed else None)
    except Exception as error:
        return gr.skip(), sentence(error)
    return data, f"{len(records)} tokens in {time.monotonic() - started:.1f} s."


def xray_file(data):
    """The X-ray that is on the page as a file of its own."""
    from .xray import xray_html

    if not data or not data.get("tokens"):
        return gr.skip(), "There is no X-ray to save yet: press Show tokens."
    path = scratch() / "token-xray.html"
    path.write_text(xray_html(data), encoding="utf-8")
    return gr.File(str(path), visible=True), "Saved: one HTML file that needs nothing else."


@GPU(duration=GPU_SECONDS)
def heat_job(name, text, request: gr.Request):
    """(heat map, status): the same text as tokens by experts."""
    try:
        with job(request):
            from .charts import heat_map

            run = get_run(name)
            if not run.routed:
                raise UserError("This run's method has no router: only ALTER's tokens take routes.")
            return heat_map(run.tokens(text[:2000])), "Drawn."
    except Exception as error:
        return gr.skip(), sentence(error)


@GPU(duration=GPU_SECONDS)
def clouds_job(name, source, text, request: gr.Request):
    """Yields ({"words": [(word, S_q, name of its expert), ...], "threshold", "q"}, status)."""
    yield gr.skip(), "Loading the model and reading."
    try:
        with job(request):
            from .tokens import expert_name, words

            run = get_run(name)
            pairs = [(text[:MAX_TEXT], None)] if source == "my text" else texts_of(run, source)
            found, seen = [], time.monotonic()
            for number, (answer, question) in enumerate(pairs, 1):
                for word, source, _ in words(run.tokens(answer, question)):
                    found.append((word, round(source.entropy, 4), expert_name(source)))
                if time.monotonic() - seen > TICK:
                    seen = time.monotonic()
                    yield gr.skip(), f"Read {number} of {len(pairs)}."
            threshold, q = (run.router.config.threshold, run.router.config.q) if run.routed else (1.2, 1.5)
    except Exception as error:
        yield gr.skip(), sentence(error)
        return
    data = {"words": found, "threshold": round(threshold, 3), "q": q, "routed": run.routed}
    yield data, f"{len(found)} words of {len(pairs)} texts."


def texts_of(run, source: str) -> list[tuple[str, str | None]]:
    """(answer, question) of what the run measured of its forget set, or of what it was to keep."""
    rows = json.loads((run.path / "answers.json").read_text(encoding="utf-8"))
    forget = source == "forget set"
    found = [(r["before"], r["question"]) for r in rows if r["group"].startswith("forget") == forget]
    if not found:
        raise UserError("This run measured no questions of that set: choose your own text.")
    step = max(1, len(found) // CLOUD_ITEMS)
    return found[::step][:CLOUD_ITEMS]


def threshold_slider(data):
    """The slider at the run's own threshold; with a small q that lies far above what is usual."""
    if not data:
        return gr.skip()
    return gr.Slider(value=data["threshold"], maximum=max(3.0, 1.2 * data["threshold"]))


def clouds_view(data, threshold):
    """(gallery, table, histogram) of the words that `clouds_job` found, split at `threshold`."""
    from .charts import WAYS, cloud, histogram, word_table
    from .tokens import word_counts

    if not data or not data["words"]:
        return [], None, None
    counts = word_counts(data["words"], threshold)
    images = [
        (image, caption(way, data["routed"])) for way in WAYS if (image := cloud(counts.get(way, {}), way)) is not None
    ]
    return images, word_table(counts).head(300), histogram([e for _, e, _ in data["words"]], threshold, data["q"])


def caption(way: str, routed: bool) -> str:
    if not routed:
        return "uncertain" if way == "A" else "confident"
    usual = {"A": "A: uncertain", "B_r": "B_r: confident", "none": "no expert acts: the frozen model itself"}
    return usual.get(way, f"{way}: confident, to be forgotten")


def router_view(name):
    """(Sankey, map, shares, nearest questions, status) of a run, from its record: no model is asked."""
    from .charts import domain_map, flows, shares

    try:
        routing = run_metrics(name).get("phase_one", {}).get("routing")
        if not routing:
            raise UserError("This run kept no routes: its method has no router, or it is older than this page.")
        nearest = [[d, q] for d, questions in routing["map"]["nearest"].items() for q in questions]
        return flows(routing), domain_map(routing), shares(routing), nearest, "From the run's own record."
    except Exception as error:
        return None, None, None, [], sentence(error)
