"""What was forgotten, what was kept. Names and definitions follow TOFU and open-unlearning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer
from scipy import stats

from .errors import UserError

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L recall with stemming: the share of the reference's words that the answer holds in order."""
    return SCORER.score(reference, answer)["rougeL"].recall


def repetition(text: str, n: int = 4) -> float:
    """Share of word n-grams that stood in the text before; 0 for texts shorter than n + 1 words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def truth_ratio(log_p_paraphrase: float, log_p_perturbed: Sequence[float]) -> float:
    """R = exp(mean log P of the wrong answers) / P(paraphrased right answer); all mean log-probabilities a token.

    TOFU, section 2.2.2: normalised by length, geometric mean over the wrong answers.
    """
    return math.exp(float(np.mean(log_p_perturbed)) - log_p_paraphrase)


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of min(R, 1/R): 1 where right and wrong are equally likely."""
    return float(np.mean([min(r, 1 / r) if r > 0 else 0.0 for r in ratios]))


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of max(0, 1 - R): 1 where only the right answer is likely."""
    return float(np.mean([max(0.0, 1 - r) for r in ratios]))


def forget_quality(ratios: Sequence[float], retain_model_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the items' truth ratios and the retain model's.

    Raises:
        UserError: fewer than two values on a side, or a value that is not a number.
    """
    for values in (ratios, retain_model_ratios):
        if len(values) < 2 or not np.isfinite(values).all():
            raise UserError("Forget quality needs at least two truth ratios on each side, all of them numbers.")
    return float(stats.ks_2samp(ratios, retain_model_ratios).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean; 0 as soon as one value is 0."""
    return float(stats.hmean(values)) if len(values) and min(values) > 0 else 0.0
