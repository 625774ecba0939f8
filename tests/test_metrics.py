"""The metrics, computed by hand."""

import math

import pytest

from alter_demo.errors import Diverged, UserError
from alter_demo.evaluation import metrics


def test_rouge_l_is_recall_with_stemming():
    assert metrics.rouge_l("He plays the violin very well", "played violins") == 1.0
    assert metrics.rouge_l("the cat", "the cat sat down") == 0.5
    assert metrics.rouge("", "a b") == (0, 0)


def test_bleu():
    text = ["the cat sat on the mat"]
    assert metrics.bleu(text, ["The cat sat on the mat"]) == pytest.approx(1)
    assert metrics.bleu([""], ["a b"]) == 0


def test_repetition():
    assert metrics.repetition("a b c d e f g") == 0
    assert metrics.repetition("a b c d " * 10) > 0.8
    assert metrics.repetition("") == 0


def test_truth_ratio():
    # P(paraphrase) = 0.5, wrong answers 0.25 and 0.0625: geometric mean 0.125
    r = metrics.truth_ratio(math.log(0.5), [math.log(0.25), math.log(0.0625)])
    assert r == pytest.approx(0.25)
    assert metrics.forget_truth_ratio([0.25, 4.0]) == pytest.approx(0.25)
    assert metrics.retain_truth_ratio([0.25, 4.0]) == pytest.approx(0.375)
    assert metrics.truth_ratio(-2000.0, [-1.0]) > 1e300  # no overflow


def test_forget_quality():
    same = [i / 40 for i in range(40)]
    assert metrics.forget_quality(same, same) == 1
    assert metrics.forget_quality(same, [x + 2 for x in same]) < 1e-20
    with pytest.raises(Diverged):  # the unlearned model's ratios: an experiment records it
        metrics.forget_quality([float("nan"), 1.0], same)
    for bad in ([float("nan"), 1.0], [1.0]):
        with pytest.raises(UserError, match="two truth ratios"):
            metrics.forget_quality(same, bad)


def test_model_utility():
    assert metrics.model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert metrics.model_utility([0.0, 1.0]) == 0
    assert metrics.normalised_probability(0.3, [0.1, 0.2]) == pytest.approx(0.5)


def test_memorization():
    assert metrics.extraction_strength([True, False, True, True]) == 0.5
    assert metrics.extraction_strength([True] * 3) == 1
    assert metrics.extraction_strength([False] * 3) == 0
    assert metrics.extraction_strength([True, True, False]) == 0
    assert metrics.exact_memorization([]) == 0


def test_membership_inference():
    assert metrics.min_k([-1, -2, -3, -4, -5]) == 4.5  # the two lowest of five
    assert metrics.auc([1, 2], [3, 4]) == 1 and metrics.auc([1, 4], [2, 3]) == 0.5
    assert metrics.privleak(0.9, 0.5) == pytest.approx(-80) and metrics.privleak(0.5, 0.5) == 0
    with pytest.raises(UserError, match="diverged"):
        metrics.auc([float("nan")], [1.0])


def test_asg():
    scores, retain_scores = {"bleu": 0.2, "rouge": 0.4}, {"bleu": 0.1, "rouge": 0.1}
    assert metrics.asg(scores, retain_scores) == pytest.approx(20)
    with pytest.raises(UserError, match="same scores"):
        metrics.asg({"bleu": 0.2}, {"rouge": 0.1})
