"""The gate with a memory: similarity to stored prompts, combined with a topic score.

The linear gate of the paper draws one line between topics. This one stores a vector of every
forget prompt and of every retain prompt. A token's context is a fading mean of whitened states of
a low layer, in which rare tokens weigh more. Its score is

    max_i cos(context, forget_i) - max_j cos(context, retain_j) + TOPIC_WEIGHT * topic

with the topic's log odds, log p(not r) / p(r), clipped to TOPIC_LIMIT. A fast window beside the
slow one closes the gate again where a running text leaves the topic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from ..data.rendering import Sample
from .frozen import FrozenOutputs, PhaseOneResult
from .routing import RoutingPlan, affine, fading_mean, gate_features, plan_routes

SLOW, FAST = 0.93, 0.6  # decay per token of the two windows
TOPIC_WEIGHT, TOPIC_LIMIT = 0.1, 5.0  # a name alone must not outweigh the stored prompts
MIN_EVIDENCE = 1.5  # token weight in the slow window below which the gate stays shut
SHUT = -1e3  # score without evidence
BANK_PARTS = ("token_weights", "projection", "forget", "retain")


@dataclass
class Bank:
    """What the gate stores, P dimensions; the adapter carries it."""

    token_weights: torch.Tensor  # (V,) from 0 (in every sample) to 1 (in none that stays)
    projection: torch.Tensor  # (P, D + 1), whitens the contexts; the last column is the bias
    forget: torch.Tensor  # (M, P) unit vectors
    retain: torch.Tensor  # (K, P) unit vectors


class FrozenTokens(NamedTuple):
    """What a plan is made from, for a batch of B texts of T tokens."""

    hidden: torch.Tensor  # (B, T, D) states of the feature layer
    entropy: torch.Tensor  # (B, T) S_q
    mask: torch.Tensor  # (B, T), 0 for padding
    ids: torch.Tensor | None  # (B, T); None: all weigh alike, and the text is running text


@dataclass
class GateScores:
    """Why the gate decides as it does, for every token of a batch."""

    score: torch.Tensor  # (B, T) of the slow window
    fast: torch.Tensor  # (B, T) of the fast window
    topic: torch.Tensor  # (B, T) log odds of "not r"
    forget_index: torch.Tensor  # (B, T) nearest stored forget entry
    forget_similarity: torch.Tensor  # (B, T) its cosine
    retain_index: torch.Tensor
    retain_similarity: torch.Tensor
    opened: torch.Tensor | None = None  # (B, T) bool, the decision


def window_means(token_weights: torch.Tensor, tokens: FrozenTokens, carry=(None, None)):
    """Means of the slow and the fast window (2, B, T, D), token weight in the slow one (B, T).

    The third value is the carry after the last token: that of `fading_mean` for both windows.
    """
    weights = tokens.mask.float()
    if tokens.ids is not None:
        weights = weights * token_weights[tokens.ids]
    pairs = zip((SLOW, FAST), carry, strict=True)
    slow, fast = (fading_mean(tokens.hidden, weights[..., None], *pair) for pair in pairs)
    return torch.stack([slow[0], fast[0]]), slow[1][..., 0], (slow[2], fast[2])


def topic_log_odds(z: torch.Tensor) -> torch.Tensor:
    """log p(not r) / p(r) from class scores (..., 1 + N)."""
    return z[..., 1:].logsumexp(-1) - z[..., 0]


def combine(forget, retain, topic):
    """The score from both similarities and the topic's log odds."""
    return forget - retain + TOPIC_WEIGHT * topic.clamp(-TOPIC_LIMIT, TOPIC_LIMIT)


def nearest(x: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and index of the nearest entry, (..., P) to (...); zeros if nothing is stored."""
    if not len(entries):
        return x.new_zeros(x.shape[:-1]), x.new_zeros(x.shape[:-1], dtype=torch.long)
    return (normalize(x, dim=-1) @ entries.T).max(-1)


def gate_scores(bank: Bank, contexts, evidence, gate) -> GateScores:
    """Scores from the contexts of both windows (2, B, T, P) and the linear gate (1 + N, P + 1)."""
    topic = topic_log_odds(affine(contexts, gate))  # (2, B, T)
    forget, forget_index = nearest(contexts, bank.forget)
    retain, retain_index = nearest(contexts, bank.retain)
    score = combine(forget, retain, topic)
    slow = torch.where(evidence < MIN_EVIDENCE, SHUT, score[0])
    parts = forget_index[0], forget[0], retain_index[0], retain[0]
    return GateScores(slow, score[1], topic[0], *parts)


def plan_tokens(config, gate, bank: Bank | None, tokens: FrozenTokens, force=None, carry=None):
    """The plan of every token, and the context that the next tokens go on from.

    Args:
        gate: (1 + N, F + 1) the linear gate. bank: None for the softmax gate.
        force: see `plan_routes`.
        carry: the context after the tokens before these, for a KV cache.
    """
    hidden, entropy, mask, ids = tokens
    if bank is None:
        x, carry = gate_features(hidden, entropy, mask, config, carry)
        return plan_routes(x, entropy, mask, gate, config, force), carry
    windows, decision = carry or ((None, None), None)
    means, evidence, windows = window_means(bank.token_weights, tokens, windows)
    contexts = affine(means, bank.projection)
    scores = gate_scores(bank, contexts, evidence, gate)
    scores.opened, decision = decide(scores, ids, mask, config, decision)
    plan = plan_routes(contexts[0], entropy, mask, gate, config, force, scores)
    return plan, (windows, decision)


def decide(scores: GateScores, ids, mask, config, carry=None):
    """Where the gate is open, (B, T) bool, and the carry.

    In running text the slow window opens the gate, and the fast one closes it. Inside an answer it
    is open if it was open anywhere since the last answer, and it may only open.

    Args:
        carry: (inside an answer (B,), opened since the last answer (B,), last ids (B, m - 1)).
    """
    crossed = (scores.score > config.gate_threshold) & mask.bool()
    running = crossed & (scores.fast > min(0.0, config.gate_threshold))
    if ids is None or not config.answer_marker:
        return running, None
    batch, length = ids.shape
    marker = torch.tensor(config.answer_marker, device=ids.device)
    if carry is None:
        false = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        carry = false, false, torch.full((batch, len(marker) - 1), -1, device=ids.device)
    # padding must not take part in a marker
    recent = torch.cat([carry[2], ids.masked_fill(mask == 0, -1)], 1)
    starts = (recent.unfold(1, len(marker), 1) == marker).all(-1)  # (B, T)
    ends = (ids == config.end_token) & mask.bool()
    steps = torch.arange(1, length + 1, device=ids.device).expand(batch, length)

    def last(events: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """(B, T + 1) step of the last event so far, 0: before these tokens, -1: never."""
        first = torch.where(before, 0, -1)[:, None]
        return torch.cat([first, torch.where(events, steps, -1)], 1).cummax(1).values

    started, ended = last(starts, carry[0]), last(ends, ~carry[0])
    inside = started > ended
    # an answer's end starts the next turn: what was open before counts no more
    resets = ends & inside[:, :-1]
    opened = last(crossed, carry[1]) > last(resets, torch.zeros_like(carry[1]))
    decision = torch.where(inside[:, 1:], opened[:, 1:], running)
    return decision, (inside[:, -1], opened[:, -1], recent[:, length:])


def plan_sample(frozen: FrozenOutputs, sample: Sample, result: PhaseOneResult) -> RoutingPlan:
    """The plan (1, T, ...) of one sample."""
    ids = torch.tensor([sample.ids])
    tokens = FrozenTokens(frozen.hidden[None], frozen.entropy[None], torch.ones_like(ids), ids)
    return plan_tokens(result.alter, result.gate, result.bank, tokens)[0]
