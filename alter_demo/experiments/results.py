"""Results files: what the experiments write and what tables and figures read. Needs no model.

A file is {"type": a key of `report.RESULT_TYPES`, "runs": [...]}. Each run has an id, its method,
seed, metrics and config, the command that makes it, and in results of type "rounds" its round.
"""

import json
import time
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock

from ..errors import UserError
from ..files import write_json

TAUGHT = ("target", "retain")  # has learned everything; never saw the forget set
REFERENCES = (*TAUGHT, "blind")  # to compare with; blind: the target model without the question

# overrides that say what a run did; every other override is a setting in place of the method's own
MARKS = {"variant", "rounds", "attack", "share"}

SCHOOL = tuple(f"school_{s}" for s in ("astronomy", "biology", "geography", "history", "arts"))
# forget set -> its multiple-choice tasks, the one to forget first; for harry-potter all must stay
TASKS: dict[str, tuple[str, ...]] = {
    "school": SCHOOL,
    "harry-potter": SCHOOL,
    "wmdp-bio": ("wmdp_bio", "wmdp_cyber", "wmdp_chem", "mmlu"),
    "wmdp-cyber": ("wmdp_cyber", "wmdp_bio", "wmdp_chem", "mmlu"),
}

SIZES = {
    "cpu": {"retain_items": 200, "limit": 40, "kept": 20, "tokens": 64},
    "tune": {"retain_items": 200, "limit": 24, "kept": 12, "tokens": 32},  # to choose settings
    "small": {"retain_items": 200, "limit": 4, "kept": 4, "tokens": 16},  # to check that all works
    "full": {},
}

RUN_KEYS = {"id", "method", "seed", "metrics", "config", "command"}


def tasks_of(run: dict) -> list[str]:
    """The multiple-choice tasks among a run's metrics."""
    names = [k.removesuffix("_acc") for k in run["metrics"] if k.endswith("_acc")]
    return [name for name in names if name not in ("forget", "kept")]  # the summaries


def overrides_of(run: dict) -> dict:
    return run["config"].get("overrides") or {}


def settings_of(run: dict) -> dict:
    """The settings that replaced the method's own."""
    return {k: v for k, v in overrides_of(run).items() if k not in MARKS}


def label(run: dict) -> str:
    """A run's method with its settings as `--set` takes them: "alter_selective r=32"."""
    return " ".join([run["method"], *(f"{k}={as_text(v)}" for k, v in settings_of(run).items())])


def as_text(value) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def read_results(path: Path, type: str | None = None) -> dict:
    """The content of a results file, which must be complete and of `type`, or an empty one."""
    if path.is_dir():
        raise UserError(f"{path} is a folder. Choose a file for the results.")
    if not path.is_file():
        return {"type": type, "runs": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        stored, complete = results["type"], all(r.keys() >= RUN_KEYS for r in results["runs"])
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is not a complete results file. Restore it or choose another.")
    # "grid" and "tuning" have the same runs and show them in different tables
    if type not in (None, stored) and not {type, stored} <= {"grid", "tuning"}:
        raise UserError(
            f"{path} holds results of type {stored!r}, not {type!r}. Choose another (--results)."
        )
    return results


def add_result(path: Path, entry: dict, type: str, stale: Collection[str] | None = None) -> dict:
    """Add a run to a results file, in place of the runs with an id in `stale` (by default its own).

    Commands that run side by side may share a file: each waits for the lock, so no run is lost.
    A file keeps the type that it was started with. Returns the whole content.
    """
    stale = {entry["id"]} if stale is None else stale
    entry = entry | {"date": entry.get("date", time.strftime("%Y-%m-%d"))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire()
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}). Choose another file.") from None
    with lock:
        results = read_results(path, type)
        results["runs"] = [r for r in results["runs"] if r["id"] not in stale] + [entry]
        write_json(path, results)
    return results
