"""Robustness: unlearn with each method and seed, then attack the result (`attacks.py`)."""

from __future__ import annotations

from dataclasses import asdict

from ..models.knowledge import fit_to_model
from ..run import Run
from .attacks import AttackConfig, attack, flatten
from .cells import Grid, GridConfig, GridOptions


def run_attacks(
    config: GridConfig, options: GridOptions, attacks: AttackConfig | None = None
) -> dict:
    """Attack the model of each cell, and the retain model: what comes out of that was never taught.

    Raises:
        UserError: as `Grid` and `attack`.
    """
    attacks, grid = attacks or AttackConfig(), Grid(config, options, "attacks")
    marks = {"attack": asdict(attacks) | {"steps": list(attacks.steps)}}

    def measure(run: Run, target=None) -> dict:
        forget_set = fit_to_model(grid.forget_set, target or run.lm)
        return flatten(attack(run, forget_set, attacks, grid.callback.on_stage, target is None))

    def measure_reference(which: str) -> dict:
        target, lm = grid.references.load("target"), grid.references.load(which)
        return measure(Run(lm, lm.model, {}), target)

    if grid.forget_set.needs_teaching:
        grid.add_reference("retain", measure_reference, marks)
    return grid.run([[cell] for cell in grid.cells([marks])], measure, evaluate=False)
