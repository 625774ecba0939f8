"""Sequential unlearning: the forget set arrives in rounds (ALTER, Fig. 5)."""

from __future__ import annotations

import itertools
from dataclasses import replace

from ..alter import MAX_EXPERTS
from ..data.schema import ForgetSet
from ..errors import UserError
from .cells import Grid, GridConfig, GridOptions


def run_rounds(config: GridConfig, options: GridOptions, rounds: int) -> dict:
    """Unlearn the forget set in `rounds` parts, each round starting from the last.

    The results have a run for each round, with the figures of the whole forget set.

    Raises:
        UserError: as `Grid`; a set known from pre-training, too few or many rounds or experts.
    """
    grid = Grid(config, options, "rounds")
    size, experts = len(grid.forget_set.training_examples), min(rounds, MAX_EXPERTS)
    if grid.forget_set.from_pretraining:
        raise UserError(
            f"{config.forget} can only be unlearned as a whole. Choose a set that is taught."
        )
    if not 2 <= rounds <= size:
        raise UserError(f"The number of rounds must be in [2, {size}], got {rounds}.")
    if (n := options.settings[0].get("n_experts") or experts) < experts:
        raise UserError(
            f"{rounds} rounds have {experts} experts of their own, got `n_experts` {n}."
        )
    sets = list(enumerate(forget_sets(grid.forget_set, rounds), 1))
    chains = [
        [replace(cell, round=number, forget_set=forget_set) for number, forget_set in sets]
        for cell in grid.cells([{"rounds": rounds}])
    ]
    return grid.run(chains, lambda run: {"metrics": grid.references.summarize_run(run)})


def forget_sets(forget_set: ForgetSet, rounds: int) -> list[ForgetSet]:
    """The forget set of each round: everything up to it. The probe asks about the new part.

    Each part is a sub-domain with an expert of its own; from the ninth round on they share them.
    """
    examples = forget_set.training_examples
    cuts = [round(k * len(examples) / rounds) for k in range(rounds + 1)]
    sets, so_far = [], []
    for k, (start, end) in enumerate(itertools.pairwise(cuts)):
        part = [replace(e, sub_domain=k % MAX_EXPERTS + 1) for e in examples[start:end]]
        so_far = so_far + part
        questions = {q for e in part for q in (e.question, e.paraphrased_question)} - {""}
        held_out = forget_set.probe or forget_set.forget_held_out
        probe = [e for e in held_out if e.question in questions] or part
        sets.append(replace(forget_set, training=so_far, probe=probe))
    return sets
