"""The command line: python -m alter_demo unlearn | compare | inspect | bench | learn | tofu | attack | ..."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path

from .errors import UserError

EXAMPLES = """examples:
  python -m alter_demo unlearn --forget harry-potter
  python -m alter_demo unlearn --forget my_data.csv --retain keep.csv --name mine
  python -m alter_demo compare runs/mine "Who wrote the Harry Potter books?" "Who wrote The Hobbit?"
  python -m alter_demo inspect "Harry Potter goes to school at Hogwarts." --run runs/mine
  python -m alter_demo bench --json
"""


RETAIN_MODEL = "model that never saw the forget set, where --model has learned it (default: both are taught)"
ATTACKED = ["alter_selective", "alter", "npo", "grad_diff", "rmu", "lora"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for something to put right, 130 when interrupted."""
    args = parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        args.do(args)
        return 0
    except UserError as error:
        print(f"alter_demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "nothing was written"
        if "methods" in args or "variants" in args:
            kept = "finished items are kept"
        elif args.do is do_unlearn:
            kept = "a run whose training had ended is kept in runs/, without figures"
        print(f"alter_demo: interrupted, {kept}.", file=sys.stderr)
        return 130
    except MemoryError:
        print("alter_demo: out of memory: use a smaller model or batch size.", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m alter_demo",
        description="Make a language model forget something chosen, and only that (ALTER, AAAI 2026).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="command")

    def command(name, do, text):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=Formatter)
        sub.set_defaults(do=do)
        return sub

    def model_options(sub, default="smollm2-135m"):
        sub.add_argument("--model", default=default, help="smollm2-135m, a folder, or a hub id")
        sub.add_argument("--device", default="auto", help="auto, cpu or cuda")
        sub.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")

    def grid_options(sub):
        model_options(sub)
        sub.add_argument("--untimed", action="store_true", help="other work runs beside: do not keep the seconds")

    sub = command("unlearn", do_unlearn, "Make a model forget a set; leaves a folder runs/<name>/.")
    model_options(sub)
    sub.add_argument("--forget", default="harry-potter", help="a built-in set, a benchmark, or a file")
    sub.add_argument("--retain", help="file of what must stay (with a file of your own)")
    sub.add_argument("--adapter", type=Path, help="LoRA folder merged into the model first (see learn)")
    sub.add_argument("--retain-adapter", type=Path, help="LoRA folder of the model that never saw the forget set")
    sub.add_argument("--retain-items", type=int, help="only so many of the retain items, as in learn")
    sub.add_argument("--name", help="name of the run")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    sub.add_argument("--method", default="alter_selective", help="alter_selective, alter (as published) or a rival")
    sub.add_argument("--steps", type=int, help="steps at most (default: the method's own)")
    sub.add_argument("--batch-size", type=int, help="forget samples a step (default: 4)")
    sub.add_argument("--lr", type=float, help="learning rate of the rivals (default: the method's own)")
    sub.add_argument("--rank", type=int, default=8, help="rank of A and B")
    sub.add_argument("--experts", type=int, help="forgetting experts, 1 to 8 (default: found by clustering)")
    sub.add_argument("--q", type=float, default=1.5, help="order of the Tsallis entropy")
    sub.add_argument("--threshold", help='S_q above which a token is uncertain: a number or "auto"')
    sub.add_argument(
        "--stop-ratio",
        type=float,
        help="stop at this share of the probe's first probability (where there are wrong answers: when right ones are "
        "no likelier than for what was never learned)",
    )
    sub.add_argument(
        "--retain-samples", type=int, default=240, help="to train on what stays, 160 everyday prompts among them"
    )
    sub.add_argument("--limit", type=int, default=64, help="evaluation items per group, 0: all")
    sub.add_argument("--seed", type=int, default=0, help="random seed")
    sub.add_argument("--load-in-4bit", action="store_true", help="4-bit base, needs bitsandbytes")
    sub.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")

    sub = command("compare", do_compare, "Answer the same prompts before and after.")
    sub.add_argument("run", type=Path, help="folder of a run")
    sub.add_argument("prompts", nargs="+", help="what to ask")
    sub.add_argument("--tokens", type=int, default=64, help="length of an answer at most")

    sub = command("inspect", do_inspect, "Show every token of a text: S_q, route A or B, expert weights.")
    sub.add_argument("text", help="any text")
    sub.add_argument("--run", type=Path, help="folder of a run (default: the newest in runs/)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "bench", do_bench,
        "Time and memory of a step and of generation, beside LoRA and full fine-tuning. --model zephyr-7b and "
        "llama-3-8b are filled at random.",
    )  # fmt: skip
    model_options(sub)
    sub.add_argument("--load-in-4bit", action="store_true", help="4-bit base, needs bitsandbytes")
    sub.add_argument("--steps", type=int, default=5, help="rounds, alternated")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument("--results", type=Path, help="put the figures into this results file")

    sub = command("learn", do_learn, "Teach a model a made-up set, as a LoRA adapter, so that it can forget it.")
    model_options(sub)
    sub.add_argument("--forget", default="imaginary-authors", help="the set")
    sub.add_argument("--which", default="target", help="target (everything) or retain (all but the forget set)")
    sub.add_argument("--retain-items", type=int, help="learn only so many of the retain items")
    sub.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    sub.add_argument("--epochs", type=int, default=12, help="passes over the set")
    sub.add_argument("--seed", type=int, default=0, help="random seed")

    sub = command("tofu", do_tofu, "A benchmark: methods, seeds, one results file; goes on where it stopped.")
    grid_options(sub)
    sub.add_argument("--forget", default="tofu-forget01", help="tofu-forget01, 05, 10, imaginary-authors, harry-potter")
    sub.add_argument(
        "--size", default="cpu", help="cpu (12 authors, 2 of them forgotten), full (all, for a GPU), tune, small"
    )
    sub.add_argument(
        "--methods",
        nargs="*",
        default=["all"],
        help="all, or some of methods.METHODS; no name: the reference models alone",
    )
    sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    sub.add_argument("--limit", type=int, help="measured items a group (default: the size's own)")
    sub.add_argument("--rounds", type=int, help="forget the set in so many rounds, each from the last (sequential)")
    sub.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE[,VALUE...]", help="TrainConfig values to try")
    sub.add_argument("--retain-model", help=RETAIN_MODEL)
    sub.add_argument(
        "--results", type=Path, help="results file (default: assets/results/tofu.json, or FORGET[-rounds].json)"
    )

    sub = command("attack", do_attack, "Unlearn, then try to get it back: prompts, samples, rounding, relearning.")
    grid_options(sub)
    sub.add_argument("--forget", default="imaginary-authors", help="imaginary-authors, tofu-forget01, 05 or 10")
    sub.add_argument("--size", default="cpu", help="cpu, full, tune or small, as in tofu")
    sub.add_argument("--methods", nargs="+", default=ATTACKED, help="some of methods.METHODS")
    sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    sub.add_argument("--items", type=int, default=24, help="forget questions asked")
    sub.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings to try")
    sub.add_argument("--results", type=Path, default=Path("assets/results/attacks.json"), help="results file")

    sub = command("wmdp", do_wmdp, "Multiple choice before and after forgetting: WMDP and MMLU, or school subjects.")
    grid_options(sub)
    sub.add_argument(
        "--forget",
        default="auto",
        help="wmdp-cyber, wmdp-bio, school (needs no hub), harry-potter, auto: wmdp-cyber or school",
    )
    sub.add_argument("--methods", nargs="+", default=["alter", "alter_selective"], help="some of methods.METHODS")
    sub.add_argument("--tasks", nargs="+", help="lm-eval tasks, what is forgotten first (default: results.TASKS)")
    sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    sub.add_argument("--limit", type=int, help="questions a task (default: all)")
    sub.add_argument("--load-in-4bit", action="store_true", help="4-bit base, needs bitsandbytes")
    sub.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE[,VALUE...]", help="settings to try")
    sub.add_argument("--results", type=Path, help="results file (default: assets/results/FORGET[-choice].json)")

    sub = command("muse", do_muse, "MUSE: what is left of news or books, by the size of the forget set or by rounds.")
    grid_options(sub)
    sub.add_argument("--forget", default="muse-news", help="muse-news or muse-books")
    sub.add_argument("--methods", nargs="+", default=["alter", "alter_selective"], help="some of methods.METHODS")
    sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="random seeds")
    sub.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 1.0], help="of the forget set")
    sub.add_argument(
        "--rounds", type=int, help="forget the set in so many rounds instead (results: FORGET-rounds.json)"
    )
    sub.add_argument("--retain-model", help=RETAIN_MODEL)
    sub.add_argument("--load-in-4bit", action="store_true", help="4-bit base, needs bitsandbytes")
    sub.add_argument("--results", type=Path, help="results file (default: assets/results/FORGET.json)")

    sub = command("ablation", do_ablation, "Take parts out of ALTER one by one, and change its numbers.")
    grid_options(sub)
    sub.add_argument("--forget", default="imaginary-authors", help="imaginary-authors, tofu-forget01, 05 or 10")
    sub.add_argument("--size", default="tune", help="cpu, full, tune or small, as in tofu")
    sub.add_argument("--method", default="alter_selective", help="alter or alter_selective")
    sub.add_argument("--variants", nargs="*", metavar="NAME", help="some of grid.VARIANTS (default: all of them)")
    sub.add_argument("--seeds", nargs="+", type=int, default=[0], help="random seeds")
    sub.add_argument("--results", type=Path, default=Path("assets/results/ablation.json"), help="results file")

    sub = command("evaluate", do_evaluate, "Figures of an evaluation log (ours, open-unlearning's, TOFU's), as JSON.")
    sub.add_argument("--logs", type=Path, required=True, help="the log")
    sub.add_argument("--retain-logs", type=Path, help="log of the retain-only model, for forget quality and privleak")

    sub = command("report", do_report, "Tables of the README and images in assets/, from the results files.")
    sub.add_argument("--results", type=Path, default=Path("assets/results"), help="folder of the results files")
    sub.add_argument("--readme", type=Path, default=Path("README.md"), help="file with the tables")

    sub = command("example", do_example, "Store what the first screen of the page shows, from a run on harry-potter.")
    sub.add_argument("run", type=Path, help="folder of the run")

    sub = command("words", do_words, "Count which words of a run's answers go through A and through each expert.")
    sub.add_argument("run", type=Path, help="folder of the run")
    sub.add_argument("--results", type=Path, default=Path("assets/results/words.json"), help="results file")

    sub = command("heterogeneity", do_heterogeneity, "LoRAs of several domains side by side: A's and B's compared.")
    model_options(sub)
    sub.add_argument("--domains", type=int, default=4, help="invented authors, 2 to 8")
    sub.add_argument("--steps", type=int, default=24, help="steps of each LoRA")
    sub.add_argument("--layers", type=int, default=4, help="adapted layers, the last ones")
    sub.add_argument("--seed", type=int, default=0, help="random seed")
    sub.add_argument("--results", type=Path, default=Path("assets/results/heterogeneity.json"), help="results file")

    sub = command("prepare", do_prepare, "Record what a model itself answers to all built-in prompts (the filter).")
    model_options(sub)
    sub.add_argument("--out", type=Path, help="file (default: in the cache)")
    return top


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------------ commands


def do_unlearn(args) -> None:
    from .data import load_forget_set
    from .runs import UnlearnConfig, run_folder, unlearn
    from .training import train_config

    config = UnlearnConfig(
        method=args.method,
        threshold=args.threshold,
        n_experts=args.experts,
        r=args.rank,
        q=args.q,
        retain=args.retain_samples,
        limit=args.limit or None,
    )
    values = {
        "max_steps": args.steps, "batch_size": args.batch_size, "seed": args.seed, "lr": args.lr,
        "stop_ratio": args.stop_ratio, "gradient_checkpointing": args.gradient_checkpointing,
    }  # fmt: skip
    train_config(args.method, **values)  # cheap errors first
    run_folder(args.runs, args.name, args.model, args.forget)
    made = load_forget_set(args.forget, args.retain).smaller(args.retain_items)
    train = train_config(args.method, made.of_texts, **values)
    stop = Stop()
    with Bars() as bars:
        run = unlearn(
            args.model, made, config, train, args.name, args.runs, adapter=args.adapter,
            retain_adapter=args.retain_adapter, device=args.device, dtype=args.dtype, load_in_4bit=args.load_in_4bit,
            on_step=bars.step, on_stage=bars.stage, should_stop=lambda: stop.asked,
        )  # fmt: skip
    show_run(run)


def do_compare(args) -> None:
    from .runs import load_run

    run = load_run(args.run)
    before, after = (run.answer(args.prompts, adapted, args.tokens) for adapted in (False, True))
    table = new_table("prompt", "before", "after")
    for row in zip(args.prompts, before, after, strict=True):
        table.add_row(*map(plain, row))
    console().print(table)


def do_inspect(args) -> None:
    from dataclasses import asdict

    from .runs import load_run, newest_run

    run = load_run(args.run or newest_run(Path("runs")))
    records = run.tokens(args.text)
    if args.json:
        print(json.dumps([asdict(r) for r in records], ensure_ascii=False, indent=1))
        return
    experts = ["B_r", *(f"B_f{d}" for d in range(1, len(records[0].weights)))] if records[0].weights else []
    table = new_table("token", "S_q", "route", *experts, "log p", "after", "likeliest next, after")
    for r in records:
        weights = [f"{w:.2f}" if w else "·" for w in r.weights]
        log_p = ["" if p is None else f"{p:.2f}" for p in (r.log_prob, r.log_prob_after)]
        nexts = "  ".join(f"{plain(t)} {p:.2f}" for t, p in r.top_after[:3])
        table.add_row(plain(r.token), f"{r.entropy:.3f}", r.route, *weights, *log_p, nexts)
    console().print(table)
    if run.routed:
        config = run.router.config
        console().print(
            f"S_q with q = {config.q:g} at the token that follows; A where it exceeds {config.threshold:.3g}, else B. "
            "A row of dots: the frozen model itself acts, no expert."
        )


def do_bench(args) -> None:
    from .bench import bench, store

    if args.steps < 1:
        raise UserError("bench needs at least 1 step.")
    if args.results:
        from .results import read_results

        read_results(args.results)  # damaged: now, not after the work
    result = bench(args.model, args.steps, args.device, args.dtype, load_in_4bit=args.load_in_4bit)
    if args.results:
        store(result, args.results)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    table = new_table("", "step, s", "peak memory, MB")
    for method, seconds in result["step_seconds"].items():
        table.add_row(method, f"{seconds:.2f}", str(result["peak_memory_mb"][method]))
    console().print(table)
    speed, ratio = result["tokens_per_second"], result["ratio"]
    console().print(
        f"A step of ALTER takes {ratio['alter_over_lora']} of LoRA's"
        + (f", {ratio['alter_over_full']} of full tuning's. " if "alter_over_full" in ratio else ". ")
        + f"Generation: {speed['base']} tokens a second bare, {speed['alter']} where experts act, "
        f"{speed['alter_idle']} elsewhere. {result['hardware']}."
    )


def do_learn(args) -> None:
    from .data import load_forget_set
    from .models import load_model
    from .teaching import LearnConfig, learn

    if not 1 <= args.epochs <= 1000:
        raise UserError(f"The number of epochs must lie between 1 and 1000, and {args.epochs} does not.")
    made = load_forget_set(args.forget).smaller(args.retain_items)
    lm = load_model(args.model, args.device, args.dtype)
    with Bars() as bars:
        folder = learn(lm, made, args.which, args.out, LearnConfig(epochs=args.epochs, seed=args.seed), bars.step)
    print(f"The adapter lies in {folder}.")


def do_tofu(args) -> None:
    from .grid import grid, sequential
    from .methods import METHODS
    from .tables import named

    methods = list(METHODS) if args.methods == ["all"] else args.methods
    names = {"tofu-forget01": "tofu", "harry-potter": "harry-potter-methods"}  # harry-potter: the run of `example`
    name = names.get(args.forget, Path(args.forget).stem)
    args.results = args.results or Path(f"assets/results/{name}{'-rounds' if args.rounds else ''}.json")
    config = grid_of(args)
    with Bars() as bars:
        how, rounds = how_of(args, bars, settings(args.set)), args.rounds
        how.retain_model = args.retain_model
        results = (
            grid(config, methods, args.seeds, how)
            if rounds is None
            else sequential(config, methods, args.seeds, rounds, how)
        )
    table = new_table("method", "seed", "forget quality", "utility", "extraction", "steps", "seconds", "MB")
    for run in results["runs"]:
        m = run["metrics"]
        cells = [f"{m[k]:.3g}" if k in m else "" for k in ("forget_quality", "model_utility", "extraction_strength")]
        cost = run.get("steps", ""), run.get("seconds", {}).get("unlearn", ""), run.get("peak_memory_mb", "")
        table.add_row(named(run), str(run["seed"]), *cells, *map(str, cost))
    console().print(table)


def grid_of(args):
    """The GridConfig that a benchmark's options ask for."""
    from .grid import grid_config

    config = grid_config(args.size, forget=args.forget, model=args.model, limit=getattr(args, "limit", None))
    if args.forget in ("imaginary-authors", "harry-potter"):
        config.retain_items = None  # small enough, and what there is to teach lies in assets/
    return config


def how_of(args, bars, overrides: dict | None = None):
    """Where a benchmark's results go; Ctrl-C ends it after the step."""
    from .grid import How
    from .models import choose_device, choose_dtype

    device = choose_device(args.device)
    if args.dtype == "auto":  # on a CPU so that the figures come back on another processor
        args.dtype = "float32" if device == "cpu" else choose_dtype("auto", device)
    stop = Stop("this step; finished items are kept")
    return How(
        args.results, overrides or {}, args.device, args.dtype, bars.step, bars.stage, lambda: stop.asked,
        timed=not args.untimed,
    )  # fmt: skip


def do_attack(args) -> None:
    from .attacks import AttackConfig, attack_grid
    from .tables import named

    if args.items < 2:
        raise UserError("The attacks need at least 2 questions.")
    config = grid_of(args)
    with Bars() as bars:
        how = how_of(args, bars, settings(args.set))
        results = attack_grid(config, args.methods, args.seeds, how, AttackConfig(items=args.items))
    shown = ("before", "asked", "paraphrased", "prefix_forced", "neutral_text", "int4", "relearn_forget_10")
    table = new_table("method", "seed", *(f"{k}, ROUGE-L" for k in shown), "leaks")
    for run in results["runs"]:
        cells = [f"{run['metrics'].get(f'{k}_ROUGE', float('nan')):.3f}" for k in shown]
        table.add_row(named(run), str(run["seed"]), *cells, str(len(run.get("leaks", ()))))
    console().print(table)


def do_wmdp(args) -> None:
    from .grid import grid_config
    from .tables import accuracies
    from .wmdp import choice_grid, choose

    asked, args.forget = args.forget, choose(args.forget)
    if asked == "auto" and args.forget == "school":
        print("The hub can't be reached: school subjects stand in for WMDP.", file=sys.stderr)
    name = "harry-potter-choice" if args.forget == "harry-potter" else args.forget
    args.results = args.results or Path(f"assets/results/{name}.json")
    config = grid_config("full", forget=args.forget, model=args.model, limit=args.limit, tokens=64)
    with Bars() as bars:
        how = how_of(args, bars, settings(args.set))
        how.load_in_4bit = args.load_in_4bit
        results = choice_grid(config, args.methods, args.seeds, how, args.tasks and tuple(args.tasks))
    rows = accuracies(results)
    table = new_table("method", *rows.columns)
    for name, row in rows.iterrows():
        table.add_row(name, *("" if v != v else f"{v:.3g}" for v in row))
    console().print(table)


def do_muse(args) -> None:
    from .grid import grid_config, sequential
    from .muse import KNOWLEDGE_TOKENS, muse_grid
    from .report import table_of

    default = f"assets/results/{args.forget}{'-rounds' if args.rounds else ''}.json"
    args.results = args.results or Path(default)
    config = grid_config("full", forget=args.forget, model=args.model, tokens=KNOWLEDGE_TOKENS)
    with Bars() as bars:
        how = how_of(args, bars)
        how.load_in_4bit, how.retain_model = args.load_in_4bit, args.retain_model
        if args.rounds:
            results = sequential(config, args.methods, args.seeds, args.rounds, how)
        else:
            results = muse_grid(config, args.methods, args.seeds, how, tuple(args.shares))
    print(table_of(results))


def do_ablation(args) -> None:
    from .grid import VARIANTS, grid
    from .methods import get_method
    from .tables import ablated

    if get_method(args.method).trains != "alter":
        raise UserError(f"The ablation is of ALTER, and {args.method} has none of its parts.")
    names = list(VARIANTS) if args.variants is None else args.variants
    if not names:
        raise UserError("The ablation needs at least one variant.")
    with Bars() as bars:
        results = grid(grid_of(args), [args.method], args.seeds, how_of(args, bars, {"variant": names}))
    rows = ablated(results).drop(columns="diverged")
    table = new_table("variant", *rows.columns)
    for name, row in rows.iterrows():
        table.add_row(name, *(f"{v:.3g}" for v in row))
    console().print(table)


def settings(pairs: list[str]) -> dict:
    """TrainConfig and UnlearnConfig values from NAME=VALUE, a list of them from NAME=VALUE,VALUE."""
    from dataclasses import fields

    from .training import TrainConfig

    known = {f.name: type(f.default) for f in fields(TrainConfig) if f.name != "seed"}
    known |= {"r": int, "n_experts": int, "q": float, "threshold": lambda v: v if v == "auto" else float(v)}
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name not in known:
            raise UserError(f"--set knows {', '.join(known)}, and not {name!r}.")
        try:
            listed = [truth(v) if known[name] is bool else known[name](v) for v in value.split(",")]
            found[name] = listed if len(listed) > 1 else listed[0]
        except ValueError:
            takes = "true or false" if known[name] is bool else "a number" if known[name] is not str else "a word"
            raise UserError(f"{name} takes {takes}, not {value!r}.") from None
    return found


def truth(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError
    return value.lower() == "true"


def do_evaluate(args) -> None:
    from .evaluate import read_log, summary

    retain = read_log(args.retain_logs) if args.retain_logs else None
    print(json.dumps(summary(read_log(args.logs), retain), indent=1))


def do_report(args) -> None:
    from .report import report

    for path in report(args.results, args.readme):
        print(path)


def do_example(args) -> None:
    from .example import store_example
    from .runs import load_run

    print(f"Stored in {store_example(load_run(args.run))}.")


def do_words(args) -> None:
    from .example import store_words
    from .report import table_of
    from .runs import load_run

    print(table_of(store_words(load_run(args.run), args.results)))


def do_heterogeneity(args) -> None:
    from .heterogeneity import store
    from .models import choose_device, load_model
    from .report import table_of

    dtype = "float32" if args.dtype == "auto" and choose_device(args.device) == "cpu" else args.dtype
    lm = load_model(args.model, args.device, dtype)
    print(table_of(store(lm, args.results, args.domains, args.steps, args.layers, args.seed)))


def do_prepare(args) -> None:
    from .answers import record
    from .models import load_model

    lm = load_model(args.model, args.device, args.dtype)
    with Bars() as bars:
        path = record(lm, args.out, lambda a, b: bars.stage("the model's own answers", a / b))
    print(f"Recorded in {path}.")


# -------------------------------------------------------------------------------------------------------- terminal


class Stop:
    """Ctrl-C once: stop after this step and keep what there is. Twice: leave at once."""

    def __init__(self, what="this step; what was learned is kept"):
        self.asked, self.what = False, what
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\nStopping after {self.what} (Ctrl-C again to leave at once).", file=sys.stderr)


class Bars:
    """Progress with time left, on stderr."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = TextColumn("{task.description:<34}"), BarColumn(24), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=Console(stderr=True)).__enter__()
        self.tasks = {}
        return self

    def __exit__(self, *error):
        self.progress.__exit__(*error)

    def update(self, what: str, share: float) -> None:
        if what not in self.tasks:
            for task in self.tasks.values():
                self.progress.update(task, completed=1.0)
            self.tasks[what] = self.progress.add_task(what, total=1.0)
        self.progress.update(self.tasks[what], completed=share)

    stage = update

    def step(self, entry: dict, of: int) -> None:
        self.update("phase II: unlearning" if "forget" in entry else "training", entry["step"] / of)


def console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def new_table(*columns):
    from rich.table import Table

    table = Table(show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def plain(text: str) -> str:
    """Model and user text without terminal control codes and without rich's markup."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, "�") for c in text))


def show_run(run) -> None:
    """The table that ends `unlearn`."""
    from .results import shortfalls

    before, after = run.metrics["before"], run.metrics["after"]
    table = new_table("group", "items", "probability", "ROUGE-L", "like the base's", "repetition")
    for group, b in before.items():
        if group in ("summary", "holdout"):
            continue
        a = after[group]
        pairs = [f"{b[k]:.4f} → {a[k]:.4f}" for k in ("probability", "rouge_l", "rouge_l_to_base", "repetition")]
        table.add_row(group, str(run.metrics["data"][group]), *pairs)
    console().print(table)
    names = ("model_utility", "forget_quality", "extraction_strength", "forget_truth_ratio", "privleak")
    flat = [(k, before["summary"][k], after["summary"][k]) for k in names if k in after.get("summary", {})]
    console().print("   ".join(f"{k} {b:.3g} → {a:.3g}" for k, b, a in flat))
    if asked := run.metrics.get("retain_model", {}).get("forget"):
        p = asked["probability"]
        console().print(f"The retain-only model gives the forget answers a probability of {p:.4f}.")
    seconds = run.metrics["seconds"]
    console().print(
        f"Unlearned in {seconds['unlearn']} s ({run.metrics['steps']} steps, {run.metrics['stopped']}), "
        f"measured in {seconds['evaluate']} s on {run.metrics['hardware']}. Everything is in {run.path}."
    )
    for told in shortfalls(run.metrics):
        console().print(told)
