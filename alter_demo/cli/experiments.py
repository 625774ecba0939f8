"""Commands that compare (tofu, attack, wmdp, ...), and those that read their results."""

import sys
from functools import partial
from pathlib import Path

from ..options import check_value
from .commands import (
    FOUR_BIT,
    MODEL,
    RESULTS,
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
from .terminal import TerminalCallback, escape, print_table, print_text

FINISHED = "Finished cells are kept."
TAUGHT_SETS = "imaginary-authors, tofu-forget01, 05 or 10"
ATTACKED = ["alter_selective", "alter", "npo", "grad_diff", "rmu", "lora"]
ALTERS = ["alter", "alter_selective"]
OWN_SIZE = ("imaginary-authors", "harry-potter")  # small enough to use whole
RETAIN_MODEL = argument("--retain-model", help="model that never saw the forget set")


def forget(default: str, text: str):
    return argument("--forget", default=default, help=text)


def methods(default: list[str], nargs: str = "+"):
    return argument("--methods", nargs=nargs, default=default, help="methods, or all")


def size(default: str):
    text = "cpu (12 authors), full (all, for a GPU), tune, or small"
    return argument("--size", default=default, help=text)


def config_of(args, size: str | None = None, **values):
    """The GridConfig of a command."""
    from ..experiments.cells import grid_config

    values |= {"forget": args.forget, "model": args.model, "limit": getattr(args, "limit", None)}
    config = grid_config(size or args.size, **values)
    if args.forget in OWN_SIZE:
        config.retain_items = None
    return config


def run_grid(args, name: str, run, size: str | None = None, **values) -> None:
    """Run an experiment and print its results.

    Args:
        name: of the results file in assets/results, if --results names no other.
        run: function of (GridConfig, GridOptions).
    """
    from ..baselines.methods import METHODS
    from ..experiments.cells import GridOptions
    from ..models.loading import choose_device, choose_dtype

    config = config_of(args, size, **values)
    device, command = choose_device(args.device), args.typed
    if args.dtype == "auto":  # float32 on a CPU gives the same figures on another processor
        args.dtype = "float32" if device == "cpu" else choose_dtype("auto", device)
    if args.results is None:
        args.results = RESULTS / f"{name}.json"
        command += f" --results {args.results}"
    with TerminalCallback("finished cells are kept") as callback:
        options = GridOptions(
            args.results,
            methods=list(METHODS) if args.methods == ["all"] else args.methods,
            seeds=args.seeds,
            overrides=parse_settings(getattr(args, "set", [])),
            device=args.device,
            dtype=args.dtype,
            load_in_4bit=args.load_in_4bit,
            retain_model=getattr(args, "retain_model", None),
            callbacks=[callback],
            timed=not args.untimed,
            command=command,
        )
        results = run(config, options)
    print_results(results)


def print_results(results: dict) -> None:
    """The table of a results file."""
    from ..experiments.report import result_type

    frame = result_type(results).frame(results)
    shown = frame.map(lambda v: "" if v != v else f"{v:.3g}" if isinstance(v, float) else str(v))
    print_table(frame.columns.astype(str), shown.values.tolist())


@command(
    grid_arguments(),
    SETTINGS,
    forget("tofu-forget01", f"{TAUGHT_SETS}, or harry-potter"),
    size("cpu"),
    methods(["all"], nargs="*"),
    argument("--limit", type=int, help="measured examples per group (default: the size's)"),
    argument("--rounds", type=int, help="forget the set in so many rounds, each from the last"),
    RETAIN_MODEL,
    kept=FINISHED,
)
def tofu(args) -> None:
    """Compare methods and seeds on one set; continues where it stopped."""
    from ..experiments.rounds import run_rounds
    from ..experiments.tofu import run_tofu

    names = {"tofu-forget01": "tofu", "harry-potter": "harry-potter-methods"}
    name = names.get(args.forget, Path(args.forget).stem)
    if args.rounds is None:
        run_grid(args, name, run_tofu)
    else:
        run_grid(args, f"{name}-rounds", partial(run_rounds, rounds=args.rounds))


@command(
    grid_arguments(),
    SETTINGS,
    forget("imaginary-authors", TAUGHT_SETS),
    size("cpu"),
    methods(ATTACKED),
    argument("--items", type=int, default=24, help="forget questions to ask"),
    kept=FINISHED,
)
def attack(args) -> None:
    """Unlearn, then try to get it back: prompts, samples, rounding, relearning."""
    from ..experiments.attacks import AttackConfig
    from ..experiments.robustness import run_attacks

    check_value("items", args.items, {"min": 2})
    run_grid(args, "attacks", partial(run_attacks, attacks=AttackConfig(items=args.items)))


@command(
    grid_arguments(),
    SETTINGS,
    forget("auto", "wmdp-cyber, wmdp-bio, school, harry-potter, auto"),
    methods(ALTERS),
    argument("--tasks", nargs="+", default=[], help="lm-eval tasks, what is forgotten first"),
    argument("--limit", type=int, help="questions per task (default: all)"),
    kept=FINISHED,
)
def wmdp(args) -> None:
    """Ask multiple-choice questions before and after: WMDP and MMLU, or school subjects."""
    from ..experiments.multiple_choice import choose_forget_set, run_multiple_choice

    given, args.forget = args.forget, choose_forget_set(args.forget)
    if given == "auto" and args.forget == "school":
        print("The hub is out of reach: school subjects stand in for WMDP.", file=sys.stderr)
    name = "harry-potter-choice" if args.forget == "harry-potter" else args.forget
    run_grid(args, name, partial(run_multiple_choice, names=args.tasks), "full", tokens=64)


@command(
    grid_arguments(),
    forget("muse-news", "muse-news or muse-books"),
    methods(ALTERS),
    argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="of the set"),
    argument("--rounds", type=int, help="forget the set in so many rounds instead"),
    RETAIN_MODEL,
    kept=FINISHED,
)
def muse(args) -> None:
    """Measure what is left of news or books (MUSE), by the share of the set or by rounds."""
    from ..experiments.muse import KNOWLEDGE_TOKENS, run_muse
    from ..experiments.rounds import run_rounds

    if args.rounds is None:
        name, run = args.forget, partial(run_muse, shares=args.shares)
    else:
        name, run = f"{args.forget}-rounds", partial(run_rounds, rounds=args.rounds)
    run_grid(args, name, run, "full", tokens=KNOWLEDGE_TOKENS)


@command(
    grid_arguments(seeds=(0,)),
    forget("imaginary-authors", TAUGHT_SETS),
    size("tune"),
    argument("--method", default="alter_selective", help="alter or alter_selective"),
    argument("--variants", nargs="*", metavar="NAME", help="variants (default: all)"),
    kept=FINISHED,
)
def ablation(args) -> None:
    """Take parts out of ALTER one by one, and change its numbers."""
    from ..experiments.ablation import VARIANTS, run_ablation

    args.methods = [args.method]
    variants = list(VARIANTS) if args.variants is None else args.variants
    run_grid(args, "ablation", partial(run_ablation, variants=variants))


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


@command(
    RUN,
    argument("--forget", default="harry-potter", help="the run's forget set, to compare with"),
    argument("--number", type=int, default=20, help="stored prompts to read"),
)
def bank(args) -> None:
    """Try to read the stored prompts out of a run's adapter."""
    from ..data.forget_sets import load_forget_set
    from ..experiments.read_bank import read_bank, share_read
    from ..run import load_run

    with TerminalCallback() as callback:
        run, forget_set = load_run(args.run), load_forget_set(args.forget)
        questions, readings = read_bank(run, forget_set, args.number, callback)
    rows = [
        [escape(question), escape(", ".join(own.words)), escape(own.prompt), f"{own.cosine:.2f}"]
        for question, own in zip(questions, readings, strict=True)
    ]
    print_table(("stored question", "nearest words", "built from them", "cosine"), rows)
    words, prompts = (share_read(questions, readings, what) for what in ("words", "prompt"))
    print_text(
        f"Of the names in these questions, {words:.0%} begin like one of the nearest ten words, "
        f"and {prompts:.0%} like a word of the prompt that was built."
    )


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
