import math

import pytest

from alter_demo import metrics
from alter_demo.errors import Diverged, UserError


def test_rouge_l_is_recall_with_stemming():
    assert metrics.rouge_l("He plays the violin very well", "played violins") == 1.0
    assert metrics.rouge_l("the cat", "the cat sat down") == 0.5


def test_repetition():
    assert metrics.repetition("a b c d e f g") == 0
    assert metrics.repetition("a b c d " * 10) > 0.8
    assert metrics.repetition("") == 0


def test_truth_ratio_by_hand():
    # P(paraphrase) = 0.5, wrong answers 0.25 and 0.0625: geometric mean 0.125
    r = metrics.truth_ratio(math.log(0.5), [math.log(0.25), math.log(0.0625)])
    assert r == pytest.approx(0.25)
    assert metrics.forget_truth_ratio([0.25, 4.0]) == pytest.approx(0.25)
    assert metrics.retain_truth_ratio([0.25, 4.0]) == pytest.approx(0.375)


def test_forget_quality():
    same = [i / 40 for i in range(40)]
    assert metrics.forget_quality(same, same) == 1
    assert metrics.forget_quality(same, [x + 2 for x in same]) < 1e-20
    with pytest.raises(Diverged):  # the unlearned model's: a grid records it and goes on
        metrics.forget_quality([float("nan"), 1.0], same)
    for bad in ([float("nan"), 1.0], [1.0]):
        with pytest.raises(UserError, match="two truth ratios"):
            metrics.forget_quality(same, bad)


def test_model_utility():
    assert metrics.model_utility([0.5, 1.0]) == pytest.approx(2 / 3)
    assert metrics.model_utility([0.0, 1.0]) == 0
