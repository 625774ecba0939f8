"""Where phase one sends the tokens: the map of the sub-domains, and the counts by expert."""

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
    x, xy, nearest = normalize(x), np.zeros((1, 2)), {}
    if len(x) > 1:
        xy = PCA(min(2, *x.shape), random_state=0).fit_transform(x)
    xy = np.pad(xy, ((0, 0), (0, 2 - xy.shape[1])))  # one component is possible, too
    for d in np.unique(labels):
        members = np.flatnonzero(labels == d)
        distance = np.linalg.norm(x[members] - x[members].mean(0), axis=1)
        closest = (texts[i] for i in members[np.argsort(distance)])
        nearest[str(d)] = list(dict.fromkeys(closest))[:NEAREST]
    points = [
        {"text": text, "domain": int(d), "x": round(float(a), 4), "y": round(float(b), 4)}
        for text, d, (a, b) in zip(texts, labels, xy, strict=True)
    ]
    return {"points": points, "nearest": nearest}


def count_routes(frozen, samples: list[Sample], alter: AlterConfig) -> dict:
    """Answer tokens by expert (column 0: B_r or none), of each set and of each sub-domain."""
    columns = 1 + alter.n_experts
    counts = np.zeros((columns, columns), int)  # row 0: retain samples, row d: sub-domain d
    for outputs, sample in zip(frozen, samples, strict=False):
        experts = acting_expert(outputs.plan.weights[0, sample.start - 1 : -1], alter)
        counts[sample.label] += torch.bincount(experts, minlength=columns).numpy()
    tokens = {"forget": counts[1:].sum(0).tolist(), "retain": counts[0].tolist()}
    return {"tokens": tokens, "flows": counts[1:].tolist()}
