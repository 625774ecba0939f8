"""TOFU (Maini et al. 2024) and the sets like it: every method with several seeds and settings."""

from __future__ import annotations

from ..run import Run
from .cells import Cell, Grid, GridConfig, GridOptions


def run_tofu(config: GridConfig, options: GridOptions) -> dict:
    """Run all cells beside the reference models; return the results. Raises UserError as `Grid`."""
    grid = Grid(config, options, "tuning" if options.overrides else "grid")
    return run_cells(grid, grid.cells())


def run_cells(grid: Grid, cells: list[Cell]) -> dict:
    """Add the reference models and the cells, with the figures of their logs."""
    for which in grid.references.names:
        grid.add_reference(which, lambda which: {"metrics": grid.references.figures(which)})
    return grid.run([[cell] for cell in cells], lambda run: {"metrics": figures(grid, run)})


def figures(grid: Grid, run: Run) -> dict[str, float]:
    """The flat figures of a run, and ROUGE-L against the base model's answers on what must stay."""
    flat = grid.references.summarize_run(run)
    for group in ("retain", "neighbours", "general"):
        after = run.metrics["after"].get(group, {})
        if "rouge_l_to_base" in after:
            flat[f"{group}_ROUGE_to_base"] = after["rouge_l_to_base"]
    return flat
