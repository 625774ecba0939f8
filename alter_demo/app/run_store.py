"""The runs in `runs/`: list, read, load, pack for download."""

import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import gradio as gr

from ..errors import UserError
from ..evaluation.shortfalls import shortfalls
from ..files import EXAMPLE, RUN_NAME
from .sessions import error_sentence, escape_markdown

RUNS = Path("runs")
LOADED: dict[tuple[str, int], object] = {}  # runs in memory, at most two
DOWNLOAD_SECONDS = 60.0  # after which gradio has copied a file to download
SCRATCH = tempfile.TemporaryDirectory(prefix="alter-", ignore_cleanup_errors=True)
# gradio deletes uploads on exit only if nobody is connected; SCRATCH always goes with the process
os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(SCRATCH.name, "gradio")))


def run_names() -> list[str]:
    """Names of the saved runs, newest first."""
    files = sorted(RUNS.glob("[!.]*/metrics.json"), key=lambda path: -path.stat().st_mtime)
    return [path.parent.name for path in files]


def run_path(name: str | None) -> Path:
    if not name:
        raise UserError("There are no runs yet. Start one on the Unlearn tab.")
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise UserError(f"{name!r} is not a valid run name.")
    return RUNS / name


def read_metrics(name: str | None) -> dict:
    """metrics.json of a run. Raises UserError for an invalid name and for a damaged file."""
    path = run_path(name) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is missing or damaged. Run unlearning again.") from None
    if "unlearn" in metrics.get("config", {}):  # a run of 0.1; others need no torch here
        from ..record import upgrade_config

        metrics["config"] = upgrade_config(metrics["config"])
    return metrics


def get_run(name: str | None):
    """The Run of that name, from memory or from its folder."""
    path = run_path(name)
    if (key := memory_key(path)) not in LOADED:
        from ..run import load_run

        while len(LOADED) > 1:
            LOADED.pop(next(iter(LOADED)))
        LOADED[key] = load_run(path)
    return LOADED[key]


def memory_key(path: Path) -> tuple[str, int]:
    """Key in LOADED. A new run under the same name has a newer config.json."""
    config = path / "config.json"
    return str(path), config.stat().st_mtime_ns if config.is_file() else 0


def read_example() -> dict | None:
    """The stored example, None if there is none."""
    return json.loads(EXAMPLE.read_text(encoding="utf-8")) if EXAMPLE.is_file() else None


def expected_time() -> str:
    """The device and the duration of a run, found without torch."""
    gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    device = "Runs on the GPU." if gpu else "Runs on the CPU (no GPU found)."
    names, duration = run_names(), "A run takes minutes on a few cores."
    took = "took {unlearn:.0f} s plus {evaluate:.0f} s to measure".format
    if stored := read_example():
        duration = f"The Harry Potter example {took(**stored['seconds'])} on {stored['hardware']}."
    for name in names:
        with suppress(Exception):  # a damaged run must not keep the page from opening
            if (metrics := read_metrics(name))["measured"]:
                duration = f"The last run {took(**metrics['seconds'])}."
                break
    return f"{device} {duration}" + ("" if names else " The first run downloads the model (93 MB).")


def describe_run(name: str | None):
    """(description, metric rows, answer rows, hidden files) of a run, from its folder."""
    try:
        metrics, path = read_metrics(name), run_path(name)
        seconds, data = metrics["seconds"], metrics["data"]["forget_set"]
        text = (
            f"{metrics['config']['method']} on {data}, {metrics['model']}, seed {metrics['seed']}: "
            f"{metrics['steps']} steps in {seconds['unlearn']} s ({metrics['stopped']}), plus "
            f"{seconds['evaluate']} s to measure, on {metrics['hardware']}, {metrics['date']}."
        )
        text = " ".join([escape_markdown(text), *shortfalls(metrics)])
        rows = json.loads((path / "answers.json").read_text(encoding="utf-8"))
        names = ("question", "before", "after")
        answers = [[row["group"].replace("_", " "), *map(row.get, names)] for row in rows]
        return text, metric_rows(metrics), answers, gr.File(visible=False)
    except UserError as error:
        return error_sentence(error), [], [], gr.skip()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return "The metrics file of this run is damaged.", [], [], gr.skip()


def metric_rows(metrics: dict) -> list[list[str]]:
    """One row per group; the summary and the holdout have no ROUGE-L and are left out."""
    rows, names = [], ("probability", "rouge_l", "rouge_l_to_base")
    intervals = metrics.get("intervals", {}).get("after", {})

    def change(group: str, name: str) -> str:
        text = f"{metrics['before'][group][name]:.3g} → {metrics['after'][group][name]:.3g}"
        interval = intervals.get(group, {}).get(name)
        return text if interval is None else "{} ({:.3g} to {:.3g})".format(text, *interval)

    for group, before in metrics["before"].items():
        if "rouge_l" in before:
            rows.append([group.replace("_", " "), *(change(group, name) for name in names)])
    return rows


def zip_run(name: str | None) -> tuple[gr.File, str]:
    """(files, status): the run as a .zip file and its metrics.json, to download."""
    try:
        path, folder = run_path(name), download_folder()
        archive = shutil.make_archive(str(folder / path.name), "zip", path)
        metrics = shutil.copy(path / "metrics.json", folder / f"{path.name}.json")
        return gr.File([archive, str(metrics)], visible=True), "The .zip file is ready."
    except (UserError, OSError) as error:
        return gr.File(visible=False), f"The .zip file failed: {error_sentence(error)}"


def download_folder() -> Path:
    """A new folder for files to download; old ones are deleted."""
    downloads = Path(SCRATCH.name, "files")
    downloads.mkdir(exist_ok=True)
    for old in downloads.iterdir():
        with suppress(FileNotFoundError):  # another visitor was faster
            newest = max(path.stat().st_mtime for path in (old, *old.iterdir()))
            if time.time() - newest > DOWNLOAD_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=downloads))
