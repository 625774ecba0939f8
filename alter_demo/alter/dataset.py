"""The batches of phase two: forget samples with retain samples and refusals, and their plans."""

import random

import torch
from torch.nn.functional import pad

from ..data.batches import ShuffledCycle
from ..data.rendering import Sample
from .frozen import FrozenOutputs
from .routing import RoutingPlan


def draw_groups(
    forget: list[Sample],
    retain: list[Sample],
    length: int,
    seed: int,
    refusals: list[Sample] = (),
    paired: bool = False,
) -> list[list[Sample]]:
    """`length` groups of a forget sample, a retain sample and a refusal, drawn with the seed.

    The sub-domains take turns, whatever their sizes. Each expert learns from its own only, so a
    small one would otherwise lag behind when training stops.

    Args:
        refusals: one for each forget sample, or none.
        paired: a group gets the refusal to its own question, else any of its sub-domain.
    """
    rng, sub_domains = random.Random(seed), sorted({s.label for s in forget})

    def cycles_of(samples: list[Sample]) -> dict[int, ShuffledCycle]:
        return {d: ShuffledCycle([s for s in samples if s.label == d], rng) for d in sub_domains}

    cycles, keep = cycles_of(forget), ShuffledCycle(retain, rng)
    groups = []
    for i in range(length):
        sample = cycles[sub_domains[i % len(sub_domains)]].draw()
        groups.append([sample, *([keep.draw()] if retain else [])])
    refusal_of = dict(zip(map(id, forget), refusals, strict=False))
    cycles = cycles_of(refusals)
    for group in groups if refusals else ():
        sample = group[0]
        group.append(refusal_of[id(sample)] if paired else cycles[sample.label].draw())
    return groups


def batch_plan(frozen: list[FrozenOutputs], batch: dict, config) -> RoutingPlan:
    """The samples' plans as one left-padded batch of (B, T, ...).

    With a bank hardly any expert acts on a retain token, so B_r would not learn. In
    training all forgetting experts act there, by the gate's probabilities, and B_r learns to cancel
    them.
    """
    length, device = batch["input_ids"].shape[1], batch["input_ids"].device

    def stack(name: str) -> torch.Tensor:
        parts = [getattr(f.plan, name) for f in frozen]  # (1, T_i, ...) each
        lefts = [(0, 0) * (p.dim() - 2) + (length - p.shape[1], 0) for p in parts]
        return torch.cat([pad(p, left) for p, left in zip(parts, lefts, strict=True)]).to(device)

    plan = RoutingPlan(*map(stack, ("weights", "high_entropy", "entropy", "gate")))
    if config.gate == "bank":
        retain = (batch["label"] == 0)[:, None] & batch["attention_mask"].bool()
        leak = plan.gate.clone()
        leak[..., 0] = 0
        leak = leak / leak.sum(-1, keepdim=True).clamp_min(1e-6)
        leak[..., 0] = 1
        plan.weights = torch.where(retain[..., None], leak, plan.weights)
    return plan
