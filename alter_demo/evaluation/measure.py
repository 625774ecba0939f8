"""Measuring a model on groups of examples: the part of an evaluation that runs the model."""

from itertools import islice

import numpy as np
import pandas as pd

from ..data.schema import Example
from ..models.generation import greedy
from ..models.loading import LM
from ..models.scoring import AnswerScores, answer_scores
from . import metrics
from .summary import FORGOTTEN, Log


def evaluate_groups(
    lm: LM, model, groups: dict[str, list[Example]], tokens: int = 64, on_stage=None
) -> Log:
    """Score the right answers of all groups and generate the model's own, up to `tokens` long.

    Calls `on_stage` as `Callback.on_stage`. Returns a data frame per group, one row per example.
    Plain texts are left out. `holdout`, for membership inference only, has no generated answers.
    """
    log = {}
    for group, all_examples in groups.items():
        examples = [e for e in all_examples if e.question]
        if not examples:
            continue

        def progress(done: int, total: int, stage: str = f"measuring {group}") -> None:
            if on_stage:
                on_stage(stage, done / total)

        progress(0, 1)
        rows = score_group(lm, model, group, examples)
        if group != "holdout":
            answers = greedy(lm, [e.question for e in examples], tokens, model, progress)
            scores = [metrics.rouge(a, e.answer) for a, e in zip(answers, examples, strict=True)]
            rows["generated_text"] = answers
            rows["rougeL_recall"], rows["rougeL_f1"] = zip(*scores, strict=True)
        log[group] = rows
    return log


def score_group(lm: LM, model, group: str, examples: list[Example]) -> pd.DataFrame:
    """The rows of a group without generated answers."""
    n, pairs = len(examples), [(e.question, e.answer) for e in examples]
    has_ratio = all(e.perturbed_answer for e in examples)
    for e in examples if has_ratio else ():
        others = e.paraphrased_answer or e.answer, *e.perturbed_answer  # right, then wrong ones
        pairs += [(e.question, other) for other in others]
    questions, answers = map(list, zip(*pairs, strict=True))
    full = [i < n for i in range(len(pairs))]  # of the others, only log_p is used
    all_scores = answer_scores(lm, questions, answers, model, full)
    scores = all_scores[:n]
    rows = pd.DataFrame({"question": questions[:n], "answer": answers[:n]})
    rows["avg_gt_loss"] = [mean_loss(s) for s in scores]
    # the end of turn comes last and does not count
    rows["exact_memorization"] = [metrics.exact_memorization(s.hits[:-1]) for s in scores]
    rows["extraction_strength"] = [metrics.extraction_strength(s.hits[:-1]) for s in scores]
    if group in FORGOTTEN:
        texts = zip(scores, answers[:n], strict=True)
        rows["mia_loss"] = rows["avg_gt_loss"]
        rows["mia_zlib"] = [metrics.mia_zlib(s.log_p, text) for s, text in texts]
        rows["mia_min_k"] = [metrics.min_k(s.log_p[:-1]) for s in scores]
        rows["mia_min_k_plus_plus"] = [metrics.min_k(s.z[:-1]) for s in scores]
    if has_ratio:
        losses = map(mean_loss, all_scores[n:])
        by_example = [list(islice(losses, 1 + len(e.perturbed_answer))) for e in examples]
        rows["avg_paraphrased_loss"] = [right for right, *_ in by_example]
        rows["average_perturb_loss"] = [wrong for _, *wrong in by_example]
    return rows


def mean_loss(scores: AnswerScores) -> float:
    return -float(np.mean(scores.log_p))


def add_fluency(lm: LM, base_model, log: Log) -> None:
    """Add the base model's loss on the generated forget answers: fluency without a paid judge."""
    for group, rows in log.items():
        if group in FORGOTTEN and "generated_text" in rows:
            questions, answers = rows["question"].tolist(), rows["generated_text"].tolist()
            scores = answer_scores(lm, questions, answers, base_model, full=False)
            rows["avg_fluency_loss"] = [mean_loss(s) for s in scores]
