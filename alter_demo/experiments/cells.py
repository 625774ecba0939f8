"""The one loop over the cells of an experiment: method x seed x setting.

An experiment (`tofu.py`, `rounds.py`, ...) says which cells it has, what each one unlearns and what
to measure. `Grid` skips the cells that the results file already has, unlearns, and adds each
finished cell to the file. An interrupted experiment continues where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..baselines.methods import METHODS, check_method
from ..callbacks import Callback, CallbackList
from ..config import EvaluationConfig, UnlearnConfig, flat_config
from ..data.forget_sets import load_forget_set
from ..data.rendering import MAX_TOKENS
from ..data.schema import ForgetSet
from ..errors import Diverged, UserError
from ..models.built_in import MODELS
from ..models.knowledge import stamp
from ..options import check_ranges
from ..run import Run, next_round
from ..stopping import BY_HAND
from ..unlearn import unlearn
from .references import USUAL_DTYPES, References
from .results import MARKS, SIZES, add_result, read_results

TOFU_GROUPS = ("forget", "retain", "real_authors", "world_facts", "holdout")
TAUGHT_GROUPS = ("forget", "retain", "general", "holdout")  # of other sets that are taught
KNOWN_GROUPS = ("forget", "forget_held_out", "neighbours", "general")  # known from pre-training
WINDOW = 4 * MAX_TOKENS  # characters of a text per sample, about
FULL_PASSES = 5  # at least, over a taught set of which everything is measured


@dataclass
class GridConfig:
    """The forget set, the model and the size of an experiment. `SIZES` has the usual sizes."""

    forget: str = "tofu-forget01"
    model: str = "smollm2-135m"
    retain_items: int | None = None  # use only the first so many retain examples
    limit: int | None = None  # measured examples per group
    kept: int | None = None  # the same for groups that must stay; None: `limit`
    tokens: int = 200  # length of an answer at most
    epochs: int = 12  # of teaching the reference models


def grid_config(size: str, **values) -> GridConfig:
    """A `GridConfig` of one of `SIZES` with those of `values` that are not None."""
    if size not in SIZES:
        raise UserError(f"`size` must be one of {', '.join(SIZES)}, got {size!r}.")
    config = GridConfig(**SIZES[size] | {k: v for k, v in values.items() if v is not None})
    check_ranges(EvaluationConfig(config.limit, config.kept, tokens=config.tokens))
    return config


@dataclass
class GridOptions:
    """Which cells to run, where the results go, and how to load the models."""

    path: Path
    methods: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    overrides: dict = field(default_factory=dict)  # option -> a value, or a list of values to try
    device: str = "auto"
    dtype: str = "auto"
    load_in_4bit: bool = False
    retain_model: str | None = None  # never saw the forget set, while `GridConfig.model` has
    callbacks: Sequence[Callback] = ()
    timed: bool = True  # False: the machine is shared, so seconds are not stored
    command: str = ""  # what the user typed, stored with each run

    @property
    def loading(self) -> dict:
        """How the models are loaded, where that is not the usual way."""
        options = {k: getattr(self, k) for k in ("dtype", "load_in_4bit", "retain_model")}
        return {k: v for k, v in options.items() if v and v not in USUAL_DTYPES}

    @property
    def settings(self) -> list[dict]:
        """One dict for each combination of the values in `overrides`."""
        lists = [v if isinstance(v, list) else [v] for v in self.overrides.values()]
        return [dict(zip(self.overrides, row, strict=True)) for row in itertools.product(*lists)]


@dataclass
class Cell:
    """One run of an experiment."""

    method: str  # a method, or a reference: "target", "retain" or "blind"
    seed: int = 0
    settings: dict = field(default_factory=dict)  # config values in place of the method's own
    marks: dict = field(default_factory=dict)  # what the run does (`results.MARKS`)
    round: int | None = None
    forget_set: ForgetSet | None = None  # None: that of the experiment

    @property
    def name(self) -> str:
        return f"{self.method}/{self.round}" if self.round else self.method

    @property
    def overrides(self) -> dict:
        return self.settings | self.marks

    def __str__(self) -> str:
        shown = [f"{k} {v}" for k, v in self.overrides.items() if k != "attack"]
        return ", ".join([self.name, f"seed {self.seed}", *shown])


class TitledCallback(CallbackList):
    """Puts a title before each stage."""

    title = ""

    def on_stage(self, stage, share):
        super().on_stage(f"{self.title}: {stage}", share)


class Grid:
    """The cells of one experiment: its forget set, its reference models, its results so far.

    Args:
        result_type: what the results file holds, a key of `report.RESULT_TYPES`.
        groups: the evaluation groups to measure, if not the usual ones of the forget set.
        untaught: accept a forget set that no model was taught.
    Raises:
        UserError: bad options, no data, a damaged results file, or a set that the model was not
            taught.
    """

    def __init__(
        self,
        config: GridConfig,
        options: GridOptions,
        result_type: str,
        groups: tuple[str, ...] = (),
        untaught: bool = False,
    ):
        self.config, self.options, self.result_type = config, options, result_type
        for method, settings in itertools.product(options.methods, options.settings):
            flat_config(method, settings)  # a bad value fails now, not after an hour
        if result_type in ("rounds", "attacks") and len(options.settings) > 1:
            raise UserError(f"An experiment of type {result_type} takes one value of each option.")
        self.results = read_results(options.path, result_type)
        forget_set = load_forget_set(config.forget).with_retain_limit(config.retain_items)
        for method in options.methods:
            check_method(method, forget_set, options.load_in_4bit)
        if not (forget_set.needs_teaching or forget_set.from_pretraining or untaught):
            known = "TOFU, MUSE, imaginary-authors or harry-potter"
            raise UserError(f"The model was not taught {config.forget}. Choose {known}.")
        if not groups:
            taught = TOFU_GROUPS if "real_authors" in forget_set.extra_groups else TAUGHT_GROUPS
            groups = KNOWN_GROUPS if forget_set.from_pretraining else taught
        self.forget_set, self.callback = forget_set, TitledCallback(options.callbacks)
        self.references = References(config, options, forget_set, groups)
        self.frozen_cache: dict = {}  # frozen outputs of the target, shared by runs of a seed
        weights = "" if config.model in MODELS else stamp(config.model)
        self.weights = {"weights": weights} if weights else {}  # a folder may get other weights

    def cells(self, marks: Sequence[dict] = ({},)) -> list[Cell]:
        """The cells of all seeds, methods, settings and marks, in this order."""
        o = self.options
        rows = itertools.product(o.seeds, o.methods, o.settings, marks)
        return [Cell(method, seed, settings, m) for seed, method, settings, m in rows]

    def config_of(self, cell: Cell) -> UnlearnConfig:
        """The method's own config with the cell's overrides, fitted to the size of the set."""
        forget_set, size = self.forget_set, self.config
        values = {k: v for k, v in cell.overrides.items() if k not in MARKS}
        config = flat_config(cell.method, values | {"seed": cell.seed}, forget_set.is_plain_text)
        batch_size, steps = config.training.batch_size, config.training.max_steps
        share, own_steps = cell.marks.get("share", 1), "max_steps" not in values
        if forget_set.is_plain_text and own_steps:
            steps = math.ceil(share * steps)
        # the methods' own steps are for a small set
        measures_all = size.limit is None and forget_set.needs_teaching and own_steps
        if measures_all:
            lengths = [len(e.answer) for e in forget_set.training_examples]
            samples = share * sum(max(1, math.ceil(length / WINDOW)) for length in lengths)
            steps = max(steps, math.ceil(FULL_PASSES * samples / batch_size))
        data = config.data
        if measures_all or forget_set.benchmark == "wmdp":  # a retain sample for each draw
            data = replace(data, retain=max(data.retain, steps * batch_size))
        training = replace(config.training, max_steps=steps)
        groups = self.references.groups
        evaluation = EvaluationConfig(size.limit, size.kept, groups, size.tokens)
        return replace(config, training=training, data=data, evaluation=evaluation)

    def stored_config(self, cell: Cell) -> dict[str, dict]:
        """What a cell runs with besides its size; {} for a reference."""
        if cell.method not in METHODS:
            return {}
        config, method = self.config_of(cell), METHODS[cell.method]
        adapter = asdict(config.adapter) | {"gate": method.gate}
        adapter["threshold"] = config.adapter.threshold or method.threshold
        parts = {"training": asdict(config.training), "data": asdict(config.data)}
        return parts | {"adapter": adapter}

    def key(self, cell: Cell) -> str:
        """The id of a cell. It has the weights and the loading only if they are unusual."""
        parts = [cell.name, cell.seed, asdict(self.config), cell.overrides]
        loading = self.options.loading | self.weights
        return json.dumps([*parts, loading] if loading else parts, sort_keys=True)

    def find(self, cell: Cell) -> dict | None:
        """The stored run of a cell, if it ran with the values that the method has today."""
        key, parts = self.key(cell), self.stored_config(cell)
        for run in self.results["runs"]:
            stored = [(run["config"].get(part) or {}, values) for part, values in parts.items()]
            same = all(old.get(k, v) == v for old, values in stored for k, v in values.items())
            if run["id"] == key and same:
                return run
        return None

    def add_reference(self, which: str, measure: Callable[[str], dict], marks=None) -> None:
        """Add a reference unless it is stored. `measure` returns its entries, "metrics" first."""
        cell = Cell(which, marks=marks or {})
        if not self.find(cell):
            self.callback.title = f"{which} model"
            self.add(cell, **measure(which))

    def run(self, chains: list[list[Cell]], measure: Callable[[Run], dict], evaluate=True) -> dict:
        """Run every chain that lacks a cell, and return the results.

        Most chains have one cell. In longer ones each cell starts from the model that the last one
        left. Those models are not stored, so a chain always runs from its first cell.

        Args:
            measure: returns the entries of a finished run in the results file, "metrics" first.
            evaluate: False skips `Run.evaluate` before `measure`.
        """
        missing = [chain for chain in chains if not all(map(self.find, chain))]
        for number, chain in enumerate(missing, 1):
            count = f"{number} of {len(missing)}"
            if self.callback.should_stop() or not self.run_chain(chain, measure, evaluate, count):
                break
        return self.results

    def run_chain(self, chain: list[Cell], measure, evaluate: bool, count: str) -> bool:
        """Run the cells of a chain. Returns False if the user stopped it."""
        lm, experts = self.references.load("target"), None
        stale = [self.key(cell) for cell in chain] if len(chain) > 1 else []
        for position, cell in enumerate(chain):
            self.callback.title = f"{count}: {cell}"
            try:
                if (run := self.unlearn(lm, cell, experts, evaluate)) is None:
                    return False
                entries = measure(run)
            except Diverged:
                for lost in chain[position:]:  # no round follows one that diverged
                    self.add(lost, {}, stale=stale, stopped="diverged")
                    stale = []
                return True
            self.add(cell, run=run, stale=stale, **entries)
            stale = []  # they are gone with the first cell
            if cell is not chain[-1]:
                lm, experts = next_round(run)
            del run
        return True

    def unlearn(self, lm, cell: Cell, experts, evaluate: bool) -> Run | None:
        """Run one cell. Returns None if the user stopped it: half a cell is not stored."""
        forget_set, callbacks = cell.forget_set or self.forget_set, [self.callback]
        cache = None if cell.round else self.frozen_cache  # a round changes the frozen model
        run = unlearn(lm, forget_set, self.config_of(cell), callbacks, experts, cache)
        if run.metrics["stopped"] == BY_HAND:
            return None
        if evaluate:
            logs = self.references.logs_on(forget_set)
            run.evaluate(callbacks, logs["target"], logs.get("retain"), retain_adapter=None)
            return run if run.metrics["measured"] else None
        return run

    def add(self, cell: Cell, metrics: dict, run: Run | None = None, stale=(), **entries) -> None:
        """Add a finished cell to the results file, in place of the runs with an id in `stale`."""
        options = self.options
        entry = {"id": self.key(cell), "method": cell.method, "seed": cell.seed}
        entry |= {"round": cell.round} if cell.round else {}
        entry["metrics"] = {k: round(v, 9) if abs(v) > 1e-6 else v for k, v in metrics.items()}
        config = asdict(self.config) | {"overrides": cell.overrides} | self.stored_config(cell)
        config |= {"loaded": options.loading} if options.loading else {}
        entry |= {"config": config | self.weights, "command": options.command}
        entry |= {"hardware": self.references.hardware} | entries
        if run is not None:
            entry |= {k: run.metrics[k] for k in ("steps", "stopped", "seconds", "date")}
            # without the frozen pass, which may have been another cell's
            entry["peak_memory_mb"] = run.metrics["training_memory_mb"]
            entry["probe"] = [h["probe"] for h in run.metrics["history"] if "probe" in h]
            if not options.timed:
                del entry["seconds"]
        if not cell.settings:  # replaces the same cell with other values of the method
            stale = [*stale, entry["id"]]
        self.results = add_result(options.path, entry, self.result_type, stale)
