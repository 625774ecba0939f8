"""Where phase one sends the tokens: the map of the sub-domains, and the counts by expert."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ..alter.config import AlterConfig
from ..alter.routing import acting_expert
from ..data.rendering import Sample

NEAREST = 5  # questions shown beside a centre


def sub_domain_map(x: np.ndarray, labels: np.ndarray, texts: list[str]) -> dict:
    """The forget samples in two dimensions, and the questions nearest to each sub-domain's centre.

    Args:
        x: (n, D) contexts; labels: (n,) from 1; texts: n questions.
    Returns:
        {"points": [{"text", "domain", "x", "y"}], "nearest": {sub-domain: questions}}.
    """
    x = normalize(x)
    flat = (
        PCA(min(2, *x.shape), random_state=0).fit_transform(x) if len(x) > 1 else np.zeros((1, 2))
    )
    flat = np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    nearest = {}
    for d in sorted(set(labels.tolist())):
        members = np.flatnonzero(labels == d)
        distance = np.linalg.norm(x[members] - x[members].mean(0), axis=1)
        closest = (texts[i] for i in members[np.argsort(distance)])
        nearest[str(d)] = list(dict.fromkeys(closest))[:NEAREST]
    points = [
        {"text": text, "domain": int(d), "x": round(float(a), 4), "y": round(float(b), 4)}
        for text, d, (a, b) in zip(texts, labels, flat, strict=True)
    ]
    return {"points": points, "nearest": nearest}


def count_routes(frozen, samples: list[Sample], alter: AlterConfig) -> dict:
    """Answer tokens by expert (column 0: B_r or none), of each set and of each sub-domain."""
    columns = 1 + alter.n_experts
    tokens = {"forget": np.zeros(columns, int), "retain": np.zeros(columns, int)}
    flows = np.zeros((alter.n_experts, columns), int)
    for outputs, sample in zip(frozen, samples, strict=False):
        experts = acting_expert(outputs.plan.weights[0, sample.start - 1 : -1], alter)
        counts = torch.bincount(experts, minlength=columns).numpy()
        tokens["forget" if sample.label else "retain"] += counts
        if sample.label:
            flows[sample.label - 1] += counts
    return {"tokens": {k: v.tolist() for k, v in tokens.items()}, "flows": flows.tolist()}
