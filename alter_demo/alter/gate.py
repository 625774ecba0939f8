"""The linear gate: one map from token features to {r, f_1..f_N}, fitted in phase one."""

import warnings
from itertools import takewhile

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ..data.rendering import Sample
from .frozen import FrozenOutputs, sample_features
from .routing import affine

HELD_OUT_SHARE = 0.25  # of the samples
FITTED_TOKENS = 100_000  # 1.6 GB of features in a 7B model
NEVER = -1e4  # bias of a class that must not be chosen


def fit_gate(
    frozen: list[FrozenOutputs], samples: list[Sample], config, seed: int
) -> tuple[torch.Tensor, dict]:
    """Fit the gate by multinomial logistic regression on three quarters of the samples.

    If one example gives several samples (the views of a text, two answers to a question), some of
    them may be in the fit and others out of it.

    Returns:
        gate (1 + N, F + 1), and a report: the share of the other forget samples that it sends to
        an expert where the answer starts, and of the other retain samples that it ever does.
    """
    held_out = choose_held_out(samples, seed)
    prefix = common_prefix([s.ids for s in samples])
    tokens = training_tokens(frozen, samples, held_out, prefix, config)
    gate = fit_classes(*tokens, config.n_experts)
    at_answer, anywhere = [], []
    for i in np.flatnonzero(held_out):
        outputs, sample = frozen[i], samples[i]
        z = affine(sample_features(outputs, config), gate)
        not_r = 1 - z.softmax(-1)[:, 0]
        if sample.label:
            at_answer.append(not_r[sample.turn - 1].item())
        else:  # the first words of a plain text say too little about it
            anywhere.append(not_r[sample.turn if sample.start == 1 else prefix :].max().item())
    return gate, {
        "forget_open_at_answer": share_above(at_answer, 0.5),
        "retain_open_anywhere": share_above(anywhere, 0.5),
    }


def choose_held_out(samples: list[Sample], seed: int) -> np.ndarray:
    """(n,) bool, a quarter of the samples, but never all samples of a sub-domain."""
    held_out = np.random.default_rng(seed).random(len(samples)) < HELD_OUT_SHARE
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


def fit_classes(x: np.ndarray, y: np.ndarray, n_experts: int, c: float = 0.1) -> torch.Tensor:
    """(1 + N, F + 1), the last column is the bias. The fit is convex: it needs no initial guess.

    `c` is the inverse of the penalty's strength.
    """
    with warnings.catch_warnings():
        # the report says what it does on other samples, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=100).fit(x, y)
    rows = np.concatenate([model.coef_, model.intercept_[:, None]], 1)
    if len(model.classes_) == 2:
        rows = np.concatenate([-rows / 2, rows / 2])
    gate = torch.zeros(1 + n_experts, x.shape[1] + 1)
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
