"""Which way a token goes: contextual features, the gate, and the plan that every layer follows (ALTER, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass
class Plan:
    """The route of every token of a batch, the same for all layers."""

    weights: torch.Tensor  # (B, T, 1 + N) float32 expert weights, column 0 is B_r; all zero: the frozen model itself
    high: torch.Tensor  # (B, T) bool, S_q above the threshold: route "A"; else route "B"
    entropy: torch.Tensor  # (B, T) S_q of the frozen model
    gate: torch.Tensor  # (B, T, 1 + N) the gate's probabilities at temperature 1
    learn_a: torch.Tensor | None = None  # (B, T) bool, where A may learn (decision 3)
    learn_b: torch.Tensor | None = None  # (B, T, 1 + N) bool, where each expert may learn

    def isolated(self, labels: torch.Tensor, masked: bool = True) -> Plan:
        """Gradient isolation: labels (B,) is 0 for a retain sample, d for a forget sample of sub-domain d.

        A learns from uncertain positions, B_fd from confident positions of its own sub-domain, B_r from retain
        samples only. Without the entropy mask (`masked=False`, an ablation) A learns from every position.
        """
        own = torch.nn.functional.one_hot(labels, self.weights.shape[-1]).bool()[:, None, :]  # (B, 1, 1 + N)
        retain = (labels == 0)[:, None, None]
        return replace(self, learn_a=self.high if masked else None, learn_b=own & (retain | ~self.high[..., None]))


def features(hidden, entropy, mask, config, carry=None):
    """Input of the gate, from frozen states only.

    Args:
        hidden: (B, T, D); entropy: (B, T); mask: (B, T), 0 for padding.
        carry: (sum (B, D), weight (B, 1)) of the tokens before these, for a KV cache.
    Returns:
        (B, T, D) the fading mean of the states up to each token (one token alone says too little about the topic:
        see CHANGELOG for the measurement), or (B, T, 1) the entropy; and the carry after the last token.
    """
    if config.router_input == "entropy":
        return entropy[..., None], None
    h = torch.nn.functional.layer_norm(hidden.float(), hidden.shape[-1:])
    m = mask.to(h.dtype)[..., None]
    length, decay = h.shape[1], config.feature_decay
    steps = torch.arange(length, device=h.device)
    kernel = (float(decay) ** (steps[:, None] - steps[None]).clamp_min(0)).tril().to(h.dtype)  # (T, T)
    total, weight = kernel @ (h * m), kernel @ m
    if carry is not None:
        fade = (float(decay) ** (steps + 1))[None, :, None].to(h.dtype)
        total, weight = total + fade * carry[0][:, None], weight + fade * carry[1][:, None]
    return total / weight.clamp_min(1e-6), (total[:, -1], weight[:, -1])


def route(x, entropy, mask, gate, config, force=None) -> Plan:
    """Turn features into a plan. x (B, T, F), gate (1 + N, F + 1).

    `softmax` (published): softmax over r and f_1..f_N at tau 0.8, top-3 fusion, for uncertain tokens; the single
    likeliest expert for confident ones. `two_level`: first r or not r, hard; where it is not r, Eq. 1 holds with B_r
    at weight 1 and the forgetting experts share weight 1 in the same way as above. Where it is r, nothing acts.
    `force`: "r" or the number of a forgetting expert takes every token that way.
    """
    z = x.float() @ gate[:, :-1].T + gate[:, -1]
    p = z.softmax(-1)
    high = (entropy > config.threshold) & mask.bool()
    first = 0 if config.gate == "softmax" else 1
    w = torch.zeros_like(p)
    w[..., first:] = fuse(z[..., first:], high, config)
    if config.gate == "two_level":
        w[..., 0] = 1.0
        w = w * ((1 - p[..., :1]) > config.gate_threshold)
    if force is not None:
        w = torch.zeros_like(w)
        w[..., 0 if force == "r" else int(force)] = 1.0
    return Plan(w * mask[..., None].bool(), high, entropy, p)


def chosen(weights: torch.Tensor, config) -> torch.Tensor:
    """The expert that each token is sent to, (..., 1 + N) to (...): 0 where nothing or B_r acts.

    With the two-level gate B_r stands beside the forgetting experts (weight 1) wherever they act, so the likeliest of
    those names the way.
    """
    first = 1 if config.gate == "two_level" else 0
    return torch.where(weights[..., 1:].any(-1), weights[..., first:].argmax(-1) + first, 0)


def fuse(z, high, config) -> torch.Tensor:
    """Conditional inference: top-k fusion at tau_high for uncertain tokens, one expert for confident ones."""
    k = min(config.top_k, z.shape[-1])
    top, index = (z / config.tau_high).topk(k, -1)
    fused = torch.zeros_like(z).scatter(-1, index, top.softmax(-1))
    single = torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    return torch.where(high[..., None], fused, single)
