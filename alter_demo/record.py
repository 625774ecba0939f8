"""The record of a run: what metrics.json, answers.json and the logs hold."""

import json
import platform
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

from .alter.config import AlterConfig
from .alter.frozen import PhaseOneResult
from .config import PARTS, EvaluationConfig, UnlearnConfig
from .data.schema import ForgetSet
from .errors import UserError
from .evaluation.logs import to_open_unlearning
from .evaluation.summary import Log, group_figures, group_intervals, summary
from .files import ASSETS, cache_dir, write_json
from .models.loading import LM

PACKAGES = ("torch", "transformers", "peft", "accelerate", "scikit-learn")

# TrainingConfig fields of 0.1 that have new names
RENAMED = {
    "beta": "forget_weight", "gamma": "retain_weight", "structure": "structure_weight",
    "refusal": "refusal_weight", "forgetting": "forget_loss", "retention": "retain_loss",
    "sharpness": "npo_beta", "steering": "steering_coefficient", "eta": "elm_eta",
    "forget_end": "forget_end_of_turn", "stop_truth": "stop_truth_ratio",
}  # fmt: skip


def run_record(
    lm: LM, forget_set: ForgetSet, config: UnlearnConfig, phase_one: PhaseOneResult, rule
) -> dict:
    """metrics.json without seconds, memory and figures. `rule`: the StoppingRule of phase two."""
    groups = measured_groups(forget_set, config.evaluation)
    taught, held_out = (
        {e.question for e in examples}
        for examples in (forget_set.training_examples, groups.get("forget_held_out", ()))
    )
    return {
        **group_metrics({}),
        "config": asdict(config) | {"alter": plain_values(phase_one.alter)},
        "seed": config.training.seed,
        "data": {"forget_set": forget_set.name, **{k: len(v) for k, v in groups.items()}},
        "measured": False,
        "held_out": not held_out or not held_out <= taught,  # False: all are asked as trained
        "model": lm.name,
        "dtype": lm.dtype,
        "load_in_4bit": lm.load_in_4bit,
        "adapter": lm.adapter and portable_path(Path(lm.adapter)),
        "phase_one": phase_one.report,
        "stopped": rule.reason,
        "steps": rule.history[-1]["step"],
        "history": rule.history,
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "hardware": lm.hardware,
        "date": time.strftime("%Y-%m-%d"),
    }


def measured_groups(forget_set: ForgetSet, evaluation: EvaluationConfig) -> dict[str, list]:
    """The groups of examples that `Run.evaluate` measures."""
    groups = forget_set.with_eval_limits(evaluation.limit, evaluation.kept).evaluation_groups()
    names = groups if evaluation.groups is None else evaluation.groups
    return {k: v for k, v in groups.items() if k in names}


def group_metrics(logs: dict[str, Log]) -> dict:
    """`before` and `after`: means of each group, and the summary under the field's names.

    `intervals` has the 95 % intervals of the means, as {side: {group: {figure: [low, high]}}}.
    """
    result = {"before": {}, "after": {}, "intervals": {"before": {}, "after": {}}}
    for side in ("before", "after"):
        for group, rows in logs.get(side, {}).items():
            own = group, rows, logs["before"][group]
            result[side][group] = group_figures(*own)
            result["intervals"][side][group] = group_intervals(*own)
        if side in logs:
            result[side]["summary"] = summary(logs[side], logs.get("retain model"))
    if "retain model" in logs:
        rows = logs["retain model"].items()
        result["retain_model"] = {group: group_figures(group, own) for group, own in rows}
    return result


def answers_before_and_after(logs: dict[str, Log]) -> list[dict]:
    """Rows of group, question, answer, before, after."""
    rows = []
    for group, before in logs.get("before", {}).items():
        if "generated_text" in before:
            table = before[["question", "answer", "generated_text"]]
            table = table.rename(columns={"generated_text": "before"})
            table.insert(0, "group", group)
            after = logs["after"][group]["generated_text"]
            rows += table.assign(after=after).to_dict("records")
    return rows


def write_record(metrics: dict, logs: dict[str, Log], folder: Path) -> None:
    """Logs, answers and metrics; metrics.json last, and each file at once."""
    for side, log in logs.items():
        path = folder / f"log_{side.replace(' ', '_')}.json"
        write_json(path, to_open_unlearning(log), indent=None)
    write_json(folder / "answers.json", answers_before_and_after(logs))
    write_json(folder / "metrics.json", metrics)


def read_metrics(folder: Path) -> dict:
    """metrics.json of a run; a run of 0.1 is read under the new names.

    Raises:
        UserError: no such run, or a damaged file.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: metrics.json is missing.")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics["model"], str):
            raise TypeError
        if not isinstance(metrics.get("adapter"), str | None):
            raise TypeError
        if "config" in metrics:
            metrics["config"] = upgrade_config(metrics["config"])
        return metrics
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged. Run it again.") from None


def upgrade_config(config: dict) -> dict:
    """The config of a run of 0.1, which had the parts "unlearn" and "train", in today's form."""
    if "unlearn" not in config:
        return config
    old = config["unlearn"]
    parts = {
        part: {f.name: old[f.name] for f in fields(cls) if f.name in old}
        for part, cls in PARTS.items()
        if part != "training"
    }
    training = {RENAMED.get(k, k): v for k, v in config["train"].items() if k != "save_steps"}
    return {"method": old["method"], **parts, "training": training, "alter": config["alter"]}


def plain_values(alter: AlterConfig | None) -> dict:
    """The values of an AlterConfig that JSON knows."""
    values = {} if alter is None else {f.name: getattr(alter, f.name) for f in fields(AlterConfig)}
    return {k: v for k, v in values.items() if isinstance(v, str | int | float)}


# --------------------------------------------------------------------- adapters by portable name


def named_folders() -> dict[str, Path]:
    """Folders that other machines have too, by name."""
    return {"assets": ASSETS.resolve(), "cache": cache_dir().resolve()}


def portable_path(adapter: Path) -> str:
    """How a record names an adapter: `assets:...` and `cache:...` hold on any machine."""
    adapter = adapter.resolve()
    for name, folder in named_folders().items():
        if adapter.is_relative_to(folder):
            return f"{name}:{adapter.relative_to(folder).as_posix()}"
    return str(adapter)


def local_path(adapter: str | None) -> str | None:
    """The folder that `portable_path` has named."""
    name, _, rest = (adapter or "").partition(":")
    return str(named_folders()[name] / rest) if name in named_folders() else adapter
