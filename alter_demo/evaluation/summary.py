"""From a log to figures: means per group, and a flat summary under open-unlearning's names.

A `Log` has a data frame per group of examples (forget, retain, ...) with one row per example.
`measure.py` fills it, `logs.py` writes and reads it.
"""

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from ..errors import UserError
from . import metrics

Log = dict[str, pd.DataFrame]

FORGOTTEN = ("forget", "forget_held_out", "holdout")  # all other groups are to be kept
NORMALISED = ("real_authors", "world_facts")  # probability relative to that of wrong answers
PREFIX = {"real_authors": "ra", "world_facts": "wf"}
MIA = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
MEMORIZATION = ("exact_memorization", "extraction_strength")
UTILITY = ("probability", "rouge_l", "truth_ratio")  # the figures that model utility averages
FEW, RESAMPLES = 200, 2000  # a mean of fewer examples gets a bootstrap interval
FORGET_QUALITY = {"forget": "forget_quality", "forget_held_out": "forget_quality_held_out"}


def probabilities(group: str, rows: pd.DataFrame) -> list[float]:
    """Probability of each right answer, among the wrong ones where it is NORMALISED."""
    p = np.exp(-rows["avg_gt_loss"].to_numpy(float))
    if group not in NORMALISED or "average_perturb_loss" not in rows:
        return p.tolist()
    wrong = (np.exp(-np.asarray(losses, float)) for losses in rows["average_perturb_loss"])
    return [metrics.normalised_probability(*pair) for pair in zip(p, wrong, strict=True)]


def truth_ratios(rows: pd.DataFrame) -> list[float]:
    """Truth ratio of each example, [] if there are no wrong answers."""
    right = rows.get("avg_paraphrased_loss", rows.get("avg_gt_loss"))  # the answer as a fallback
    if right is None or "average_perturb_loss" not in rows:
        return []
    pairs = zip(right, rows["average_perturb_loss"], strict=True)
    return [metrics.truth_ratio(-loss, [-x for x in wrong]) for loss, wrong in pairs]


def mean_truth_ratio(group: str, ratios: list[float]) -> float:
    """The truth ratio of a group: higher is better on both kinds of groups."""
    mean = metrics.forget_truth_ratio if group in FORGOTTEN else metrics.retain_truth_ratio
    return mean(ratios)


def interval(values, seed: int = 0) -> list[float] | None:
    """95 % bootstrap interval of the mean of fewer than 200 values; None for more or for one."""
    values = np.asarray(values, float)
    if not 1 < len(values) < FEW:
        return None
    options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": seed}
    return np.round(bootstrap([values], np.mean, **options).confidence_interval, 6).tolist()


def group_columns(
    group: str, rows: pd.DataFrame, before: pd.DataFrame | None = None
) -> dict[str, list[float]]:
    """The values of every example of a group that `group_figures` averages."""
    columns = {"probability": probabilities(group, rows)} if "avg_gt_loss" in rows else {}
    columns |= {name: rows[name] for name in MEMORIZATION if name in rows}
    if "rougeL_recall" in rows:
        columns["rouge_l"] = rows["rougeL_recall"]
    if "generated_text" in rows:
        answers = rows["generated_text"]
        columns["repetition"] = [metrics.repetition(answer) for answer in answers]
        if before is not None:
            pairs = zip(answers, before["generated_text"], strict=True)
            columns["rouge_l_to_base"] = [metrics.rouge_l(a, b) for a, b in pairs]
    return columns


def group_intervals(group: str, rows: pd.DataFrame, before: pd.DataFrame | None = None) -> dict:
    """{figure: [low, high]} of `interval`, for the means of `group_figures`."""
    columns = group_columns(group, rows, before)
    return {name: own for name, values in columns.items() if (own := interval(values))}


def group_figures(
    group: str, rows: pd.DataFrame, before: pd.DataFrame | None = None, rounded: bool = True
) -> dict[str, float]:
    """Means over one group of what was measured; `before`: its rows of the base model."""
    columns = group_columns(group, rows, before)
    figures = {name: float(np.mean(values)) for name, values in columns.items()}
    if "avg_fluency_loss" in rows:
        figures["perplexity"] = float(np.exp(rows["avg_fluency_loss"].mean()))
    if ratios := truth_ratios(rows):
        figures["truth_ratio"] = mean_truth_ratio(group, ratios)
    return {name: round(value, 6) for name, value in figures.items()} if rounded else figures


def summary(log: Log, retain_log: Log | None = None) -> dict[str, float]:
    """The figures of a log under open-unlearning's names.

    Forget quality and privacy leakage need the log of the retain model. Raises UserError if both
    logs have different examples.
    """
    figures = {group: group_figures(group, rows, rounded=False) for group, rows in log.items()}
    flat: dict[str, float] = {}
    for group, own in figures.items():
        names = {
            "probability": "Q_A_Prob_normalised" if group in NORMALISED else "Q_A_Prob",
            "rouge_l": "Q_A_ROUGE",
            "truth_ratio": "truth_ratio" if group in FORGOTTEN else "Truth_Ratio",
        }
        prefix = PREFIX.get(group, group)
        flat |= {f"{prefix}_{name}": own[key] for key, name in names.items() if key in own}
    if (utility := model_utility(figures)) is not None:
        flat["model_utility"] = utility
    if "forget" not in log:
        return flat
    forget = figures["forget"]
    flat |= {name: forget[name] for name in MEMORIZATION if name in forget}
    flat |= {f"forget_{key}": forget[key] for key in ("repetition", "perplexity") if key in forget}
    for name in MIA:
        if name in log["forget"] and name in log.get("holdout", ()):
            flat[name] = metrics.auc(log["forget"][name], log["holdout"][name])
    if retain_log is not None:
        flat |= compare_with_retain_model(flat, log, retain_log)
    return flat


def model_utility(figures: dict[str, dict[str, float]]) -> float | None:
    """Harmonic mean of the UTILITY of all kept groups, None if a part was not measured.

    With TOFU's groups these are its nine values. `neighbours` only paraphrase `retain`.
    """
    skipped = (*FORGOTTEN, "neighbours") if "retain" in figures else FORGOTTEN
    kept = [own for group, own in figures.items() if group not in skipped]
    if {"retain", *NORMALISED} <= set(figures):
        kept = [figures[group] for group in ("retain", *NORMALISED)]
    if not all({"probability", "rouge_l"} <= set(own) for own in kept):
        return None
    values = [own[name] for own in kept for name in UTILITY if name in own]
    return metrics.model_utility(values) if values else None


def compare_with_retain_model(flat: dict, log: Log, retain_log: Log) -> dict[str, float]:
    """Forget quality and privacy leakage."""
    figures = {}
    for group in (g for g in FORGET_QUALITY if g in log):
        if group not in retain_log:
            raise UserError(
                f"The retain model's log has no {group} part. Evaluate that model on the forget "
                "set too."
            )
        own, other = log[group], retain_log[group]
        if len(own) != len(other):
            raise UserError(
                f"Both logs need the same questions, got {len(own)} in the {group} part and "
                f"{len(other)} in the retain model's."
            )
        if all(ratios := (truth_ratios(own), truth_ratios(other))):
            figures[FORGET_QUALITY[group]] = metrics.forget_quality(*ratios)
    groups = ("forget", "holdout")
    if "mia_min_k" in flat and all("mia_min_k" in retain_log.get(g, ()) for g in groups):
        retain_auc = metrics.auc(*(retain_log[g]["mia_min_k"] for g in groups))
        figures["privleak"] = metrics.privleak(flat["mia_min_k"], retain_auc)
    return figures
