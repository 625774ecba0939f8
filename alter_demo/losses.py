"""ALTER's losses. Every function takes logits of the kept positions and returns one value per position."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def inverted_hinge_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """IHL = 1 + p_true - max_{v != true} p_v, in (0, 2) (LoKU, Cha et al. 2025; ALTER's L_IHL).

    Lowers the right token and raises its nearest rival, so that the gradient is bounded and stays on two tokens.

    Args:
        logits: (n, V), computed in float32.
        labels: (n,) token ids.
    Returns:
        (n,) float32.
    """
    p = logits.float().softmax(-1)
    p_true = p.gather(-1, labels[:, None]).squeeze(-1)
    rival = p.scatter(-1, labels[:, None], -1.0).amax(-1)
    return 1 + p_true - rival


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-ln(1 - p_true), (n, V) and (n,) to (n,) (Welleck et al. 2020).

    Its gradient on the right token's logit is p_true itself: bounded like IHL's, but largest where IHL's vanishes, on
    a memorised token; the mass goes to the other tokens in the model's own proportions.
    """
    z = logits.float()
    rest = z.scatter(-1, labels[:, None], float("-inf")).logsumexp(-1)  # ln of the mass beside the right token
    return z.logsumexp(-1) - rest


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, (n, V) and (n,) to (n,): retention as published."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation(logits: torch.Tensor, top_ids: torch.Tensor, top_log_p: torch.Tensor) -> torch.Tensor:
    """KL(frozen || adapted) on the frozen model's k likeliest tokens, with the remaining mass as one more outcome.

    A lower bound of the full KL that needs k numbers per position instead of the vocabulary.

    Args:
        logits: (n, V) of the adapted model.
        top_ids, top_log_p: (n, k) of the frozen model.
    Returns:
        (n,) float32.
    """
    log_q = logits.float().log_softmax(-1).gather(-1, top_ids)
    p, top_log_p = top_log_p.float().exp(), top_log_p.float()
    rest_p = (1 - p.sum(-1)).clamp_min(1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    return (p * (top_log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


FORGETTING = {"ihl": inverted_hinge_loss, "unlikelihood": unlikelihood}
