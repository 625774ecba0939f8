"""Phase I's discoveries: how many sub-domains the forget set has, and the gate that tells them from all the rest."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

from .adapter import MAX_EXPERTS
from .data import Sample
from .routing import features
from .training import Record

MIN_SILHOUETTE = 0.05  # below it the forget set has one sub-domain
NEAR_BEST = 0.8  # the smallest N within this share of the best score: every further expert sees fewer samples
MAX_LEAK = 0.02  # share of retain samples on which the calibrated gate may open anywhere
CALIBRATION_SHARE = 0.25
FITTED_TOKENS = 100_000  # of a 7B model these are 1.6 GB of features
NEAREST = 5  # questions shown beside a centre


def discover(records: list[Record], samples: list[Sample], config, n_experts: int | None, seed: int):
    """Cluster the forget samples by the context that the router sees where the assistant's turn starts (Fig. 3).

    Returns:
        labels (n,) from 1 to N, and the silhouette of every N that was tried ({} if N was set by hand or n < 4).
    """
    x = normalize(contexts(records, samples, config))
    fits, scores = {}, {}
    for n in [n_experts] if n_experts else range(2, min(MAX_EXPERTS, len(x) - 1) + 1):
        if n == 1:
            continue
        fits[n] = KMeans(min(n, len(x)), n_init=4, random_state=seed).fit_predict(x)
        if not n_experts and len(set(fits[n])) > 1:  # one where all samples are alike
            scores[n] = float(silhouette_score(x, fits[n]))
    if n_experts:
        return fits.get(n_experts, np.zeros(len(x), int)) + 1, {}
    best = max(scores.values(), default=0.0)
    if best < MIN_SILHOUETTE:
        return np.ones(len(x), int), scores
    return fits[min(n for n, score in scores.items() if score >= NEAR_BEST * best)] + 1, scores


def sample_features(record: Record, config) -> torch.Tensor:
    """(T, F) router features of one sample."""
    mask = torch.ones(1, len(record.entropy))
    return features(record.hidden[None], record.entropy[None], mask, config)[0][0]


def contexts(records: list[Record], samples: list[Sample], config) -> np.ndarray:
    """(n, D) of each sample where the assistant's turn starts; sub-domains are topics, also where the gate reads the
    entropy alone."""
    config = replace(config, router_input="context")
    pairs = zip(records, samples, strict=True)
    return np.stack([sample_features(r, config)[s.turn - 1].numpy() for r, s in pairs])


def fit_gate(records: list[Record], samples: list[Sample], config, seed: int):
    """Multinomial logistic regression from token features to {r, f_1..f_N}; convex, so it needs no initial centroid.

    Tokens that all samples begin with (the system prompt; none where plain texts are among them) say nothing and count
    as r. Of very many tokens every k-th is taken. A quarter of the samples stays
    out of the fit to calibrate the two-level threshold: the smallest from 0.5 at which at most 2 % of the retain
    samples open the gate anywhere. Where an item gives several samples (a text's views, Harry Potter's two answers to
    a question), some of them may be in the fit and others out of it.

    Returns:
        gate (1 + N, F + 1), threshold, and a report: the share of forget samples whose gate is open where the answer
        starts and the share of retain samples that open it anywhere, both on the samples that stay out.
    """
    rng = np.random.default_rng(seed)
    held_out = rng.random(len(samples)) < CALIBRATION_SHARE
    labels = np.array([s.label for s in samples])
    for label in set(labels[labels > 0].tolist()):  # a sub-domain that the fit has not seen would never be chosen
        own = np.flatnonzero(labels == label)
        if held_out[own].all():
            held_out[own[0]] = False
    prefix = common_prefix([s.ids for s in samples])
    every = 1 + sum(len(s.ids) for s in samples) // FITTED_TOKENS
    x, y = [], []
    for record, sample, out in zip(records, samples, held_out, strict=True):
        if not out:
            own = sample_features(record, config)[prefix:][::every]
            x.append(own)
            y += [sample.label] * len(own)
    start = sample_features(records[0], config)[:prefix]
    x, y = torch.cat([start, *x]).numpy(), np.array([0] * len(start) + y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # calibrated on held-out samples, converged or not
        model = LogisticRegression(C=0.1, max_iter=100).fit(x, y)
    gate = torch.zeros(1 + config.n_experts, x.shape[1] + 1)
    rows = np.concatenate([model.coef_, model.intercept_[:, None]], 1)
    if len(model.classes_) == 2:
        rows = np.concatenate([-rows / 2, rows / 2])
    gate[:, -1] = -1e4  # a class without a sample is never chosen
    gate[model.classes_] = torch.from_numpy(rows).float()
    at_answer, anywhere = [], []
    for record, sample, out in zip(records, samples, held_out, strict=True):
        if out:
            z = sample_features(record, config) @ gate[:, :-1].T + gate[:, -1]
            not_r = 1 - z.softmax(-1)[:, 0]
            if sample.label:
                at_answer.append(not_r[sample.turn - 1].item())
            else:
                # a plain text's first words say too little about it
                anywhere.append(not_r[sample.turn if sample.start == 1 else prefix :].max().item())
    threshold = float(np.clip(np.quantile(anywhere, 1 - MAX_LEAK), 0.5, 0.99)) if anywhere else 0.5
    report = {
        "threshold": round(threshold, 4),
        "forget_open_at_answer": float(np.mean(np.array(at_answer) > threshold)) if at_answer else None,
        "retain_open_anywhere": float(np.mean(np.array(anywhere) > threshold)) if anywhere else None,
    }
    return gate, threshold, report


def domain_map(x: np.ndarray, labels: np.ndarray, texts: list[str]) -> dict:
    """The forget samples in two dimensions (principal components of the context (n, F) that was clustered), and the
    questions nearest to each sub-domain's centre."""
    x = normalize(x)
    flat = PCA(min(2, *x.shape), random_state=0).fit_transform(x) if len(x) > 1 else np.zeros((len(x), 2))
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    nearest = {}
    for d in sorted(set(labels.tolist())):
        own = np.flatnonzero(labels == d)
        distance = np.linalg.norm(x[own] - x[own].mean(0), axis=1)
        nearest[str(d)] = list(dict.fromkeys(texts[i] for i in own[np.argsort(distance)]))[:NEAREST]
    points = [
        {"text": text, "domain": int(d), "x": round(float(a), 4), "y": round(float(b), 4)}
        for text, d, (a, b) in zip(texts, labels, flat, strict=True)
    ]
    return {"points": points, "nearest": nearest}


def common_prefix(sequences: list[list[int]]) -> int:
    first, length = sequences[0], 0
    shortest = min(map(len, sequences))
    while length < shortest - 1 and all(s[length] == first[length] for s in sequences):
        length += 1
    return length
