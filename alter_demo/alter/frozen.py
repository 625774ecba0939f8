"""The frozen pass of phase one: what the model says about each sample before training."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..data.batches import collate, length_batches, model_inputs
from ..data.rendering import Sample
from ..models.loading import LM
from ..models.states import hidden_states
from .config import AlterConfig
from .entropy import tsallis_entropy
from .routing import RoutingPlan, gate_features

if TYPE_CHECKING:
    from .bank import Bank

TOP = 64  # likeliest tokens kept per position for distillation
FLOAT16_MAX = torch.finfo(torch.float16).max
BATCH_TOKENS = 4096


@dataclass
class FrozenOutputs:
    """What the frozen model says about one sample of T tokens, K of which are its answer."""

    hidden: torch.Tensor | None  # (T, D) state that the gate reads; dropped once it is routed
    entropy: torch.Tensor  # (T,) S_q
    top_ids: torch.Tensor  # (K, TOP) likeliest next tokens at the answer positions
    top_log_p: torch.Tensor  # (K, TOP)
    log_p: torch.Tensor  # (K,) of the answer's own tokens
    answer_hidden: torch.Tensor | None = None  # (K, D) `hidden` at the answer positions, for RMU
    plan: RoutingPlan | None = None  # (1, T, ...) once the gate is fitted
    seconds: float = 0.0  # what it cost an earlier run, if it comes from a frozen cache


@torch.no_grad()
def frozen_pass(
    lm: LM, samples: list[Sample], config: AlterConfig, progress=None, first: int = 0, cache=None
) -> list[FrozenOutputs]:
    """Run the frozen model over `samples`; sets `sample.index`.

    Args:
        config: gives q and the feature layer.
        progress: called with (samples done, samples in all).
        first: index of the first sample, where these join others.
        cache: dict that keeps the outputs for the next run on the same samples and frozen model.
            Other samples get a pass of their own: in other batches the last bits differ, and a run
            must not depend on the runs before it.
    """
    key = (*((tuple(s.ids), s.start) for s in samples), config.q, config.feature_layer)
    for number, sample in enumerate(samples, first):
        sample.index = number
    if cache and key in cache:
        return [replace(outputs) for outputs in cache[key]]
    started = time.perf_counter()
    result: list[FrozenOutputs | None] = [None] * len(samples)
    for indices in length_batches([len(s.ids) for s in samples], BATCH_TOKENS):
        batch_samples = [samples[i] for i in indices]
        for i, outputs in zip(indices, batch_outputs(lm, batch_samples, config), strict=True):
            result[i] = outputs
        if progress:
            progress(sum(o is not None for o in result), len(result))
    if cache is not None:
        seconds = (time.perf_counter() - started) / len(samples)
        cache.clear()  # one seed's outputs: an experiment runs all methods of a seed in a row
        cache[key] = [replace(outputs, seconds=seconds) for outputs in result]
    return result


def batch_outputs(lm: LM, samples: list[Sample], config: AlterConfig) -> list[FrozenOutputs]:
    batch = collate(samples, lm.tokenizer.pad_token_id, lm.device)
    out = lm.model(**model_inputs(batch), output_hidden_states=True, use_cache=False)
    entropy = tsallis_entropy(out.logits, config.q).cpu()
    hidden = to_half(out.hidden_states[config.feature_layer])
    result = []
    for row, sample in enumerate(samples):
        t, k = len(sample.ids), len(sample.ids) - sample.start
        log_p = out.logits[row, -k - 1 : -1].float().log_softmax(-1)  # (K, V)
        top = log_p.topk(min(TOP, log_p.shape[-1]), -1)
        own = log_p.gather(-1, batch["labels"][row, batch["answer"][row]][:, None])[:, 0]
        tops = top.indices.cpu(), top.values.cpu()
        states = hidden[row, -t:].clone()
        result.append(FrozenOutputs(states, entropy[row, -t:], *tops, own.cpu()))
    return result


def gate_states(lm: LM, samples: list[Sample], layer: int, progress=None) -> list[torch.Tensor]:
    """The states (T, D) of each sample that the gate reads, where nothing else is needed."""
    result: list[torch.Tensor | None] = [None] * len(samples)
    for indices in length_batches([len(s.ids) for s in samples], BATCH_TOKENS):
        batch = collate([samples[i] for i in indices], lm.tokenizer.pad_token_id, lm.device)
        states = to_half(hidden_states(lm.model, model_inputs(batch), layer))
        for i, row in zip(indices, states, strict=True):
            result[i] = row[-len(samples[i].ids) :].clone()
        if progress:
            progress(sum(states is not None for states in result), len(result))
    return result


def to_half(states: torch.Tensor) -> torch.Tensor:
    """float16 on the CPU; some models have states that float16 cannot hold."""
    return states.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16).cpu()


def empty_outputs(samples: list[Sample]) -> list[FrozenOutputs]:
    """Zeros of the right shapes, for a method that needs no frozen pass; sets `sample.index`."""
    result = []
    for number, sample in enumerate(samples):
        sample.index, t, k = number, len(sample.ids), len(sample.ids) - sample.start
        top = torch.zeros(k, 0, dtype=torch.long), torch.zeros(k, 0)
        result.append(FrozenOutputs(torch.zeros(t, 0), torch.zeros(t), *top, torch.zeros(k)))
    return result


def sample_features(outputs: FrozenOutputs, config: AlterConfig) -> torch.Tensor:
    """(T, F) features of the gate for one sample."""
    mask = torch.ones(1, len(outputs.entropy))
    return gate_features(outputs.hidden[None], outputs.entropy[None], mask, config)[0][0]


@dataclass
class PhaseOneResult:
    """Everything that phase two needs."""

    frozen: list[FrozenOutputs]  # of all samples, by `Sample.index`
    forget: list[Sample]
    retain: list[Sample]  # retain samples and general prompts
    refusals: list[Sample]  # one for each forget sample, or none
    report: dict  # `phase_one` of metrics.json
    alter: AlterConfig | None = None
    gate: torch.Tensor | None = None  # (1 + N, F + 1)
    bank: Bank | None = None  # what the gate stores, if it is one with a bank
    steering_layer: int | None = None  # the layer whose states RMU steers
