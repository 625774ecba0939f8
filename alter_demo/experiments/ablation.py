"""Ablation: ALTER without one of its parts, or with another number."""

from __future__ import annotations

from collections.abc import Sequence

from ..alter import PUBLISHED_THRESHOLD
from ..baselines.methods import get_method
from ..config import LAYERS
from ..errors import UserError
from .cells import Grid, GridConfig, GridOptions
from .tofu import run_cells

# variant -> the adapter options that differ
VARIANTS: dict[str, dict] = {
    "as it is": {},
    "no entropy mask": {"entropy_mask": False},
    "no gradient isolation": {"isolation": False},
    "no router": {"router": False},
    "literal gate, entropy alone": {"router_input": "entropy"},
    **{f"q {q:g}": {"q": q, "threshold": "auto"} for q in (0.5, 1.0, 1.5, 2.0)},
    "threshold 1.2": {"threshold": PUBLISHED_THRESHOLD},
    **{f"N {n}": {"n_experts": n} for n in (1, 2, 4, 8)},
    **{f"rank {r}": {"r": r} for r in (2, 4, 16, 32)},
    **{f"{k.replace('_', ' ')} only": {"layers": k} for k in LAYERS if k != "all"},
}


def run_ablation(config: GridConfig, options: GridOptions, variants: Sequence[str]) -> dict:
    """Run some of `VARIANTS`. Raises UserError as `Grid`, and for other methods than ALTER's."""
    for method in options.methods:
        if get_method(method).trains != "alter":
            raise UserError(f"Ablation takes parts out of ALTER, but {method} has none of them.")
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown or not variants:
        raise UserError(f"`variants` must be some of {', '.join(VARIANTS)}, got {unknown}.")
    grid = Grid(config, options, "ablation")
    return run_cells(grid, grid.cells([{"variant": name} | VARIANTS[name] for name in variants]))
