"""What a model says and memorises, item by item, and the figures that follow from it.

A log is a data frame for each group of items (forget, retain, ...), one row an item. It is written and read in
open-unlearning's shape, `{"metric": {"agg_value": ..., "value_by_index": {...}}}`, and read from TOFU's own logs too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from . import metrics
from .answers import answer_scores, greedy
from .data import Item
from .errors import UserError
from .results import write_json

Log = dict[str, pd.DataFrame]
FORGOTTEN = ("forget", "forget_held_out", "holdout")  # all other groups are to be kept
NORMALISED = ("real_authors", "world_facts")  # probability beside that of wrong answers
MIA = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
PREFIX = {"real_authors": "ra", "world_facts": "wf"}
# column of a frame -> (metric's name, key of an item's value), as in open-unlearning
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
    **{name: (name, "score") for name in ("exact_memorization", "extraction_strength", *MIA)},
}
# TOFU's logs: one file, a part for each group
TOFU_PARTS = {
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "real_authors",
    "eval_real_world_wo_options.json": "world_facts",
    "eval_log_forget.json": "forget",
}


# ------------------------------------------------------------------------------------------------------ measuring


def evaluate(lm, model, groups: dict[str, list[Item]], tokens: int = 64, stage=None) -> Log:
    """Ask `model` (adapted or not) everything in `groups`.

    Args:
        tokens: length of a greedy answer at most.
        stage: called with what is being done and its share done.
    Returns:
        A frame for each group, in the order of its items; `holdout` (never taught) has no generated text.
    """
    stage = stage or (lambda what, share: None)
    log = {}
    for group, items in groups.items():
        items = [i for i in items if i.question]
        if not items:
            continue
        stage(f"measuring {group}", 0.0)
        questions, answers = [i.question for i in items], [i.answer for i in items]
        rows = pd.DataFrame({"question": questions, "answer": answers})
        # TOFU's truth ratio: the paraphrased answer where there is one, else the answer itself, beside wrong ones
        compared = all(i.perturbed_answer for i in items)
        others = [[i.paraphrased_answer or i.answer, *i.perturbed_answer] if compared else [] for i in items]
        asked = questions + [q for q, own in zip(questions, others, strict=True) for _ in own]
        full = [True] * len(items) + [False] * (len(asked) - len(items))
        scores = answer_scores(lm, asked, answers + [a for own in others for a in own], model, full)
        scores, rest = scores[: len(items)], iter(scores[len(items) :])
        rows["avg_gt_loss"] = [-float(np.mean(s.log_p)) for s in scores]
        rows["exact_memorization"] = [metrics.exact_memorization(s.hits[:-1]) for s in scores]
        rows["extraction_strength"] = [metrics.extraction_strength(s.hits[:-1]) for s in scores]
        if group in FORGOTTEN:
            rows["mia_loss"] = rows["avg_gt_loss"]
            rows["mia_zlib"] = [metrics.mia_zlib(s.log_p, a) for s, a in zip(scores, answers, strict=True)]
            rows["mia_min_k"] = [metrics.min_k(s.log_p[:-1]) for s in scores]  # without the end of turn
            rows["mia_min_k_plus_plus"] = [metrics.min_k(s.z[:-1]) for s in scores]
        if group != "holdout":
            said = greedy(lm, questions, tokens, model, lambda a, b, g=group: stage(f"measuring {g}", a / b))
            rows["generated_text"] = said
            both = [metrics.rouge(a, i.answer) for a, i in zip(said, items, strict=True)]
            rows["rougeL_recall"], rows["rougeL_f1"] = zip(*both, strict=True)
        if compared:
            losses = [[-float(np.mean(next(rest).log_p)) for _ in own] for own in others]
            rows["avg_paraphrased_loss"] = [own[0] for own in losses]
            rows["average_perturb_loss"] = [own[1:] for own in losses]
        log[group] = rows
    return log


def add_fluency(lm, untouched, log: Log) -> None:
    """How likely the forget answers that were given are under the untouched model: fluency without a paid judge."""
    for group, rows in log.items():
        if group in FORGOTTEN and "generated_text" in rows:
            scores = answer_scores(
                lm, rows["question"].tolist(), rows["generated_text"].tolist(), untouched, full=False
            )
            rows["avg_fluency_loss"] = [-float(np.mean(s.log_p)) for s in scores]


def truth_ratios(rows: pd.DataFrame) -> list[float]:
    """R of each item (TOFU, Eq. 1), [] where there are no wrong answers."""
    right = next((c for c in ("avg_paraphrased_loss", "avg_gt_loss") if c in rows), None)
    if right is None or "average_perturb_loss" not in rows:
        return []
    pairs = zip(rows[right], rows["average_perturb_loss"], strict=True)
    return [metrics.truth_ratio(-right, [-x for x in wrong]) for right, wrong in pairs]


def probabilities(group: str, rows: pd.DataFrame) -> list[float]:
    if "avg_gt_loss" not in rows:
        return []
    p = np.exp(-rows["avg_gt_loss"].to_numpy(float))
    if group not in NORMALISED or "average_perturb_loss" not in rows:
        return p.tolist()
    wrong = (np.exp(-np.asarray(w, float)) for w in rows["average_perturb_loss"])
    return [metrics.normalised_probability(right, w) for right, w in zip(p, wrong, strict=True)]


def group_figures(group: str, rows: pd.DataFrame, before: pd.DataFrame | None = None) -> dict[str, float]:
    """Means over one group; `before` adds ROUGE-L to the answers in it."""
    figures = {"probability": probabilities(group, rows)}
    figures |= {k: rows[k] for k in ("exact_memorization", "extraction_strength") if k in rows}
    if "generated_text" in rows:
        said = rows["generated_text"]
        figures["rouge_l"] = rows["rougeL_recall"]
        figures["repetition"] = [metrics.repetition(a) for a in said]
        if before is not None:
            pairs = zip(said, before["generated_text"], strict=True)
            figures["rouge_l_to_base"] = [metrics.rouge_l(a, b) for a, b in pairs]
    figures = {k: round(float(np.mean(v)), 6) for k, v in figures.items()}
    if "avg_fluency_loss" in rows:
        figures["perplexity"] = round(float(np.exp(rows["avg_fluency_loss"].mean())), 6)
    if ratios := truth_ratios(rows):
        aggregate = metrics.forget_truth_ratio if group in FORGOTTEN else metrics.retain_truth_ratio
        figures["truth_ratio"] = round(aggregate(ratios), 6)
    return figures


def model_utility(log: Log) -> float | None:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio of all groups that are to be kept; TOFU's nine
    where the groups are TOFU's (`neighbours`, the retained questions asked differently, stand in the logs beside)."""
    kept = [g for g in log if g not in FORGOTTEN and not (g == "neighbours" and "retain" in log)]
    if {"retain", *NORMALISED} <= set(kept):
        kept = ["retain", *NORMALISED]
    values = []
    for rows, group in ((log[g], g) for g in kept):
        if not {"avg_gt_loss", "rougeL_recall"} <= set(rows):
            return None  # a log of some of the parts
        values += [float(np.mean(probabilities(group, rows))), float(np.mean(rows["rougeL_recall"]))]
        if ratios := truth_ratios(rows):
            values.append(metrics.retain_truth_ratio(ratios))
    return metrics.model_utility(values) if values else None


def summary(log: Log, retain_log: Log | None = None) -> dict[str, float]:
    """The flat figures of a log under open-unlearning's names.

    Args:
        retain_log: of the retain-only model, for forget quality and privacy leakage.
    Raises:
        UserError: the two logs hold different items.
    """
    flat: dict[str, float] = {}
    for group, rows in log.items():
        prefix = PREFIX.get(group, group)
        suffix = "_normalised" if group in NORMALISED else ""
        if p := probabilities(group, rows):
            flat[f"{prefix}_Q_A_Prob{suffix}"] = float(np.mean(p))
        if "rougeL_recall" in rows:
            flat[f"{prefix}_Q_A_ROUGE"] = float(np.mean(rows["rougeL_recall"]))
        if ratios := truth_ratios(rows):
            forgotten = group in FORGOTTEN
            name = f"{prefix}_truth_ratio" if forgotten else f"{prefix}_Truth_Ratio"
            aggregate = metrics.forget_truth_ratio if forgotten else metrics.retain_truth_ratio
            flat[name] = aggregate(ratios)
    utility = model_utility(log)
    if utility is not None:
        flat["model_utility"] = utility
    if "forget" not in log:
        return flat
    forget = log["forget"]
    for name in ("exact_memorization", "extraction_strength"):
        if name in forget:
            flat[name] = float(np.mean(forget[name]))
    if "generated_text" in forget:
        flat["forget_repetition"] = float(np.mean([metrics.repetition(t) for t in forget["generated_text"]]))
    if "avg_fluency_loss" in forget:
        flat["forget_perplexity"] = float(np.exp(forget["avg_fluency_loss"].mean()))
    for name in MIA:
        if name in forget and name in log.get("holdout", ()):
            flat[name] = metrics.auc(forget[name], log["holdout"][name])
    if retain_log is not None:
        flat |= against_retain_model(flat, log, retain_log)
    return flat


def against_retain_model(flat: dict, log: Log, retain_log: Log) -> dict[str, float]:
    found = {}
    for group in ("forget", "forget_held_out"):
        if group not in log:
            continue
        if group not in retain_log:
            raise UserError("The retain model's log has no forget part: evaluate that model on the forget set too.")
        ours, theirs = truth_ratios(log[group]), truth_ratios(retain_log[group])
        if len(log[group]) != len(retain_log[group]):
            raise UserError(
                f"The log has {len(log[group])} items in its forget part and the retain model's "
                f"{len(retain_log[group])}: both must have been asked the same questions."
            )
        if ours and theirs:
            name = "forget_quality" if group == "forget" else "forget_quality_held_out"
            found[name] = metrics.forget_quality(ours, theirs)
    if "mia_min_k" in flat and all("mia_min_k" in retain_log.get(g, ()) for g in ("forget", "holdout")):
        theirs = metrics.auc(retain_log["forget"]["mia_min_k"], retain_log["holdout"]["mia_min_k"])
        found["privleak"] = metrics.privleak(flat["mia_min_k"], theirs)
    return found


# ---------------------------------------------------------------------------------------------------------- files


def metric_name(group: str, suffix: str) -> str:
    plain = group == "forget" and not suffix.startswith("Q_A")  # extraction_strength and the like: on forget
    return suffix if plain else f"{PREFIX.get(group, group)}_{suffix}"


def to_field(log: Log) -> dict:
    """A log in open-unlearning's shape."""
    found: dict[str, dict] = {}
    for group, rows in log.items():
        for column, (suffix, key) in COLUMNS.items():
            if column not in rows:
                continue
            entry = found.setdefault(metric_name(group, suffix), {"agg_value": None, "value_by_index": {}})
            for index, value in enumerate(rows[column].tolist()):
                item = entry["value_by_index"].setdefault(str(index), {})
                item[key] = value
                if key == "avg_loss":
                    item["prob"] = np.exp(-np.asarray(value)).tolist()
            if key in ("score", "rougeL_recall"):
                entry["agg_value"] = float(np.mean(rows[column]))
            elif key == "avg_loss" and suffix != "Q_A_PERT_Prob":
                entry["agg_value"] = float(np.mean(np.exp(-rows[column])))
        if ratios := truth_ratios(rows):
            aggregate = metrics.forget_truth_ratio if group in FORGOTTEN else metrics.retain_truth_ratio
            found[f"{PREFIX.get(group, group)}_Truth_Ratio"] = {
                "agg_value": aggregate(ratios),
                "value_by_index": {str(i): {"score": r} for i, r in enumerate(ratios)},
            }
    return found


def write_log(log: Log, path: Path) -> None:
    write_json(path, to_field(log))


def read_log(path: Path | str) -> Log:
    """A log from a file of ours, of open-unlearning, or of TOFU.

    Raises:
        UserError: no such file, cut short, of another shape, without items, unequal numbers of items, not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no log {path}.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise UserError(f"{path.name} is not a whole JSON file: it was cut short or is something else.") from None
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path.name} is not an evaluation log: it should be an object with a part for each metric.")
    try:
        log = from_tofu(data) if set(data) & set(TOFU_PARTS) else from_field(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path.name} is not an evaluation log of TOFU, open-unlearning or ours ({error}).") from None
    if not log:
        raise UserError(f"{path.name} holds no items of any known group.")
    for group, rows in log.items():
        check_numbers(rows, f"{path.name}, {group}")
    return log


def check_numbers(rows: pd.DataFrame, where: str) -> None:
    for column in rows:
        if column in ("question", "answer", "generated_text"):
            continue
        values = [x for v in rows[column] for x in (v if isinstance(v, list) else [v])]
        if not all(isinstance(x, int | float) for x in values) or not np.isfinite(np.asarray(values, float)).all():
            raise UserError(f"{where}: {column} is missing or not a number for some items.")


def frame(columns: dict[str, dict], where: str) -> pd.DataFrame:
    """Columns of index -> value, which must all have the same indices."""
    sizes = {name: len(values) for name, values in columns.items()}
    first = next(iter(columns.values()))
    if any(values.keys() != first.keys() for values in columns.values()):
        raise UserError(f"{where}: unequal items ({', '.join(f'{k} {v}' for k, v in sizes.items())}).")
    return pd.DataFrame({name: [values[i] for i in first] for name, values in columns.items()})


def from_tofu(data: dict) -> Log:
    log = {}
    wanted = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")
    for part, group in TOFU_PARTS.items():
        if part in data:
            columns = {c: data[part][c] for c in wanted}
            said = data[part].get("generated_text", {})
            if said.keys() == columns["rougeL_recall"].keys():
                # [prompt, generated, right answer]
                columns |= {"generated_text": {k: v[1] for k, v in said.items()}}
            log[group] = frame(columns, group)
    return log


def from_field(data: dict) -> Log:
    groups = ("forget", "forget_held_out", "holdout", "retain", "neighbours", "general", *NORMALISED)
    log = {}
    for group in groups:
        columns = {}
        for column, (suffix, key) in COLUMNS.items():
            entry = data.get(metric_name(group, suffix))
            if group in ("forget", "holdout") and suffix in MIA and "auc" in (data.get(suffix) or ()):
                entry = data[suffix].get(group)  # open-unlearning keeps both sides in one entry
            if entry and entry.get("value_by_index") and all(key in item for item in entry["value_by_index"].values()):
                columns[column] = {i: item[key] for i, item in entry["value_by_index"].items()}
        if columns:
            log[group] = frame(columns, group)
    return log
