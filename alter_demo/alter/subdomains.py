"""Sub-domains of the forget set: one forgetting expert each (ALTER, section 3.2, Fig. 3)."""

from dataclasses import replace

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

from ..data.rendering import Sample
from . import MAX_EXPERTS
from .frozen import FrozenOutputs, sample_features

MIN_SILHOUETTE = 0.05  # below it the forget set has one sub-domain
NEAR_BEST = 0.8  # of the best score is good enough: more experts see fewer samples each


def find_sub_domains(
    frozen: list[FrozenOutputs], samples: list[Sample], config, n_experts: int | None, seed: int
) -> tuple[np.ndarray, dict[int, float]]:
    """Cluster the forget samples by the context that the gate reads where the turn starts.

    Returns:
        labels (n,) from 1 to N, and the silhouette of every N tried. The latter is empty if N was
        set by hand or n < 3.
    """
    x = normalize(sample_contexts(frozen, samples, config))
    fits, scores = {}, {}
    for n in [n_experts] if n_experts else range(2, min(MAX_EXPERTS, len(x) - 1) + 1):
        if n == 1:
            continue
        fits[n] = KMeans(min(n, len(x)), n_init=4, random_state=seed).fit_predict(x)
        if not n_experts and len(set(fits[n])) > 1:  # one cluster if all samples are alike
            scores[n] = float(silhouette_score(x, fits[n]))
    if n_experts:
        return fits.get(n_experts, np.zeros(len(x), int)) + 1, {}
    best = max(scores.values(), default=0.0)
    if best < MIN_SILHOUETTE:
        return np.ones(len(x), int), scores
    return fits[min(n for n, score in scores.items() if score >= NEAR_BEST * best)] + 1, scores


def sample_contexts(frozen: list[FrozenOutputs], samples: list[Sample], config) -> np.ndarray:
    """(n, D) context of each sample where the assistant's turn starts.

    Sub-domains are topics, also where the gate reads the entropy alone.
    """
    config = replace(config, router_input="context")
    pairs = zip(frozen, samples, strict=True)
    return np.stack([sample_features(f, config)[s.turn - 1].numpy() for f, s in pairs])
