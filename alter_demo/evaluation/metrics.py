"""The metrics as functions of numbers and strings, defined as in TOFU, MUSE and open-unlearning."""

import math
import zlib
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer
from scipy import stats
from sklearn.metrics import roc_auc_score

from ..errors import Diverged, UserError

SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
MIN_K = 0.4  # share of the least likely tokens in Min-K%


def rouge(answer: str, reference: str) -> tuple[float, float]:
    """ROUGE-L recall and F1 with stemming; TOFU reports the first, MUSE the second."""
    score = SCORER.score(reference, answer)["rougeL"]
    return score.recall, score.fmeasure


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L recall: the share of the reference's words that the answer has, in order."""
    return rouge(answer, reference)[0]


def bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 of lower-case words with add-one smoothing, in [0, 1]."""
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    answers, references = ([t.lower().split() for t in texts] for texts in (answers, references))
    if not any(answers):
        return 0.0
    smoothing = SmoothingFunction().method2
    return float(corpus_bleu([[r] for r in references], answers, smoothing_function=smoothing))


def repetition(text: str, n: int = 4) -> float:
    """Share of word n-grams that occurred before in the text; 0 for fewer than n + 1 words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def truth_ratio(log_p_paraphrase: float, log_p_perturbed: Sequence[float]) -> float:
    """R = exp(mean log P of wrong answers) / P of the paraphrase, per token (TOFU, Eq. 1)."""
    difference = float(np.mean(log_p_perturbed)) - log_p_paraphrase
    return math.exp(min(difference, 700.0))  # exp overflows a little above


def forget_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of min(R, 1/R) (TOFU): 1 if right and wrong answers are equally likely."""
    return float(np.mean([min(r, 1 / r) if r > 0 else 0.0 for r in ratios]))


def retain_truth_ratio(ratios: Sequence[float]) -> float:
    """Mean of max(0, 1 - R) (TOFU): 1 if only the right answer is likely."""
    return float(np.mean([max(0.0, 1 - r) for r in ratios]))


def forget_quality(ratios: Sequence[float], retain_model_ratios: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test on two models' truth ratios (TOFU)."""
    if min(len(ratios), len(retain_model_ratios)) < 2 or not np.isfinite(retain_model_ratios).all():
        raise UserError("Forget quality needs at least two truth ratios per model, all finite.")
    if not np.isfinite(ratios).all():
        raise Diverged
    return float(stats.ks_2samp(ratios, retain_model_ratios).pvalue)


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean (TOFU); 0 if any value is 0."""
    return float(stats.hmean(values)) if len(values) and min(values) > 0 else 0.0


def normalised_probability(right: float, wrong: Sequence[float]) -> float:
    """P / (P + sum of wrong P): TOFU's probability on real authors and world facts."""
    return right / (right + float(np.sum(wrong)))


def exact_memorization(hits: Sequence[bool]) -> float:
    """Share of answer tokens that are the most likely one; `hits` without the end of turn."""
    return float(np.mean(hits)) if len(hits) else 0.0


def extraction_strength(hits: Sequence[bool]) -> float:
    """1 - k/n, k the shortest prefix after which all n tokens follow greedily (Carlini 2021)."""
    wrong = [i for i, hit in enumerate(hits) if not hit]
    return 1 - (wrong[-1] + 1 if wrong else 0) / len(hits) if len(hits) else 0.0


def mia_zlib(log_p: Sequence[float], text: str) -> float:
    """Loss over the length of the zlib-compressed text (Carlini 2021); low for members."""
    return -float(np.mean(log_p)) / len(zlib.compress(text.encode()))


def min_k(scores: Sequence[float], k: float = MIN_K) -> float:
    """Minus the mean of the lowest share `k` of log p (Min-K%) or z (Min-K%++); low for members."""
    if not len(scores):
        return 0.0
    return -float(np.mean(np.sort(scores)[: max(1, int(len(scores) * k))]))


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """AUC of a score that is lower for members; 0.5 is chance. Raises Diverged if not finite."""
    if not np.isfinite([*members, *others]).all():
        raise Diverged
    labels = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(labels, [-x for x in (*members, *others)]))


def privleak(auc_model: float, auc_retain_model: float) -> float:
    """100 ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain) (MUSE); 0: never saw the members."""
    other = max(1 - auc_retain_model, 1e-9)
    return 100 * ((1 - auc_model) - other) / other


def asg(scores: dict[str, float], retain_model_scores: dict[str, float]) -> float:
    """Average similarity gap: 100 * mean |score - retain model's score| over the same names."""
    if scores.keys() != retain_model_scores.keys() or not scores:
        names = f"{list(scores)} and {list(retain_model_scores)}"
        raise UserError(f"ASG needs the same scores of two models, got {names}.")
    return 100 * float(np.mean([abs(scores[k] - retain_model_scores[k]) for k in scores]))
