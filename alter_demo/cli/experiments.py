"""Commands that compare (tofu, attack, wmdp, ...), and those that read their results."""

from __future__ import annotations

import sys
from pathlib import Path

from ..files import RESULTS
from ..options import check_value
from .commands import (
    FOUR_BIT,
    MODEL,
    RUN,
    SEED,
    SETTINGS,
    argument,
    command,
    grid_arguments,
    parse_settings,
    print_json,
    results_file,
)
from .terminal import TerminalCallback, print_table, print_text

RETAIN_MODEL = "model that never saw the forget set, where --model has learned it"
FINISHED = "Finished cells are kept."
TAUGHT_SETS = "imaginary-authors, tofu-forget01, 05 or 10"
SIZE = "cpu (12 authors), full (all, for a GPU), tune, or small"
ATTACKED = ["alter_selective", "alter", "npo", "grad_diff", "rmu", "lora"]
OWN_SIZE = ("imaginary-authors", "harry-potter")  # small enough to use whole


def grid_options(args, callback, name: str, overrides: dict | None = None):
    """The GridOptions of a command; its results go to `name`.json unless --results says else."""
    from ..experiments.cells import GridOptions
    from ..models.loading import choose_device, choose_dtype

    device, dtype = choose_device(args.device), args.dtype
    if dtype == "auto":  # float32 on a CPU gives the same figures on another processor
        dtype = "float32" if device == "cpu" else choose_dtype("auto", device)
    command = args.typed
    if args.results is None:
        args.results = RESULTS / f"{name}.json"
        command += f" --results assets/results/{name}.json"
    return GridOptions(
        args.results,
        methods=all_methods(args.methods),
        seeds=args.seeds,
        overrides=parse_settings(getattr(args, "set", [])) if overrides is None else overrides,
        device=args.device,
        dtype=dtype,
        load_in_4bit=args.load_in_4bit,
        retain_model=getattr(args, "retain_model", None),
        callbacks=[callback],
        timed=not args.untimed,
        command=command,
    )


def all_methods(names: list[str]) -> list[str]:
    from ..baselines.methods import METHODS

    return list(METHODS) if names == ["all"] else names


def grid_config(args, size: str | None = None, **values):
    """The GridConfig of a command."""
    from ..experiments.cells import grid_config

    values |= {"forget": args.forget, "model": args.model, "limit": getattr(args, "limit", None)}
    config = grid_config(size or args.size, **values)
    if args.forget in OWN_SIZE:
        config.retain_items = None
    return config


def progress() -> TerminalCallback:
    return TerminalCallback("finished cells are kept")


def print_results(results: dict) -> None:
    """The table of a results file."""
    from ..experiments.report import result_type

    frame = result_type(results).frame(results)
    shown = frame.map(lambda v: "" if v != v else f"{v:.3g}" if isinstance(v, float) else str(v))
    print_table(frame.columns.astype(str), shown.values.tolist())


@command(
    grid_arguments(),
    SETTINGS,
    argument("--forget", default="tofu-forget01", help=f"{TAUGHT_SETS}, or harry-potter"),
    argument("--size", default="cpu", help=SIZE),
    argument("--methods", nargs="*", default=["all"], help="methods; none: the references alone"),
    argument("--limit", type=int, help="measured examples per group (default: the size's)"),
    argument("--rounds", type=int, help="forget the set in so many rounds, each from the last"),
    argument("--retain-model", help=RETAIN_MODEL),
    kept=FINISHED,
)
def tofu(args) -> None:
    """Compare methods and seeds on one set; continues where it stopped."""
    names = {"tofu-forget01": "tofu", "harry-potter": "harry-potter-methods"}
    name = names.get(args.forget, Path(args.forget).stem)
    config = grid_config(args)
    with progress() as callback:
        options = grid_options(args, callback, name + ("-rounds" if args.rounds else ""))
        if args.rounds is None:
            from ..experiments.tofu import run_tofu

            results = run_tofu(config, options)
        else:
            from ..experiments.rounds import run_rounds

            results = run_rounds(config, options, args.rounds)
    print_results(results)


@command(
    grid_arguments(),
    SETTINGS,
    argument("--forget", default="imaginary-authors", help=TAUGHT_SETS),
    argument("--size", default="cpu", help=SIZE),
    argument("--methods", nargs="+", default=ATTACKED, help="methods to attack"),
    argument("--items", type=int, default=24, help="forget questions to ask"),
    kept=FINISHED,
)
def attack(args) -> None:
    """Unlearn, then try to get it back: prompts, samples, rounding, relearning."""
    from ..experiments.attacks import AttackConfig
    from ..experiments.robustness import run_attacks

    check_value("items", args.items, {"min": 2})
    with progress() as callback:
        options = grid_options(args, callback, "attacks")
        results = run_attacks(grid_config(args), options, AttackConfig(items=args.items))
    print_results(results)


@command(
    grid_arguments(),
    SETTINGS,
    argument("--forget", default="auto", help="wmdp-cyber, wmdp-bio, school, harry-potter, auto"),
    argument("--methods", nargs="+", default=["alter", "alter_selective"], help="methods"),
    argument("--tasks", nargs="+", default=[], help="lm-eval tasks, what is forgotten first"),
    argument("--limit", type=int, help="questions per task (default: all)"),
    kept=FINISHED,
)
def wmdp(args) -> None:
    """Ask multiple-choice questions before and after: WMDP and MMLU, or school subjects."""
    from ..experiments.multiple_choice import choose_forget_set, run_multiple_choice

    name, args.forget = args.forget, choose_forget_set(args.forget)
    if name == "auto" and args.forget == "school":
        print("The hub is out of reach: school subjects stand in for WMDP.", file=sys.stderr)
    file = "harry-potter-choice" if args.forget == "harry-potter" else args.forget
    config = grid_config(args, "full", tokens=64)
    with progress() as callback:
        options = grid_options(args, callback, file)
        results = run_multiple_choice(config, options, args.tasks)
    print_results(results)


@command(
    grid_arguments(),
    argument("--forget", default="muse-news", help="muse-news or muse-books"),
    argument("--methods", nargs="+", default=["alter", "alter_selective"], help="methods"),
    argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="of the set"),
    argument("--rounds", type=int, help="forget the set in so many rounds instead"),
    argument("--retain-model", help=RETAIN_MODEL),
    kept=FINISHED,
)
def muse(args) -> None:
    """Measure what is left of news or books (MUSE), by the share of the set or by rounds."""
    from ..experiments.muse import KNOWLEDGE_TOKENS, run_muse
    from ..experiments.rounds import run_rounds

    config = grid_config(args, "full", tokens=KNOWLEDGE_TOKENS)
    with progress() as callback:
        options = grid_options(args, callback, args.forget + ("-rounds" if args.rounds else ""))
        if args.rounds:
            results = run_rounds(config, options, args.rounds)
        else:
            results = run_muse(config, options, args.shares)
    print_results(results)


@command(
    grid_arguments(seeds=(0,)),
    argument("--forget", default="imaginary-authors", help=TAUGHT_SETS),
    argument("--size", default="tune", help=SIZE),
    argument("--method", default="alter_selective", help="alter or alter_selective"),
    argument("--variants", nargs="*", metavar="NAME", help="variants (default: all)"),
    kept=FINISHED,
)
def ablation(args) -> None:
    """Take parts out of ALTER one by one, and change its numbers."""
    from ..experiments.ablation import VARIANTS, run_ablation

    args.methods = [args.method]
    variants = list(VARIANTS) if args.variants is None else args.variants
    with progress() as callback:
        options = grid_options(args, callback, "ablation", overrides={})
        results = run_ablation(grid_config(args), options, variants)
    print_results(results)


@command(
    MODEL,
    FOUR_BIT,
    argument("--steps", type=int, default=5, help="rounds, alternated"),
    argument("--json", action="store_true", help="print JSON"),
    argument("--results", type=Path, help="add the figures to this results file"),
)
def bench(args) -> None:
    """Measure time and memory of a step and of generation, beside LoRA and full fine-tuning."""
    from ..experiments.results import read_results
    from ..experiments.speed import bench, store

    check_value("steps", args.steps, {"min": 1})
    if args.results:
        read_results(args.results)  # a damaged file fails now, not after the work
    loading = {"device": args.device, "dtype": args.dtype, "load_in_4bit": args.load_in_4bit}
    result = bench(args.model, args.steps, **loading)
    if args.results:
        store(result, args.results, args.typed)
    if args.json:
        print_json(result)
        return
    memory, speed, ratio = (result[k] for k in ("peak_memory_mb", "tokens_per_second", "ratio"))
    steps = result["step_seconds"].items()
    print_table(
        ("", "step, s", "peak memory, MB"), [(m, f"{s:.2f}", str(memory[m])) for m, s in steps]
    )
    full = f" and {ratio['alter_over_full']} of full tuning's" if "alter_over_full" in ratio else ""
    print_text(
        f"A step of ALTER takes {ratio['alter_over_lora']} of LoRA's time{full}. Generation: "
        f"{speed['base']} tokens per second without ALTER, {speed['alter']} where experts act, "
        f"{speed['alter_idle']} elsewhere. {result['hardware']}."
    )


@command(
    MODEL,
    SEED,
    argument("--domains", type=int, default=4, help="invented authors, 2 to 8"),
    argument("--steps", type=int, default=24, help="steps of each LoRA"),
    argument("--layers", type=int, default=4, help="adapted layers, the last ones"),
    results_file("heterogeneity.json"),
)
def heterogeneity(args) -> None:
    """Compare the A's and B's of LoRAs of several domains."""
    from ..experiments.heterogeneity import store
    from ..models.loading import choose_device, load_model

    on_cpu = args.dtype == "auto" and choose_device(args.device) == "cpu"
    lm = load_model(args.model, args.device, "float32" if on_cpu else args.dtype)
    sizes = args.domains, args.steps, args.layers, args.seed
    print_results(store(lm, args.results, *sizes, args.typed))


@command(RUN, results_file("words.json"))
def words(args) -> None:
    """Count which words of a run's answers go through A and through each expert."""
    from ..experiments.example import store_words
    from ..run import load_run

    print_results(store_words(load_run(args.run), args.results, command=args.typed))


@command(RUN)
def example(args) -> None:
    """Store the example on the page's first screen, from a run on harry-potter."""
    from ..experiments.example import store_example
    from ..run import load_run

    print(f"Stored in {store_example(load_run(args.run))}.")


@command(
    argument("--results", type=Path, default=RESULTS, help="folder (default: assets/results)"),
    argument("--documents", type=Path, nargs="*", help="default: README.md and docs/*.md"),
)
def report(args) -> None:
    """Write the tables of README and docs, and the images in assets/, from the results."""
    from ..experiments.report import report

    for path in report(args.results, args.documents):
        print(path)
