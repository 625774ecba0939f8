"""The gate with a memory: similarity to stored prompts, combined with a topic score.

The linear gate of the paper draws one line between topics. This one stores a vector of every
forget prompt and of every retain prompt. A token's context is a fading mean of whitened states of
a low layer, in which rare tokens weigh more. With the cosines f and r of the nearest stored forget
and retain entry, and the topic's log odds t = log p(not r) / p(r), its score is

    f (1 + TOPIC_WEIGHT t) - max(r, FLOOR)

taken in the better of two windows: a long one for the whole question, a short one so that text
before the question does not drown it. A third, fast one closes the gate again where a running text
leaves the topic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from ..data.rendering import Sample
from .frozen import FrozenOutputs, PhaseOneResult
from .routing import RoutingPlan, affine, fading_mean, gate_features, plan_routes

WINDOWS = 0.93, 0.8, 0.6  # decay per token of the long, the short and the fast window
TOPIC_WEIGHT, TOPIC_LIMIT = 0.05, 5.0  # a name alone must not outweigh the stored prompts
FLOOR = 0.6  # far from all that is stored, nothing opens the gate
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


def one_text(ids: list[int], states: torch.Tensor, entropy=None) -> FrozenTokens:
    """A batch of one text, from states (T, D); without `entropy` only the gate's part counts."""
    ids = torch.tensor([ids])
    entropy = torch.zeros(ids.shape) if entropy is None else entropy[None]
    return FrozenTokens(states[None], entropy, torch.ones_like(ids), ids)


@dataclass
class GateScores:
    """Why the gate decides as it does, for every token of a batch."""

    score: torch.Tensor  # (B, T) of the better window
    fast: torch.Tensor  # (B, T) the same in the fast window, without the floor
    topic: torch.Tensor  # (B, T) log odds of "not r"
    forget_index: torch.Tensor  # (B, T) nearest stored forget entry
    forget_similarity: torch.Tensor  # (B, T) its cosine
    retain_index: torch.Tensor
    retain_similarity: torch.Tensor
    opened: torch.Tensor | None = None  # (B, T) bool, the decision


def window_means(token_weights: torch.Tensor, tokens: FrozenTokens, carry=None):
    """Means (3, B, T, D) and token weights (3, B, T) of the windows.

    The third value is the carry after the last token: that of `fading_mean` for each window.
    """
    weights = tokens.mask.float()
    if tokens.ids is not None:
        weights = weights * token_weights[tokens.ids]
    pairs = zip(WINDOWS, carry or [None] * len(WINDOWS), strict=True)
    parts = [fading_mean(tokens.hidden, weights[..., None], *pair) for pair in pairs]
    means, weights, carry = zip(*parts, strict=True)
    return torch.stack(means), torch.stack(weights)[..., 0], carry


def topic_log_odds(z: torch.Tensor) -> torch.Tensor:
    """log p(not r) / p(r) from class scores (..., 1 + N)."""
    return z[..., 1:].logsumexp(-1) - z[..., 0]


def combine(forget, retain, topic):
    """The score from both similarities and the topic's log odds."""
    return forget * (1 + TOPIC_WEIGHT * topic.clamp(-TOPIC_LIMIT, TOPIC_LIMIT)) - retain


def nearest(x: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and index of the nearest entry, (..., P) to (...); zeros if nothing is stored."""
    if not len(entries):
        return x.new_zeros(x.shape[:-1]), x.new_zeros(x.shape[:-1], dtype=torch.long)
    rows = normalize(x, dim=-1).flatten(0, -2).split(1024)  # all at once would take gigabytes
    parts = zip(*((part @ entries.T).max(-1) for part in rows), strict=True)
    return tuple(torch.cat(part).view(x.shape[:-1]) for part in parts)


def gate_scores(bank: Bank, contexts, evidence, gate, min_evidence: float) -> GateScores:
    """Scores from the windows' contexts (3, B, T, P) and token weights (3, B, T).

    Args:
        gate: (1 + N, P + 1) the linear gate.
        min_evidence: token weight of a window below which it does not count.
    """
    topic = topic_log_odds(affine(contexts, gate))  # (3, B, T)
    forget, forget_index = nearest(contexts, bank.forget)
    retain, retain_index = nearest(contexts, bank.retain)
    score = combine(forget, retain.clamp_min(FLOOR), topic)[:-1]
    score, window = torch.where(evidence[:-1] < min_evidence, SHUT, score).max(0)
    fast = combine(forget, retain, topic)[-1]
    parts = topic, forget_index, forget, retain_index, retain
    return GateScores(score, fast, *(part.gather(0, window[None])[0] for part in parts))


def plan_tokens(config, gate, bank: Bank | None, tokens: FrozenTokens, force=None, carry=None):
    """The plan of every token, and the context that the next tokens go on from.

    Args:
        gate: (1 + N, F + 1) the linear gate. bank: None for the softmax gate.
        force: see `plan_routes`.
        carry: the context after the tokens before these, for a KV cache.
    """
    with torch.autocast(tokens.hidden.device.type, enabled=False):  # as it was fitted
        return plan_in_float32(config, gate, bank, tokens, force, carry)


def plan_in_float32(config, gate, bank, tokens: FrozenTokens, force, carry):
    """`plan_tokens` without autocast."""
    hidden, entropy, mask, ids = tokens
    if bank is None:
        x, carry = gate_features(hidden, entropy, mask, config, carry)
        return plan_routes(x, entropy, mask, gate, config, force), carry
    windows, decision = carry or (None, (None, None))
    means, evidence, windows = window_means(bank.token_weights, tokens, windows)
    contexts = affine(means, bank.projection)
    scores = gate_scores(bank, contexts, evidence, gate, config.gate_evidence)
    scores.opened, decision = decide(scores, ids, mask, config, decision)
    plan = plan_routes(contexts[0], entropy, mask, gate, config, force, scores)
    return plan, (windows, decision)


def decide(scores: GateScores, ids, mask, config, carry=(None, None)):
    """Where the gate is open, (B, T) bool, and the carry.

    In running text it opens where the score crosses the threshold, and stays open until the fast
    window turns to what stays. Inside an answer it is open if the score crossed the threshold
    anywhere since the last answer, and it may only open.
    """
    crossed = (scores.score > config.gate_threshold) & mask.bool()
    closes = (scores.fast < min(0.0, config.gate_threshold)) & mask.bool()
    was_open, answers = carry
    if was_open is None:
        was_open = torch.zeros_like(crossed[:, 0])
    running = last_step(crossed & ~closes, was_open) > last_step(closes, ~was_open)
    decision = running[:, 1:]
    if ids is not None and config.answer_marker:
        inside, opened, answers = follow_answers(crossed, ids, mask, config, answers)
        decision = torch.where(inside, opened, decision)
    return decision, (running[:, -1], answers)


def follow_answers(crossed: torch.Tensor, ids, mask, config, carry=None):
    """Which tokens are inside an answer, and whether `crossed` held since the last answer, (B, T).

    The third value is the carry: both at the last token (B,), and the last ids (B, m - 1).
    """
    batch, length = ids.shape
    marker = torch.tensor(config.answer_marker, device=ids.device)
    if carry is None:
        false = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        carry = false, false, torch.full((batch, len(marker) - 1), -1, device=ids.device)
    # padding must not take part in a marker
    recent = torch.cat([carry[2], ids.masked_fill(mask == 0, -1)], 1)
    starts = (recent.unfold(1, len(marker), 1) == marker).all(-1)  # (B, T)
    ends = torch.isin(ids, torch.tensor(config.end_tokens or [-1], device=ids.device)) & mask.bool()
    inside = last_step(starts, carry[0]) > last_step(ends, ~carry[0])
    # an answer's end starts the next turn: what was open before counts no more
    resets = last_step(ends & inside[:, :-1], torch.zeros_like(carry[1]))
    opened = last_step(crossed, carry[1]) > resets
    return inside[:, 1:], opened[:, 1:], (inside[:, -1], opened[:, -1], recent[:, length:])


def last_step(events: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """(B, T + 1) step of the last event so far; 0: `before` these tokens, -1: never.

    Args:
        events: (B, T) bool, of the steps 1 to T.
        before: (B,) bool.
    """
    steps = torch.arange(1, events.shape[1] + 1, device=events.device)
    first = torch.where(before, 0, -1)[:, None]
    return torch.cat([first, torch.where(events, steps, -1)], 1).cummax(1).values


def plan_sample(frozen: FrozenOutputs, sample: Sample, result: PhaseOneResult) -> RoutingPlan:
    """The plan (1, T, ...) of one sample."""
    tokens = one_text(sample.ids, frozen.hidden, frozen.entropy)
    return plan_tokens(result.alter, result.gate, result.bank, tokens)[0]
