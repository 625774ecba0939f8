"""Tsallis entropy of next-token distributions and the threshold that splits tokens in two (ALTER, section 3)."""

from __future__ import annotations

import math

import torch

from .errors import UserError

PUBLISHED_THRESHOLD = 1.2
ROWS = 512  # positions per float32 slice: a vocabulary of 128k then needs 250 MB, not the whole batch


def tsallis_entropy(logits: torch.Tensor, q: float = 1.5) -> torch.Tensor:
    """S_q = (1 - sum_i p_i^q) / (q - 1) of softmax(logits); Shannon's entropy in nats for q = 1.

    Args:
        logits: (..., V), any float type; computed in float32, differentiable.
        q: order, above 0.
    Returns:
        (...) float32, between 0 and `entropy_range(V, q)`.
    Raises:
        UserError: q is not a positive number.
    """
    if not (q > 0 and math.isfinite(q)):
        raise UserError(f"q must be a positive number, and {q} is not.")
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for rows in flat.split(ROWS):
        log_p = rows.float().log_softmax(-1)
        if abs(q - 1) < 1e-6:
            parts.append(-(log_p.exp() * log_p).nan_to_num(0.0).sum(-1))
        else:
            # expm1 keeps the difference exact where a token is nearly certain: sum p^q is then nearly 1
            parts.append(-torch.expm1((q * log_p).logsumexp(-1)) / (q - 1))
    return torch.cat(parts).clamp_min(0).reshape(logits.shape[:-1])


def entropy_range(vocab_size: int, q: float) -> float:
    """Largest value of S_q over `vocab_size` outcomes (the uniform distribution)."""
    if abs(q - 1) < 1e-6:
        return math.log(vocab_size)
    return (1 - vocab_size ** (1 - q)) / (q - 1)


def resolve_threshold(threshold: float | str, entropy: torch.Tensor, q: float, vocab_size: int) -> float:
    """The number above which a token counts as uncertain.

    `"auto"` takes Otsu's split of log S_q over `entropy` (n,), for models in which nothing exceeds the published
    1.2 any more. A number is checked against the range of S_q, which depends on q.

    Raises:
        UserError: not a number, or outside (0, entropy_range).
    """
    if threshold == "auto":
        return otsu(entropy)
    top = entropy_range(vocab_size, q)
    try:
        value = float(threshold)
    except (TypeError, ValueError):
        raise UserError(f'The threshold must be a number or "auto", not {threshold!r}.') from None
    if not 0 < value < top:
        raise UserError(
            f"With q = {q:g} and {vocab_size} tokens S_q lies between 0 and {top:.3g}, so no token could be split at "
            f'{value:g}: choose a threshold inside, another q, or "auto".'
        )
    return value


def otsu(entropy: torch.Tensor, bins: int = 128) -> float:
    """Otsu's threshold on log S_q: the cut with the largest variance between the two sides. entropy (n,), n >= 2."""
    logs = entropy.double().clamp_min(1e-6).log()
    if logs.numel() < 2 or logs.max() - logs.min() < 1e-9:
        return PUBLISHED_THRESHOLD
    counts = torch.histc(logs, bins, logs.min().item(), logs.max().item())
    edges = torch.linspace(logs.min().item(), logs.max().item(), bins + 1, dtype=torch.double)
    centres, weight = (edges[1:] + edges[:-1]) / 2, counts / counts.sum()
    left = weight.cumsum(0)[:-1]
    mean_left = (weight * centres).cumsum(0)[:-1] / left.clamp_min(1e-12)
    mean_right = ((weight * centres).sum() - left * mean_left) / (1 - left).clamp_min(1e-12)
    between = left * (1 - left) * (mean_left - mean_right) ** 2
    return edges[1 + between.argmax()].exp().item()
