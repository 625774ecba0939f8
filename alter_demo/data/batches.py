"""Batches: samples of similar length, padded tensors, and shuffled draws."""

import itertools
import random
from collections.abc import Callable

import torch
from torch.nn.utils.rnn import pad_sequence

from .rendering import Sample


def length_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Groups of indices, longest first. Each has at most `batch_tokens` tokens, or one index."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def collate(samples: list[Sample], pad_id: int, device="cpu") -> dict:
    """A left-padded batch: the answers end together, so `logits_to_keep` can be one number.

    `input_ids`, `attention_mask` and `position_ids` are (B, T). Of the last K positions, `answer`
    (B, K) tells which belong to the answers. The logits one position earlier predict `labels`
    (B, K), so `keep`, the value of `logits_to_keep`, is K + 1.
    """
    ids = pad_sequence([torch.tensor(s.ids) for s in samples], True, pad_id, "left")
    lengths = torch.tensor([[len(s.ids), len(s.ids) - s.start] for s in samples])
    length, answer_length = lengths.max(0).values.tolist()
    mask = (torch.arange(length, 0, -1) <= lengths[:, :1]).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    batch["answer"] = torch.arange(answer_length, 0, -1) <= lengths[:, 1:]
    batch["labels"] = ids[:, length - answer_length :].clone()
    return {k: v.to(device) for k, v in batch.items()} | {"keep": answer_length + 1}


def model_inputs(batch: dict) -> dict:
    """The entries of a batch that a model takes."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}


def collate_groups(pad_id: int) -> Callable[[list[list[Sample]]], dict]:
    """A data collator for lists of (forget, retain, refusal) samples.

    Its batches hold all forget samples, then all retain samples, then all refusals. Beside the
    entries of `collate` they have `index` (a list), `label` and `refusal` (B,).
    """

    def join(groups: list[list[Sample]]) -> dict:
        samples = [s for column in itertools.zip_longest(*groups) for s in column if s is not None]
        batch = collate(samples, pad_id) | {"index": [s.index for s in samples]}
        for name in ("label", "refusal"):
            batch[name] = torch.tensor([getattr(s, name) for s in samples])
        return batch

    return join


class ShuffledCycle:
    """Draws samples without replacement and shuffles again when all are drawn."""

    def __init__(self, samples: list[Sample], rng: random.Random):
        self.samples, self.rng, self.remaining = samples, rng, []

    def draw(self) -> Sample:
        if not self.remaining:
            self.remaining = self.rng.sample(self.samples, len(self.samples))
        return self.remaining.pop()
