"""Fit the bank of prompts, its projection, the topic score and the threshold, in phase one."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedGroupKFold
from torch.nn.functional import normalize

from ..data.rendering import Sample, render, render_prompt
from ..data.schema import Example, ForgetSet
from ..models.generation import eos_ids
from ..models.loading import LM
from .bank import FLOOR, SHUT, Bank, gate_scores, one_text, topic_log_odds, window_means
from .config import AlterConfig
from .frozen import PhaseOneResult, gate_states
from .gate import common_prefix, fit_classes
from .routing import affine

MAX_LEAK = 0.02  # share of retain samples that open the calibrated gate
MAX_KEPT = 4000  # retain questions that are stored
PASSAGE = 16  # tokens between two stored entries of a plain text
TOPIC_TOKENS = 40_000  # contexts that the topic score is fitted on
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the logistic regression
FOLDS = 3
PER_COMPONENT = 4  # stored entries for each component of the projection
MIN_EVIDENCE = 2.5  # token weight in a window before it counts, if stored prompts reach it
MARGIN = 1e-3  # how far both thresholds stay below the lowest prompt that must open the gate


def fit_bank_gate(
    lm: LM,
    result: PhaseOneResult,
    examples: list[Example],
    forget_set: ForgetSet,
    alter: AlterConfig,
    seed: int,
    progress=None,
) -> dict:
    """The gate with a bank, into `result` and `alter`; returns its report.

    Args:
        examples: of each forget sample.
    """
    samples = [*result.forget, *result.retain]
    stored = further_prompts(lm.tokenizer, samples, examples, forget_set)
    states = [outputs.hidden for outputs in result.frozen]
    states += gate_states(lm, stored, alter.feature_layer, progress)
    vocab_size = lm.model.config.get_text_config().vocab_size
    result.bank, result.gate, report = fit_bank(
        states, [*samples, *stored], alter, vocab_size, seed
    )
    alter.answer_marker = answer_marker(lm.tokenizer)
    alter.end_tokens = eos_ids(lm)
    return report


def further_prompts(
    tokenizer, samples: list[Sample], examples: list[Example], forget_set: ForgetSet
) -> list[Sample]:
    """Prompts that are stored and not trained on: rewordings, and what else is to be kept.

    Args:
        samples: those that are trained on, first those to forget; examples: of each of the latter.
    """
    label_of = {e.question: s.label for e, s in zip(examples, samples, strict=False)}
    kept = [e for e in forget_set.retain if e.question][:MAX_KEPT]
    questions = {e.question: 0 for e in kept}
    for example in [*examples, *kept]:
        label = label_of.get(example.question, 0)
        questions |= dict.fromkeys(example.rewordings, label)
    trained = {tuple(s.ids[: s.turn]) for s in samples}
    prompts = []
    for question, label in questions.items():
        sample = render(tokenizer, Example(question, ""))[0]
        sample.label = label
        if tuple(sample.ids[: sample.turn]) not in trained:
            prompts.append(sample)
    return prompts


def fit_bank(
    states: list[torch.Tensor], samples: list[Sample], config, vocab_size: int, seed: int
) -> tuple[Bank, torch.Tensor, dict]:
    """Fit the bank and the linear gate on its contexts; threshold and sizes go into `config`.

    Args:
        states: (T, D) of each sample, what the gate reads.
        samples: label 0 for what stays, d for sub-domain d.
    Returns:
        The bank, gate (1 + N, P + 1), and a report: the shares of forget and of retain samples
        that open the gate.
    """
    questions = [s.ids for s in samples if s.start > 1]
    prefix = common_prefix(questions) if questions else 0
    labels = np.array([s.label for s in samples])
    groups = sample_groups(samples)
    bank, owners = store_entries(states, samples, groups, prefix, config, vocab_size)
    # the contexts of all windows would not fit: they are computed where they are needed
    windows = partial(sample_windows, bank.token_weights, bank.projection)
    long, evidence = [], []
    for own, sample in zip(states, samples, strict=True):
        contexts, weight = windows(own, sample)
        long.append(contexts[0])
        if sample.label:
            evidence.append(weight[0, : sample.turn].max().item())
    starts = [0 if s.start == 1 else prefix for s in samples]
    gate, fold_gates = fit_topic(long, labels, groups, starts, config.n_experts, seed)
    lowest = float(np.quantile(evidence, MAX_LEAK, method="lower"))
    config.gate_evidence = min(MIN_EVIDENCE, lowest - MARGIN)
    peaks = []
    for own, sample, group, fold_gate in zip(states, samples, groups, fold_gates, strict=True):
        # without its own entries, and by a topic score that was fitted without it
        others = replace(bank, retain=bank.retain[torch.from_numpy(owners != group)])
        scores = gate_scores(others, *windows(own, sample), fold_gate, config.gate_evidence).score
        # the whole sample if it must stay; up to the answer if it must open there
        end = sample.turn if sample.label and sample.start > 1 else len(scores)
        peaks.append(scores[:end].max().item())
    forget, retain = np.array(peaks)[labels > 0], np.array(peaks)[labels == 0]
    config.gate_threshold = threshold = choose_threshold(forget, retain)
    config.bank_forget, config.bank_retain = len(bank.forget), len(bank.retain)
    return (
        bank,
        gate,
        {
            "threshold": round(threshold, 4),
            "stored": [len(bank.forget), len(bank.retain)],
            "forget_open_at_answer": float((forget > threshold).mean()),
            "retain_open_anywhere": float((retain > threshold).mean()),
        },
    )


def store_entries(
    states, samples: list[Sample], groups: np.ndarray, prefix: int, config, vocab_size: int
) -> tuple[Bank, np.ndarray]:
    """The bank, and the group that each of its retain entries belongs to."""
    weights = token_weights([s for s in samples if not s.label], vocab_size)
    template = next((s.ids[:prefix] for s in samples if s.start > 1), [])
    weights[template] = 0.0
    means, labels, owners, stored = [], [], [], set()
    for own, sample, group in zip(states, samples, groups, strict=True):
        prompt = tuple(sample.ids[: sample.turn] if sample.start > 1 else sample.ids)
        if prompt in stored:  # a prompt is stored once
            continue
        stored.add(prompt)
        own = sample_means(weights, own, sample)[0][0]
        for t in entry_positions(sample, prefix):
            means.append(own[t])
            labels.append(sample.label)
            owners.append(group)
    entries, goes = torch.stack(means), np.array(labels) > 0
    projection = round_to_half(whitening(entries, config.bank_dim))
    unit = round_to_half(normalize(affine(entries, projection), dim=-1))
    return Bank(weights, projection, unit[goes], unit[~goes]), np.array(owners)[~goes]


def sample_groups(samples: list[Sample]) -> np.ndarray:
    """(n,) the same number for samples of the same text or of the same prompt."""
    keys = [s.source or str(s.ids[: s.turn]) for s in samples]
    return np.unique(keys, return_inverse=True)[1]


def sample_means(weights: torch.Tensor, states: torch.Tensor, sample: Sample):
    """Means (3, T, D) and token weights (3, T) of the windows, from states (T, D)."""
    means, evidence, _ = window_means(weights, one_text(sample.ids, states))
    return means[:, 0], evidence[:, 0]


def sample_windows(weights, projection, states, sample: Sample):
    """Contexts (3, T, P) and token weights (3, T) of the windows."""
    means, evidence = sample_means(weights, states, sample)
    return affine(means, projection), evidence


def round_to_half(x: torch.Tensor) -> torch.Tensor:
    """Values that float16 can hold: the bank is saved in it, and must not change on the way."""
    return x.half().float()


def choose_threshold(forget: np.ndarray, retain: np.ndarray) -> float:
    """At most two per cent of the retain samples' peaks lie above it; of fewer than 50, none.

    If stored prompts lie lower, they win: at least 98 % of those with enough evidence open the
    gate, even where something that stays comes as near.

    Args:
        forget, retain: (n,) highest score of each sample, `SHUT` without evidence.
    """
    threshold = np.quantile(np.maximum(retain, -FLOOR), 1 - MAX_LEAK, method="higher")
    if len(stored := forget[forget > SHUT]):
        threshold = min(threshold, np.quantile(stored, MAX_LEAK, method="lower") - MARGIN)
    return float(threshold)


def token_weights(samples: list[Sample], vocab_size: int) -> torch.Tensor:
    """(V,) inverse document frequency over what stays: 0 for a token of every sample, 1 if new.

    The forget set takes no part, so the weights tell nothing about its words.
    """
    count = torch.zeros(vocab_size)
    for sample in samples:
        count[list(set(sample.ids))] += 1
    return round_to_half(1 - (count + 1).log() / math.log(len(samples) + 1))


def entry_positions(sample: Sample, prefix: int) -> list[int]:
    """Where contexts are stored: after two thirds and at the end of a question, along a text."""
    if sample.start == 1:
        last = len(sample.ids) - 1
        return [*range(PASSAGE - 1, last, PASSAGE), last]
    start = min(prefix, sample.turn - 1)
    return [start + 2 * (sample.turn - 1 - start) // 3, sample.turn - 1]


def whitening(x: torch.Tensor, dim: int) -> torch.Tensor:
    """(P, D + 1) projection of (n, D) on its first principal components, scaled to variance 1.

    At most one component for `PER_COMPONENT` rows: with as many components as rows, whitened rows
    are all equally far from each other, and from whatever is new. The other rows are zero.
    """
    mean = x.mean(0)
    _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    kept = max(1, min(dim, len(x) // PER_COMPONENT, len(s)))
    deviation = s[:kept, None] / len(x) ** 0.5
    rows = v[:kept] / (deviation + 1e-4 * deviation[0] + 1e-8)
    rows = torch.cat([rows, rows.new_zeros(dim - kept, rows.shape[1])])
    return torch.cat([rows, -(rows @ mean)[:, None]], 1)


def fit_topic(
    contexts, labels: np.ndarray, groups: np.ndarray, starts: list[int], n_experts: int, seed
):
    """The linear gate, and for every sample one that was fitted without it.

    The penalty is the one that predicts other samples best. Where what goes and what stays are of
    one kind, that is a strong one, and the topic score says little.
    """
    pairs = zip(starts, contexts, strict=True)  # two tokens say too little
    spans = [range(min(start + 2, len(c) - 1), len(c)) for start, c in pairs]
    every = 1 + sum(map(len, spans)) // TOPIC_TOKENS
    picks = [(i, t) for i, span in enumerate(spans) for t in span[::every]]
    index = np.array([i for i, _ in picks])
    x, y = torch.stack([contexts[i][t] for i, t in picks]).numpy(), labels[index]
    parts = [len(set(groups[part])) for part in (labels > 0, labels == 0)]
    penalty, without = PENALTIES[0], {}
    if min(*parts) >= 2:
        folds = StratifiedGroupKFold(min(FOLDS, *parts), shuffle=True, random_state=seed)
        folds = list(folds.split(x, y > 0, groups[index]))
        fits = {c: [fit_classes(x[train], y[train], n_experts, c) for train, _ in folds]
                for c in PENALTIES}  # fmt: skip

        def loss(c: float) -> float:
            tests = [(gate, test) for gate, (_, test) in zip(fits[c], folds, strict=True)]
            return sum(log_loss(y[t] > 0, topic_p(x[t], g), labels=[0, 1]) for g, t in tests)

        penalty = min(PENALTIES, key=loss)
        for gate, (_, test) in zip(fits[penalty], folds, strict=True):
            without |= dict.fromkeys(index[test], gate)
    gate = fit_classes(x, y, n_experts, penalty)
    return gate, [without.get(i, gate) for i in range(len(contexts))]


def topic_p(x: np.ndarray, gate: torch.Tensor) -> np.ndarray:
    """Probability of "not r" for contexts (n, P)."""
    return topic_log_odds(affine(torch.from_numpy(x), gate)).double().sigmoid().numpy()


def answer_marker(tokenizer) -> list[int]:
    """The token ids that every prompt ends with: what tells the gate that an answer starts."""
    one, other = (render_prompt(tokenizer, q)[::-1] for q in ("Who?", "Yes, it is 1"))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    return one[:same][::-1]
