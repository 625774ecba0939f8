"""Scoring given answers: log-probabilities and more of each token, under teacher forcing."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
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

    `full=False` leaves `hits` and `z` empty, which is faster; a list says so answer by answer.
    """
    model = model or lm.model
    pairs = zip(questions, answers, strict=True)
    samples = [render(lm.tokenizer, Example(q, a))[0] for q, a in pairs]
    full = [full] * len(samples) if isinstance(full, bool) else full
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(samples):
        by_prompt.setdefault(tuple(s.ids[: s.start]), []).append(i)
    scores: list[AnswerScores | None] = [None] * len(samples)
    # prompts of one token (a plain text's) fill no cache, so they have batches of their own
    for prompts in ([p for p in by_prompt if len(p) > 1], [p for p in by_prompt if len(p) == 1]):
        costs = [len(p) + sum(len(samples[i].ids) - len(p) for i in by_prompt[p]) for p in prompts]
        for batch in length_batches(costs, BATCH_TOKENS):
            groups = [by_prompt[prompts[k]] for k in batch]
            all_logits = answer_logits(lm, model, [[samples[i] for i in group] for group in groups])
            for i, logits in zip(itertools.chain(*groups), all_logits, strict=True):
                labels = torch.tensor(samples[i].ids[samples[i].start :], device=logits.device)
                scores[i] = score_answer(logits[: len(labels)], labels, full[i])
    return scores


def score_answer(logits: torch.Tensor, labels: torch.Tensor, full: bool) -> AnswerScores:
    """The scores of one answer from logits (K, V) and labels (K,)."""
    all_log_p = logits.float().log_softmax(-1)  # (K, V)
    log_p = all_log_p.gather(-1, labels[:, None])[:, 0]
    if not full:
        return AnswerScores(log_p.tolist(), [], [])
    hits = all_log_p.argmax(-1) == labels
    p = all_log_p.exp()
    mean = (p * all_log_p).sum(-1)
    variance = (p * all_log_p.square()).sum(-1) - mean.square()
    z = (log_p - mean) / variance.clamp_min(1e-6).sqrt()
    return AnswerScores(log_p.tolist(), hits.tolist(), z.tolist())


def answer_logits(lm: LM, model, groups: list[list[Sample]]) -> torch.Tensor:
    """(rows, K, V) logits of samples from the last token of the prompt on, group after group.

    The samples of a group have the same prompt. The prompts without their last token go through
    the model once, left-padded. Then the answers, right-padded, continue from copies of that cache.
    """
    pad, cache = lm.tokenizer.pad_token_id, DynamicCache()

    def forward(ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs = {name: tensor.to(lm.device) for name, tensor in inputs.items()}
        return model(**inputs, past_key_values=cache, use_cache=True, **options).logits

    prompts = [torch.tensor(s.ids[: s.start - 1], dtype=torch.long) for s, *_ in groups]
    mask = pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left")
    rows = torch.tensor([k for k, group in enumerate(groups) for _ in group])
    if mask.shape[1]:
        forward(pad_sequence(prompts, True, pad, "left"), mask, logits_to_keep=1)
        cache.batch_select_indices(rows.to(lm.device))
    rests = [torch.tensor(s.ids[s.start - 1 : -1]) for group in groups for s in group]
    rest_mask = pad_sequence([torch.ones_like(rest) for rest in rests], True)
    return forward(pad_sequence(rests, True, pad), torch.cat([mask[rows], rest_mask], 1))


def answer_likelihood(lm: LM, examples: list[Example], model=None) -> float:
    """How likely the right answers are; if there are wrong ones, how much likelier than those."""
    right = [(e.question, e.paraphrased_answer or e.answer) for e in examples]
    wrong = [(e.question, w) for e in examples for w in e.perturbed_answer[:WRONG_ANSWERS]]
    values = log_probs(lm, *zip(*right, *wrong, strict=True), model)
    if wrong:
        return float(np.exp(np.mean(values[: len(right)]) - np.mean(values[len(right) :])))
    return float(np.exp(values).mean())
