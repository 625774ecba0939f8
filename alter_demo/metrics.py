"""What was forgotten, what was kept. Names and definitions follow TOFU and open-unlearning."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer
from scipy import stats
from sklearn.metrics import roc_auc_score

from .errors import Diverged, UserError

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
MIN_K = 0.4  # share of the least likely tokens that Min-K% looks at


def rouge(answer: str, reference: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 with stemming (TOFU reports the first, MUSE the second); 0 for an empty answer."""
    score = SCORER.score(reference, answer)["rougeL"]
    return score.recall, score.fmeasure


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L recall: the share of the reference's words that the answer holds in order."""
    return rouge(answer, reference)[0]


def repetition(text: str, n: int = 4) -> float:
    """Share of word n-grams that stood in the text before; 0 for texts shorter than n + 1 words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def truth_ratio(log_p_paraphrase: float, log_p_perturbed: Sequence[float]) -> float:
    """R = exp(mean log P of the wrong answers) / P(paraphrased right answer); all mean log-probabilities a token.

    TOFU, section 2.2.2: normalised by length, geometric mean over the wrong answers.
    """
    return math.exp(min(float(np.mean(log_p_perturbed)) - log_p_paraphrase, 700.0))  # beyond it: overflow


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of min(R, 1/R): 1 where right and wrong are equally likely."""
    return float(np.mean([min(r, 1 / r) if r > 0 else 0.0 for r in ratios]))


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of max(0, 1 - R): 1 where only the right answer is likely."""
    return float(np.mean([max(0.0, 1 - r) for r in ratios]))


def forget_quality(ratios: Sequence[float], retain_model_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between the items' truth ratios and the retain model's.

    Raises:
        UserError: fewer than two values on a side, or one of the retain model's that is not a number.
        Diverged: one of the unlearned model's that is not.
    """
    if min(len(ratios), len(retain_model_ratios)) < 2 or not np.isfinite(retain_model_ratios).all():
        raise UserError("Forget quality needs at least two truth ratios on each side, all of them numbers.")
    if not np.isfinite(ratios).all():
        raise Diverged
    return float(stats.ks_2samp(ratios, retain_model_ratios).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean; 0 as soon as one value is 0."""
    return float(stats.hmean(values)) if len(values) and min(values) > 0 else 0.0


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """P / (P + sum of P_wrong): how TOFU counts real authors and world facts, where the right words vary."""
    return right / (right + float(np.sum(wrong)))


# ------------------------------------------------------------------------------------------------ what is memorised


def exact_memorization(hits: Sequence[bool]) -> float:
    """Share of answer tokens, end of turn left out, that are the likeliest one given the true tokens before."""
    return float(np.mean(hits)) if len(hits) else 0.0


def extraction_strength(hits: Sequence[bool]) -> float:
    """1 - k/n: k the shortest true beginning after which every token that follows is the likeliest (Carlini 2021)."""
    wrong = [i for i, hit in enumerate(hits) if not hit]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(hits) if len(hits) else 0.0


# ------------------------------------------------------------------------------------------- membership inference
# Each score is low for text that was trained on, as a loss is.


def mia_zlib(log_p: Sequence[float], text: str) -> float:
    """Loss of the answer over the length of its compressed form (Carlini 2021)."""
    return -float(np.mean(log_p)) / len(zlib.compress(text.encode()))


def min_k(scores: Sequence[float], k: float = MIN_K) -> float:
    """Minus the mean of the lowest share k: of log-probabilities, Min-K%; of standardised ones, Min-K%++."""
    if not len(scores):
        return 0.0
    n = max(1, int(len(scores) * k))
    return -float(np.mean(np.sort(scores)[:n]))


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """How well a score tells members from others: 1 if every member's is lower, 0.5 if it says nothing."""
    if not np.isfinite([*members, *others]).all():
        raise Diverged
    labels = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(labels, [-x for x in (*members, *others)]))


def privleak(auc_model: float, auc_retain_model: float) -> float:
    """100 * ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) (MUSE): 0 is a model that never saw the members."""
    other = max(1 - auc_retain_model, 1e-9)
    return 100 * ((1 - auc_model) - other) / other


def asg(scores: dict[str, float], retain_model_scores: dict[str, float]) -> float:
    """Average similarity gap: mean distance of the similarity scores (BLEU, ROUGE-L) to the retain model's, times 100.

    Raises:
        UserError: the two do not hold the same scores.
    """
    if scores.keys() != retain_model_scores.keys() or not scores:
        raise UserError("ASG compares the same scores of two models.")
    return 100 * float(np.mean([abs(scores[k] - retain_model_scores[k]) for k in scores]))


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 with add-one smoothing, 0 to 1, over words in lower case."""
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    said, right = ([t.lower().split() for t in texts] for texts in (answers, references))
    if not any(said):
        return 0.0
    return float(corpus_bleu([[r] for r in right], said, smoothing_function=SmoothingFunction().method2))
