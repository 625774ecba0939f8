"""A benchmark: every method, several seeds, one results file that each finished item is added to.

The target and the retain-only model are taught and measured once and kept in the cache. An interrupted grid goes on
where it stopped: what stands in the results file is not run again.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import evaluate as evaluation
from .adapter import MAX_EXPERTS
from .answers import adapt, own_file, write_json
from .data import ForgetSet, adapters, load_forget_set
from .errors import UserError
from .learn import LearnConfig, learn
from .models import MODELS, cache_dir, load_model
from .runs import UnlearnConfig, next_round, split_probe, unlearn
from .training import train_config

REFERENCES = ("target", "retain")
TOFU_GROUPS = ("forget", "retain", "real_authors", "world_facts", "holdout")
OTHER_GROUPS = ("forget", "retain", "general", "holdout")  # without TOFU's real authors and world facts


@dataclass
class GridConfig:
    """What is asked and of which model. `cpu` in SIZES fits two cores, `full` a GPU."""

    forget: str = "tofu-forget01"
    model: str = "smollm2-135m"
    retain_items: int | None = None  # how many of the retain items exist for these models at all
    limit: int | None = None  # measured items a group
    kept: int | None = None  # the same for the groups that are to be kept
    tokens: int = 200  # length of an answer at most
    epochs: int = 12  # of teaching


SIZES = {"cpu": {"retain_items": 200, "limit": 40, "kept": 20, "tokens": 64}, "full": {}}


def grid_config(size: str, **values) -> GridConfig:
    if size not in SIZES:
        raise UserError(f"The size is one of {', '.join(SIZES)}, not {size!r}.")
    config = GridConfig(**SIZES[size] | {k: v for k, v in values.items() if v is not None})
    if config.limit is not None and config.limit < 2:
        raise UserError("The limit must leave at least 2 items in each group.")
    return config


def read_results(path: Path) -> dict:
    """{"runs": [...]} of a results file, without runs when it is not there yet.

    Raises:
        UserError: the file was cut short or is something else.
    """
    if not path.is_file():
        return {"runs": []}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for run in results["runs"]:
            run["id"], run["method"], run["seed"], run["metrics"], run["config"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is not a whole results file: restore it (git), or choose another name.") from None
    return results


def taught(config: GridConfig, made: ForgetSet, device: str, dtype: str, on_step, stage) -> dict[str, Path]:
    """Folders of the adapters of the target and the retain-only model; taught now if they are not in the cache."""
    if config.retain_items is None and config.model and (shipped := adapters(made.name, config.model)):
        return shipped
    model = f"{Path(config.model).name}-{hashlib.sha256(config.model.encode()).hexdigest()[:6]}"
    model = config.model if config.model in MODELS else model  # names of folders repeat
    name = f"{made.name}-{config.retain_items or 'all'}-{model}-{config.epochs}"
    folders = {which: cache_dir() / "taught" / name / which for which in REFERENCES}
    for which, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            stage(f"teaching the {which} model", 0.0)
            lm = load_model(config.model, device, dtype)
            learn(lm, made, which, folder, LearnConfig(epochs=config.epochs), on_step)
    return folders


def measured(config: GridConfig, groups: dict, name: str, folder: Path, device, dtype, stage) -> evaluation.Log:
    """Log of the target or the retain-only model on `groups`, kept in the cache."""
    lm = load_model(config.model, device, dtype, folder)
    sizes = "-".join(str(len(items)) for items in groups.values())
    file = cache_dir() / "logs" / f"{name}-{own_file(lm).stem}-{sizes}-{config.tokens}.json"  # changes with the weights
    if not file.is_file():
        log = evaluation.evaluate(lm, lm.model, groups, config.tokens, stage)
        evaluation.write_log(log, file)
    return evaluation.read_log(file)


def group_names(made: ForgetSet) -> tuple[str, ...]:
    return TOFU_GROUPS if "real_authors" in made.more else OTHER_GROUPS


def asking(config: GridConfig, method: str, made: ForgetSet) -> UnlearnConfig:
    return UnlearnConfig(
        method=method, limit=config.limit, kept=config.kept, groups=group_names(made), tokens=config.tokens
    )


def references(config: GridConfig, made: ForgetSet, device, dtype, on_step, stage):
    """Adapter folders and logs of the target and the retain-only model, and the hardware."""
    if not made.learned:
        raise UserError(f"{config.forget} was not taught to the model: the grid needs TOFU or imaginary-authors.")
    folders = taught(config, made, device, dtype, on_step, stage)
    lm = load_model(config.model, device, dtype, folders["target"])
    groups = split_probe(adapt(made, lm))[1].limited(config.limit, config.kept).evaluation()
    groups = {name: groups[name] for name in group_names(made)}
    hardware = lm.hardware
    del lm
    logs = {w: measured(config, groups, made.name, folders[w], device, dtype, stage) for w in REFERENCES}
    return folders, logs, hardware


def grid(
    config: GridConfig,
    methods: list[str],
    seeds: list[int],
    path: Path,
    overrides: dict | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_step: Callable | None = None,
    on_stage: Callable[[str, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Run what is missing in `path` and return the results.

    Args:
        overrides: TrainConfig values in place of the methods' own; such runs stand beside the others.
    Raises:
        UserError: an unknown method, a damaged results file, no data.
    """
    stage = on_stage or (lambda what, share: None)
    overrides = overrides or {}
    for method in methods:
        train_config(method, **overrides)  # bad values now, not after an hour
    results = read_results(path)
    missing = [
        (m, s) for s in seeds for m in methods
        if identity(m, s, config, overrides) not in {r["id"] for r in results["runs"]}
    ]  # fmt: skip
    made = load_forget_set(config.forget).smaller(config.retain_items)
    folders, logs, hardware = references(config, made, device, dtype, on_step, stage)
    for which in REFERENCES:
        if identity(which, 0, config, {}) not in {r["id"] for r in results["runs"]}:
            flat = evaluation.summary(logs[which], logs["retain"])
            add(results, path, which, 0, flat, config, {}, hardware=hardware)
    for number, (method, seed) in enumerate(missing, 1):
        if should_stop():
            break
        gc.collect()
        lm = load_model(config.model, device, dtype, folders["target"])
        name = f"{number} of {len(missing)}: {method}, seed {seed}"
        run = unlearn(
            lm, made, asking(config, method, made),
            train_config(method, seed=seed, **overrides), folder=None, before=logs["target"], retain_log=logs["retain"],
            on_step=on_step, on_stage=lambda what, share, name=name: stage(f"{name}: {what}", share),
            should_stop=should_stop,
        )  # fmt: skip
        if run.metrics["stopped"] == "stopped by hand":
            break  # half an item is none
        flat = run.metrics["after"]["summary"] | to_base(run)
        add(
            results, path, method, seed, flat, config, overrides, steps=run.metrics["steps"],
            stopped=run.metrics["stopped"], train=run.metrics["config"]["train"], seconds=run.metrics["seconds"],
            peak_memory_mb=run.metrics["peak_memory_mb"], hardware=hardware, date=run.metrics["date"],
            probe=[h["probe"] for h in run.metrics["history"] if "probe" in h],
        )  # fmt: skip
        del run, lm
    return results


def sequential(
    config: GridConfig,
    methods: list[str],
    seeds: list[int],
    path: Path,
    rounds: int = 10,
    overrides: dict | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_step: Callable | None = None,
    on_stage: Callable[[str, float], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict:
    """Forget the set in `rounds` parts, each round starting from the last, figures after each (ALTER, Fig. 5).

    A run of the results file is one round; a method and seed that lacks a round is run again from the first, since
    the weights in between are not kept. Each part is a sub-domain with an expert of its own (from the ninth on they
    share). The forget figures are those of the whole set.
    """
    stage = on_stage or (lambda what, share: None)
    for method in methods:
        train_config(method, **overrides or {})
    overrides = {"rounds": rounds} | (overrides or {})
    results = read_results(path)
    made = load_forget_set(config.forget).smaller(config.retain_items)
    if not 2 <= rounds <= len(made.forget):
        raise UserError(f"There can be 2 to {len(made.forget)} rounds, and {rounds} is not among them.")
    folders, logs, hardware = references(config, made, device, dtype, on_step, stage)
    cuts = [round(k * len(made.forget) / rounds) for k in range(rounds + 1)]
    parts = [
        [replace(i, domain=k % MAX_EXPERTS + 1) for i in made.forget[a:b]]
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]  # fmt: skip
    for method, seed in ((m, s) for s in seeds for m in methods):
        wanted = [identity(f"{method}/{k}", seed, config, overrides) for k in range(1, rounds + 1)]
        if should_stop() or set(wanted) <= {r["id"] for r in results["runs"]}:
            continue
        results["runs"] = [r for r in results["runs"] if r["id"] not in wanted]
        lm, experts = load_model(config.model, device, dtype, folders["target"]), None
        for k in range(1, rounds + 1):
            so_far = [i for part in parts[:k] for i in part]
            asked = {i.paraphrased_question for i in parts[k - 1]}  # the probe looks at what is new
            part = replace(
                made, training=so_far, forget_held_out=[i for i in made.forget_held_out if i.question in asked]
            )
            name = f"{method}, seed {seed}, round {k} of {rounds}"
            own = {k: v for k, v in overrides.items() if k != "rounds"}
            run = unlearn(
                lm, part, asking(config, method, made), train_config(method, seed=seed, **own), folder=None,
                before=logs["target"], retain_log=logs["retain"], experts=experts, on_step=on_step,
                on_stage=lambda what, share, name=name: stage(f"{name}: {what}", share), should_stop=should_stop,
            )  # fmt: skip
            if run.metrics["stopped"] == "stopped by hand":
                return results
            add(
                results, path, f"{method}/{k}", seed, run.metrics["after"]["summary"], config, overrides,
                steps=run.metrics["steps"], seconds=run.metrics["seconds"], hardware=hardware,
                peak_memory_mb=run.metrics["peak_memory_mb"], date=run.metrics["date"],
            )  # fmt: skip
            lm, experts = next_round(run)
            del run
    return results


def to_base(run) -> dict[str, float]:
    """ROUGE-L of the answers to the target's own, on what was to be kept."""
    groups = run.metrics["after"]
    kept = [g for g in ("retain", "general") if "rouge_l_to_base" in groups.get(g, {})]
    return {f"{g}_ROUGE_to_base": groups[g]["rouge_l_to_base"] for g in kept}


def identity(method: str, seed: int, config: GridConfig, overrides: dict) -> str:
    return json.dumps(
        [method, seed, config.forget, config.model, config.retain_items, config.limit, config.kept, overrides]
    )


def add(results: dict, path: Path, method: str, seed: int, metrics: dict, config, overrides: dict, **more) -> None:
    entry = {"id": identity(method, seed, config, overrides), "method": method, "seed": seed}
    entry["metrics"] = {k: round(v, 9) if abs(v) > 1e-6 else v for k, v in metrics.items()}
    entry["config"] = asdict(config) | {"overrides": overrides} | {k: more.pop(k) for k in ("train",) if k in more}
    results["runs"].append(entry | more)
    write_json(path, results)
