"""Logs as files: ours and open-unlearning's, and reading of TOFU's own.

The shape is open-unlearning's, `{"metric": {"agg_value": ..., "value_by_index": {...}}}`.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import UserError
from ..files import write_json
from .summary import MEMORIZATION, MIA, NORMALISED, PREFIX, Log, mean_truth_ratio, truth_ratios

# column of a data frame -> (metric in the file, key of an example's value), as in open-unlearning
COLUMNS = {
    "avg_gt_loss": ("Q_A_Prob", "avg_loss"),
    "rougeL_recall": ("Q_A_ROUGE", "rougeL_recall"),
    "rougeL_f1": ("Q_A_ROUGE", "rougeL_f1"),
    "question": ("Q_A_ROUGE", "input"),
    "answer": ("Q_A_ROUGE", "ground_truth"),
    "generated_text": ("Q_A_ROUGE", "generation"),
    "avg_fluency_loss": ("Q_A_Fluency", "avg_loss"),
    "avg_paraphrased_loss": ("Q_A_PARA_Prob", "avg_loss"),
    "average_perturb_loss": ("Q_A_PERT_Prob", "avg_loss"),
    **{name: (name, "score") for name in (*MEMORIZATION, *MIA)},
}
TEXT_COLUMNS = ("question", "answer", "generated_text")  # all others are numbers
GROUPS = ("forget", "forget_held_out", "holdout", "retain", "neighbours", "general", *NORMALISED)
TOFU_PARTS = {  # TOFU's logs: one file with a part per group
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}
TOFU_COLUMNS = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")


def write_log(log: Log, path: Path) -> None:
    """Write a log as JSON. Raises UserError if the file cannot be written."""
    write_json(path, to_open_unlearning(log))


def to_open_unlearning(log: Log) -> dict:
    """A log in open-unlearning's shape."""
    data: dict[str, dict] = {}
    for group, rows in log.items():
        for column in (c for c in COLUMNS if c in rows):
            metric, key = COLUMNS[column]
            empty = {"agg_value": None, "value_by_index": {}}
            entry = data.setdefault(metric_name(group, metric), empty)
            for index, value in enumerate(rows[column].tolist()):
                item = entry["value_by_index"].setdefault(str(index), {})
                item[key] = value
                if key == "avg_loss":
                    item["prob"] = np.exp(-np.asarray(value)).tolist()
            if key in ("score", "rougeL_recall"):
                entry["agg_value"] = float(np.mean(rows[column]))
            elif key == "avg_loss" and metric != "Q_A_PERT_Prob":
                entry["agg_value"] = float(np.mean(np.exp(-rows[column])))
        if ratios := truth_ratios(rows):
            data[f"{PREFIX.get(group, group)}_Truth_Ratio"] = {
                "agg_value": mean_truth_ratio(group, ratios),
                "value_by_index": {str(i): {"score": r} for i, r in enumerate(ratios)},
            }
    return data


def metric_name(group: str, metric: str) -> str:
    """The name of a group's metric; metrics such as extraction_strength are on forget."""
    unnamed = group == "forget" and not metric.startswith("Q_A")
    return metric if unnamed else f"{PREFIX.get(group, group)}_{metric}"


def read_log(path: Path | str) -> Log:
    """A log from a file of ours, of open-unlearning or of TOFU.

    Raises UserError if there is no such file, or it has another shape or missing numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Log {path} not found.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not data:
            raise TypeError("it must be an object with one entry per metric")
        groups = from_tofu(data) if set(data) & set(TOFU_PARTS) else from_open_unlearning(data)
        log = {group: to_frame(columns, path, group) for group, columns in groups.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{path.name} is not a complete JSON file. It may be cut short.") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = "TOFU, open-unlearning or this package"
        raise UserError(f"{path.name} is not an evaluation log of {known} ({error}).") from None
    if not log:
        raise UserError(f"{path.name} has no examples of any known group.")
    return log


def from_tofu(data: dict) -> dict[str, dict]:
    """The columns of each group of a TOFU log."""
    groups = {}
    for part, group in TOFU_PARTS.items():
        if part in data:
            groups[group] = {column: data[part][column] for column in TOFU_COLUMNS}
            texts = data[part].get("generated_text", {})  # [prompt, answer, right answer] each
            if texts.keys() == groups[group]["rougeL_recall"].keys():
                groups[group]["generated_text"] = {i: text[1] for i, text in texts.items()}
    return groups


def from_open_unlearning(data: dict) -> dict[str, dict]:
    """The columns of each group of a log of ours or of open-unlearning."""
    groups: dict[str, dict] = {}
    for group, (column, (metric, key)) in product(GROUPS, COLUMNS.items()):
        entry = data.get(metric_name(group, metric))
        # open-unlearning keeps both groups of a membership inference in one entry
        shared = data.get(metric) if metric in MIA else None
        if group in ("forget", "holdout") and "auc" in (shared or ()):
            entry = shared.get(group)
        items = (entry or {}).get("value_by_index")
        if items and all(key in item for item in items.values()):
            groups.setdefault(group, {})[column] = {i: item[key] for i, item in items.items()}
    return groups


def to_frame(columns: dict[str, dict], path: Path, group: str) -> pd.DataFrame:
    """A data frame from columns {index: value} with the same indices and finite values."""
    first = next(iter(columns.values()))
    if any(values.keys() != first.keys() for values in columns.values()):
        sizes = ", ".join(f"{name} has {len(values)}" for name, values in columns.items())
        raise UserError(f"The metrics of group {group} must have the same examples: {sizes}.")
    rows = pd.DataFrame({name: [v[i] for i in first] for name, v in columns.items()})
    for column in (c for c in rows if c not in TEXT_COLUMNS):
        values = [x for v in rows[column] for x in (v if isinstance(v, list) else [v])]
        numbers = all(isinstance(x, int | float) for x in values)
        if not numbers or not np.isfinite(np.asarray(values, float)).all():
            problem = f"{column} is missing or not a number for some examples"
            raise UserError(f"{path.name}, {group}: {problem}.")
    return rows
