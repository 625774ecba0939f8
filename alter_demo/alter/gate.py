"""The gate: one linear map from token features to {r, f_1..f_N}, fitted in phase one."""

import warnings
from itertools import takewhile

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..data.rendering import Sample
from .frozen import FrozenOutputs, sample_features

MAX_LEAK = 0.02  # share of retain samples above the calibrated threshold
CALIBRATION_SHARE = 0.25
FITTED_TOKENS = 100_000  # 1.6 GB of features in a 7B model
NEVER = -1e4  # bias of a class that must not be chosen


def fit_gate(
    frozen: list[FrozenOutputs], samples: list[Sample], config, seed: int
) -> tuple[torch.Tensor, float, dict]:
    """Fit the gate by multinomial logistic regression, and calibrate its threshold.

    A quarter of the samples stays out of the fit. On them the threshold of the two-level gate is
    the 98 % quantile of the retain samples' maxima, clipped to [0.5, 0.99]. If one
    example gives several samples (the views of a text, two answers to a question), some of them
    may be in the fit and others out of it.

    Returns:
        gate (1 + N, F + 1), threshold, and a report: the share of held-out forget samples whose
        gate is open where the answer starts, and of held-out retain samples that open it anywhere.
    """
    held_out = choose_held_out(samples, seed)
    prefix = common_prefix([s.ids for s in samples])
    gate = fit_classes(*training_tokens(frozen, samples, held_out, prefix, config), config)
    at_answer, anywhere = [], []
    for i in np.flatnonzero(held_out):
        outputs, sample = frozen[i], samples[i]
        z = sample_features(outputs, config) @ gate[:, :-1].T + gate[:, -1]
        not_r = 1 - z.softmax(-1)[:, 0]
        if sample.label:
            at_answer.append(not_r[sample.turn - 1].item())
        else:  # the first words of a plain text say too little about it
            anywhere.append(not_r[sample.turn if sample.start == 1 else prefix :].max().item())
    threshold = 0.5
    if anywhere:
        threshold = float(np.clip(np.quantile(anywhere, 1 - MAX_LEAK), 0.5, 0.99))
    report = {
        "threshold": round(threshold, 4),
        "forget_open_at_answer": share_above(at_answer, threshold),
        "retain_open_anywhere": share_above(anywhere, threshold),
    }
    return gate, threshold, report


def choose_held_out(samples: list[Sample], seed: int) -> np.ndarray:
    """(n,) bool, a quarter of the samples, but never all samples of a sub-domain."""
    held_out = np.random.default_rng(seed).random(len(samples)) < CALIBRATION_SHARE
    labels = np.array([s.label for s in samples])
    for label in set(labels[labels > 0].tolist()):
        members = np.flatnonzero(labels == label)
        if held_out[members].all():
            held_out[members[0]] = False
    return held_out


def training_tokens(frozen, samples, held_out, prefix: int, config):
    """Features (n, F) and labels (n,) of the tokens to fit on; every k-th if there are too many.

    Tokens that all samples begin with (the system prompt) say nothing and count as r. Plain texts
    share none.
    """
    every = 1 + sum(len(s.ids) for s in samples) // FITTED_TOKENS
    start = sample_features(frozen[0], config)[:prefix]
    x, y = [start], [0] * len(start)
    for outputs, sample, out in zip(frozen, samples, held_out, strict=True):
        if not out:
            features = sample_features(outputs, config)[prefix:][::every]
            x.append(features)
            y += [sample.label] * len(features)
    return torch.cat(x).numpy(), np.array(y)


def fit_classes(x: np.ndarray, y: np.ndarray, config) -> torch.Tensor:
    """(1 + N, F + 1), the last column is the bias. The fit is convex: it needs no initial guess."""
    with warnings.catch_warnings():
        # the threshold is calibrated on held-out samples, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=0.1, max_iter=100).fit(x, y)
    rows = np.concatenate([model.coef_, model.intercept_[:, None]], 1)
    if len(model.classes_) == 2:
        rows = np.concatenate([-rows / 2, rows / 2])
    gate = torch.zeros(1 + config.n_experts, x.shape[1] + 1)
    gate[:, -1] = NEVER  # a class without a sample is never chosen
    gate[model.classes_] = torch.from_numpy(rows).float()
    return gate


def single_expert_gate(gate: torch.Tensor) -> torch.Tensor:
    """A gate that always chooses f_1, whatever the features (ablation: no router)."""
    gate = torch.zeros_like(gate)
    gate[:, -1] = torch.tensor([NEVER, -NEVER])
    return gate


def share_above(values: list[float], threshold: float) -> float | None:
    return float(np.mean(np.array(values) > threshold)) if values else None


def common_prefix(sequences: list[list[int]]) -> int:
    """Number of tokens that all sequences begin with, one short of the shortest at most."""
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return min(len(list(same)), min(map(len, sequences)) - 1)
