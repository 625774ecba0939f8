"""Scoring given answers: log-probabilities and more of each token, under teacher forcing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from ..data.batches import length_batches
from ..data.rendering import Sample, render
from ..data.schema import Example
from .loading import LM

WRONG_ANSWERS = 2  # per example, that `answer_likelihood` compares with
BATCH_TOKENS = 2048  # scoring is bound by computation, so larger batches are not faster


@dataclass
class AnswerScores:
    """Scores of one answer of K tokens, the end of turn last."""

    log_p: list[float]  # (K,) log-probability of each token given those before
    hits: list[bool]  # (K,) whether the token is the most likely one
    z: list[float]  # (K,) log_p in standard deviations from the vocabulary's mean (Min-K%++)


def log_probs(lm: LM, questions: list[str], answers: list[str], model=None) -> list[float]:
    """Mean log-probability per token of each answer, end of turn included."""
    scores = answer_scores(lm, questions, answers, model, full=False)
    return [sum(s.log_p) / len(s.log_p) for s in scores]


@torch.no_grad()
def answer_scores(
    lm: LM, questions: list[str], answers: list[str], model=None, full: bool | list[bool] = True
) -> list[AnswerScores]:
    """Scores of each answer, in the order given. Answers to one question share its pass.

    Args:
        model: the model to use, `lm.model` by default.
        full: False leaves `hits` and `z` empty, which is faster; or one bool per answer.
    """
    model = model or lm.model
    pairs = zip(questions, answers, strict=True)
    samples = [render(lm.tokenizer, Example(q, a))[0] for q, a in pairs]
    full = [full] * len(samples) if isinstance(full, bool) else full
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(samples):
        by_prompt.setdefault(tuple(s.ids[: s.start]), []).append(i)
    scores: list[AnswerScores | None] = [None] * len(samples)
    for prompts in split_single_tokens(list(by_prompt)):
        costs = [len(p) + sum(len(samples[i].ids) - len(p) for i in by_prompt[p]) for p in prompts]
        for batch in length_batches(costs, BATCH_TOKENS):
            batch_prompts = [prompts[k] for k in batch]
            groups = [by_prompt[p] for p in batch_prompts]
            batch_samples = [[samples[i] for i in group] for group in groups]
            all_logits = answer_logits(lm, model, batch_prompts, batch_samples)
            rows = [i for group in groups for i in group]
            for i, logits in zip(rows, all_logits, strict=True):
                labels = torch.tensor(samples[i].ids[samples[i].start :], device=logits.device)
                scores[i] = score_answer(logits[: len(labels)], labels, full[i])
    return scores


def score_answer(logits: torch.Tensor, labels: torch.Tensor, full: bool) -> AnswerScores:
    """The scores of one answer from logits (K, V) and labels (K,)."""
    all_log_p = logits.float().log_softmax(-1)  # (K, V)
    log_p = all_log_p.gather(-1, labels[:, None])[:, 0]
    if not full:
        return AnswerScores(log_p.tolist(), [], [])
    hits = (all_log_p.argmax(-1) == labels).tolist()
    p = all_log_p.exp()
    mean = (p * all_log_p).sum(-1)
    variance = (p * all_log_p.square()).sum(-1) - mean.square()
    z = ((log_p - mean) / variance.clamp_min(1e-6).sqrt()).tolist()
    return AnswerScores(log_p.tolist(), hits, z)


def split_single_tokens(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Longer prompts and prompts of one token (a plain text's), which fill no cache, apart."""
    groups = [[p for p in prompts if len(p) > 1], [p for p in prompts if len(p) == 1]]
    return [group for group in groups if group]


def answer_logits(
    lm: LM, model, prompts: list[tuple[int, ...]], samples: list[list[Sample]]
) -> torch.Tensor:
    """The logits of several answers to each prompt.

    The prompts without their last token go through the model once, left-padded. Then the
    answers, right-padded, continue from copies of that cache.

    Args:
        samples: for each prompt the samples that start with it.

    Returns:
        (rows, K, V) logits from the last token of the prompt on, prompt after prompt.
    """
    pad, cache = lm.tokenizer.pad_token_id, DynamicCache()
    rows = torch.tensor([k for k, group in enumerate(samples) for _ in group])
    mask = torch.zeros(len(rows), 0, dtype=torch.long)
    if len(prompts[0]) > 1:
        width = max(map(len, prompts)) - 1
        ids = [[pad] * (width + 1 - len(p)) + list(p[:-1]) for p in prompts]
        mask = torch.tensor([[0] * (width + 1 - len(p)) + [1] * (len(p) - 1) for p in prompts])
        batch = padded_inputs(lm, ids, mask)
        model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(rows.to(lm.device))
        mask = mask[rows]
    fed = [s.ids[s.start - 1 : -1] for group in samples for s in group]
    width = max(map(len, fed))
    ids = [f + [pad] * (width - len(f)) for f in fed]
    new_mask = torch.tensor([[1] * len(f) + [0] * (width - len(f)) for f in fed])
    batch = padded_inputs(lm, ids, torch.cat([mask, new_mask], 1))
    return model(**batch, past_key_values=cache, use_cache=True).logits


def padded_inputs(lm: LM, ids: list[list[int]], mask: torch.Tensor) -> dict:
    """Model inputs on the device: `ids`, and `mask` (B, T), which also covers the cache."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -len(ids[0]) :]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(lm.device) for name, tensor in batch.items()}


def answer_likelihood(lm: LM, examples: list[Example], model=None) -> float:
    """How likely the right answers are; if there are wrong ones, how much likelier than those."""
    right = [(e.question, e.paraphrased_answer or e.answer) for e in examples]
    wrong = [(e.question, w) for e in examples for w in e.perturbed_answer[:WRONG_ANSWERS]]
    questions, answers = zip(*right, *wrong, strict=True)
    values = log_probs(lm, list(questions), list(answers), model)
    if wrong:
        return float(np.exp(np.mean(values[: len(right)]) - np.mean(values[len(right) :])))
    return float(np.exp(values).mean())
