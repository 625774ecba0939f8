"""Results files, from which tables and figures are made, and what a run's record tells; needs no model."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from filelock import FileLock

from .errors import UserError

WIDE_OPEN = 0.8  # share of held-out forget samples that open the gate, below which a person is told
TAUGHT = ("target", "retain")  # the model that has learned everything, and the one that never saw the forget set
MARKS = {"variant", "rounds", "attack", "share"}  # overrides that say what was done, and are no settings
REFERENCES = (*TAUGHT, "blind")  # rows beside which all others are put; blind: the target, without the question
SCHOOL = ("school_astronomy", "school_biology", "school_geography", "school_history", "school_arts")
# forget set -> its multiple-choice tasks, that which is to be forgotten first; of Harry Potter all are to stay
TASKS: dict[str, tuple[str, ...]] = {
    "school": SCHOOL,
    "harry-potter": SCHOOL,
    "wmdp-bio": ("wmdp_bio", "wmdp_cyber", "wmdp_chem", "mmlu"),
    "wmdp-cyber": ("wmdp_cyber", "wmdp_bio", "wmdp_chem", "mmlu"),
}
SIZES = {
    "cpu": {"retain_items": 200, "limit": 40, "kept": 20, "tokens": 64},
    "tune": {"retain_items": 200, "limit": 24, "kept": 12, "tokens": 32},  # to choose settings by, in half the time
    "small": {"retain_items": 200, "limit": 4, "kept": 4, "tokens": 16},  # to try whether everything works
    "full": {},
}


def tasks_of(run: dict) -> list[str]:
    """The multiple-choice tasks that a run's metrics hold; `forget_acc` and `kept_acc` sum them up."""
    sums = ("forget_acc", "kept_acc")
    return [k.removesuffix("_acc") for k in run["metrics"] if k.endswith("_acc") and k not in sums]


def read_results(path: Path) -> dict:
    """{"runs": [...]} of a results file, without runs when it is not there yet.

    Raises:
        UserError: the file was cut short or is something else, a folder for one.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, and a results file is wanted.")
    if not path.is_file():
        return {"runs": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for run in results["runs"]:
            run["id"], run["method"], run["seed"], run["metrics"], run["config"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not a whole results file: restore it (git), or choose another name.") from None
    return results


def put(path: Path, entry: dict, stale: Collection[str] | None = None) -> dict:
    """Add a run to a results file, in place of those with an id in `stale` (its own, if not given); returns all of it.
    Commands that run side by side may share a file: each waits for the other, and none loses what the other has added.

    Raises:
        UserError: as `read_results` and `write_json` do.
    """
    stale = {entry["id"]} if stale is None else stale
    entry = entry | {"date": entry.get("date", time.strftime("%Y-%m-%d"))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire()
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): choose another file.") from None
    with lock:
        results = read_results(path)
        results["runs"] = [r for r in results["runs"] if r["id"] not in stale] + [entry]
        write_json(path, results)
    return results


def write_json(path: Path, value, indent: int | None = 1) -> None:
    """Write aside, then rename: a reader never sees half a file. Raises UserError when the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
            aside = Path(handle.name)
        try:
            with aside.open("w", encoding="utf-8") as handle:
                json.dump(value, handle, ensure_ascii=False, indent=indent)
            aside.chmod(0o644)  # temporary files are their owner's alone
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): make room there.") from None


def shortfalls(metrics: dict) -> list[str]:
    """What a person should know about a run beside its figures, one sentence each; [] where nothing is amiss."""
    found, alter = [], metrics["config"]["alter"]
    samples = metrics["phase_one"].get("samples", {})
    opened = metrics["phase_one"].get("router", {}).get("forget_open_at_answer")
    if alter.get("gate") == "two_level" and opened is not None and opened < WIDE_OPEN:
        found.append(
            f"The gate opens on {opened:.0%} of held-out forget samples only. Where it is shut nothing is forgotten: "
            "what is to stay is too like what is to go. Method alter acts everywhere, on all else too."
        )
    if metrics["stopped"] == "all steps done":
        train = metrics["config"]["train"]
        drawn = metrics["steps"] * train["batch_size"]
        forget = samples.get("forget", 0)
        told = []
        if train["stop_ratio"] > 1e-6:  # plain texts go on however little is left
            told.append("All steps were done before the forget probe reached its target: allow more of them.")
        if drawn < forget:
            told.append(f"{drawn} of the {forget} forget samples were seen.")
        found += [" ".join(told)] if told else []
    if 2 * samples.get("retain", 0) < samples.get("retain_given", 0):
        found.append(
            f"{samples['retain']} of the {samples['retain_given']} samples of what must stay were used: more of them "
            "(--retain-samples) take longer and guard more."
        )
    if not metrics.get("held_out", True) and "forget_held_out" in metrics["after"]:
        found.append(
            "Forget held out is asked what was trained on, since the data have no paraphrased_question: it says "
            "nothing about the same facts asked in other words."
        )
    if not metrics.get("measured", True):
        found.append(
            "There are no figures: measuring was stopped or is not done. python -m alter_demo compare asks the run."
        )
    return found
