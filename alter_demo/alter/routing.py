"""Which way each token goes: features for the gate, and the plan that every layer follows.

ALTER, section 3. Uncertain tokens mix several experts, confident tokens take a single one; all of
them pass through the shared A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .bank import GateScores


@dataclass
class RoutingPlan:
    """The route of every token of a batch, the same for all layers."""

    weights: torch.Tensor  # (B, T, 1 + N) float32, column 0 is B_r; all zero: no expert acts
    high_entropy: torch.Tensor  # (B, T) bool, S_q above the threshold: route A, else route B
    entropy: torch.Tensor  # (B, T) S_q of the frozen model
    gate: torch.Tensor  # (B, T, 1 + N) probabilities of the linear gate at temperature 1
    scores: GateScores | None = None  # why experts act or not, for the gate with a bank
    a_grad_mask: torch.Tensor | None = None  # (B, T) bool, where A may learn
    b_grad_mask: torch.Tensor | None = None  # (B, T, 1 + N) bool, where each expert may learn

    def isolate_gradients(self, labels: torch.Tensor, masked: bool = True) -> RoutingPlan:
        """The plan with gradient isolation (ALTER, section 3.3).

        A learns from uncertain positions, B_fd from confident positions of its own sub-domain,
        B_r from retain samples only.

        Args:
            labels: (B,) 0 for a retain sample, d for a forget sample of sub-domain d.
            masked: False (an ablation) lets A learn from every position.
        """
        experts = self.weights.shape[-1]
        owner = torch.nn.functional.one_hot(labels, experts).bool()[:, None, :]  # (B, 1, 1 + N)
        retain = (labels == 0)[:, None, None]
        return replace(
            self,
            a_grad_mask=self.high_entropy if masked else None,
            b_grad_mask=owner & (retain | ~self.high_entropy[..., None]),
        )


def fading_mean(hidden, weights, decay: float, carry=None):
    """Mean of the layer-normed states up to each token; a token fades by `decay` with each step.

    Args:
        hidden: (B, T, D); weights: (B, T, 1) of the tokens, 0 for padding.
        carry: the sums (B, D) and (B, 1) after the tokens before these, for a KV cache.
    Returns:
        The mean (B, T, D), the sum of the weights (B, T, 1), and the carry.
    """
    h = torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
    steps = torch.arange(h.shape[1], device=h.device)
    kernel = (float(decay) ** (steps[:, None] - steps[None]).clamp_min(0)).tril().to(h.dtype)
    total, weight = kernel @ (h * weights), kernel @ weights  # kernel: (T, T)
    if carry is not None:
        fade = (float(decay) ** (steps + 1))[None, :, None].to(h.dtype)
        total, weight = total + fade * carry[0][:, None], weight + fade * carry[1][:, None]
    return total / weight.clamp_min(1e-6), weight, (total[:, -1], weight[:, -1])


def gate_features(hidden, entropy, mask, config, carry=None):
    """Input of the linear gate, from frozen states only.

    Args:
        hidden: (B, T, D); entropy: (B, T); mask: (B, T), 0 for padding.
        carry: see `fading_mean`.
    Returns:
        (B, T, D) the fading mean of the states up to each token, since one token says too little
        about the topic, or (B, T, 1) the entropy; and the carry after the last token.
    """
    if config.router_input == "entropy":
        return entropy[..., None], None
    mean, _, carry = fading_mean(hidden, mask.float()[..., None], config.feature_decay, carry)
    return mean, carry


def affine(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(..., F) to (..., P) by a matrix (P, F + 1) whose last column is the bias."""
    return x @ matrix[:, :-1].T + matrix[:, -1]


def plan_routes(x, entropy, mask, gate, config, force=None, scores=None) -> RoutingPlan:
    """Turn features into a plan.

    `softmax` (published): softmax over r and f_1..f_N at tau 0.8 with top-3 fusion for uncertain
    tokens, the single likeliest expert for confident ones. `bank`: a hard decision whether experts
    act comes first. Where they do, Eq. 1 holds with B_r at weight 1, and the forgetting experts
    share weight 1 in the same way as above.

    Args:
        x: (B, T, F) features; gate: (1 + N, F + 1), the last column is the bias.
        force: "r", or the number of a forgetting expert, sends every token that way.
        scores: GateScores with the decision, for `bank`.
    """
    z = affine(x.float(), gate)
    high_entropy = (entropy > config.threshold) & mask.bool()
    first = 0 if config.gate == "softmax" else 1
    w = torch.zeros_like(z)
    w[..., first:] = fuse_experts(z[..., first:], high_entropy, config)
    if config.gate == "bank":
        w[..., 0] = 1.0
        w = w * scores.opened[..., None]
    if force is not None:
        w = torch.zeros_like(w)
        w[..., 0 if force == "r" else int(force)] = 1.0
    weights = w * mask[..., None].bool()
    return RoutingPlan(weights, high_entropy, entropy, z.softmax(-1), scores)


def fuse_experts(z, high_entropy, config) -> torch.Tensor:
    """Expert weights from scores z (..., E): top-k fusion if uncertain, one expert if not."""
    k = min(config.top_k, z.shape[-1])
    top, index = (z / config.tau_high).topk(k, -1)
    fused = torch.zeros_like(z).scatter(-1, index, top.softmax(-1))
    single = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    return torch.where(high_entropy[..., None], fused, single)


def acting_expert(weights: torch.Tensor, config) -> torch.Tensor:
    """The expert that each token is sent to, (..., 1 + N) to (...): 0 where none or B_r acts.

    With a bank B_r acts beside the forgetting experts, so the likeliest of those
    counts.
    """
    first = 1 if config.gate == "bank" else 0
    return torch.where(weights[..., 1:].any(-1), weights[..., first:].argmax(-1) + first, 0)
