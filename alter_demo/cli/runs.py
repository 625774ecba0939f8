"""Commands on one run or one model: unlearn, compare, inspect, teach, prepare, evaluate."""

from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..options import check_value
from .commands import FOUR_BIT, MODEL, RUN, SEED, argument, command, config_values, print_json
from .terminal import TerminalCallback, escape, print_table, print_text

SUMMARY = (
    "model_utility",
    "forget_quality",
    "extraction_strength",
    "forget_truth_ratio",
    "privleak",
)

FORGET = [
    argument("--forget", default="harry-potter", help="a built-in set, a benchmark, or a file"),
    argument("--retain", help="file of what must stay, with a file of your own"),
    argument("--adapter", type=Path, help="LoRA folder to merge into the model (see teach)"),
]


@command(
    MODEL,
    FOUR_BIT,
    FORGET,
    argument("--retain-adapter", type=Path, help="LoRA folder of the retain model"),
    argument("--retain-items", type=int, help="use only so many retain examples, as in teach"),
    argument("--name", help="name of the run"),
    argument("--runs", type=Path, default=Path("runs"), help="folder of the runs"),
    argument("--method", default="alter_selective", help="alter_selective, alter, or a baseline"),
    kept="A run whose training had ended is kept, without figures.",
    config={"limit": 64},
)
def unlearn(args) -> None:
    """Make a model forget a set. Writes a folder runs/NAME/."""
    from ..config import flat_config
    from ..data.forget_sets import load_forget_set

    values = config_values(args)
    values["limit"] = values["limit"] or None
    flat_config(args.method, values)  # a bad value fails before torch is loaded
    forget_set = load_forget_set(args.forget, args.retain).with_retain_limit(args.retain_items)
    config = flat_config(args.method, values, forget_set.is_plain_text)

    from ..baselines.methods import check_method
    from ..models.target import load_target
    from ..run_folder import new_run_path
    from ..unlearn import unlearn

    path = new_run_path(args.runs, args.name, args.model, forget_set)
    check_method(args.method, forget_set, args.load_in_4bit)
    loading = args.device, args.dtype, args.adapter, args.load_in_4bit
    with TerminalCallback() as callback:
        callback.on_stage("loading the model", 0.0)
        lm = load_target(args.model, forget_set, *loading)
        run = unlearn(lm, forget_set, config, [callback])
        run.save(path)
        run.evaluate([callback], retain_adapter=args.retain_adapter or "auto")
    print_run(run)


def as_range(interval: list[float] | None) -> str:
    return "" if interval is None else " ({:.4f} to {:.4f})".format(*interval)


def print_run(run) -> None:
    """The table that ends `unlearn`."""
    from ..evaluation.shortfalls import shortfalls

    before, after, metrics = run.metrics["before"], run.metrics["after"], run.metrics
    intervals = metrics.get("intervals", {}).get("after", {})  # a run of 0.1 has none
    keys, rows = ("probability", "rouge_l", "rouge_l_to_base", "repetition"), []
    for group, old in before.items():
        if group not in ("summary", "holdout"):
            own = intervals.get(group, {})
            pairs = [f"{old[k]:.4f} → {after[group][k]:.4f}{as_range(own.get(k))}" for k in keys]
            rows.append([group, str(metrics["data"][group]), *pairs])
    columns = ("group", "examples", "probability", "ROUGE-L", "ROUGE-L to base", "repetition")
    print_table(columns, rows)
    if intervals:
        print_text("In brackets: 95 % intervals of the means after unlearning (bootstrap).")
    names = [k for k in SUMMARY if k in after.get("summary", {})]
    pairs = ((k, before["summary"][k], after["summary"][k]) for k in names)
    print_text("   ".join(f"{k} {old:.3g} → {new:.3g}" for k, old, new in pairs))
    if retain := metrics.get("retain_model", {}).get("forget"):
        p = retain["probability"]
        print_text(f"The retain model gives the forget answers a probability of {p:.4f}.")
    seconds = metrics["seconds"]
    print_text(
        f"Unlearned in {seconds['unlearn']} s ({metrics['steps']} steps, {metrics['stopped']}), "
        f"measured in {seconds['evaluate']} s on {metrics['hardware']}. The run is in {run.path}."
    )
    for sentence in shortfalls(metrics):
        print_text(sentence)


@command(
    RUN,
    argument("prompts", nargs="+", help="what to ask"),
    argument("--tokens", type=int, default=64, help="length of an answer at most"),
)
def compare(args) -> None:
    """Answer the same prompts before and after."""
    from ..run import load_run

    run = load_run(args.run)
    before, after = (run.generate(args.prompts, side, args.tokens) for side in (False, True))
    rows = zip(args.prompts, before, after, strict=True)
    print_table(("prompt", "before", "after"), [map(escape, row) for row in rows])


@command(
    argument("text", help="any text"),
    argument("--run", type=Path, help="folder of a run (default: the newest in runs/)"),
    argument("--json", action="store_true", help="print JSON"),
)
def inspect(args) -> None:
    """Show every token of a text: S_q, route A or B, expert weights."""
    from ..run import load_run
    from ..run_folder import newest_run

    run = load_run(args.run or newest_run())
    traces = run.trace_tokens(args.text)
    if args.json:
        print_json([asdict(trace) for trace in traces])
        return
    experts = ["B_r", *(f"B_f{d}" for d in range(1, len(traces[0].weights)))]
    experts = experts if traces[0].weights else []
    rows = []
    for trace in traces:
        weights = [f"{w:.2f}" if w else "·" for w in trace.weights]
        log_p = ["" if p is None else f"{p:.2f}" for p in (trace.log_prob, trace.log_prob_after)]
        top = "  ".join(f"{escape(token)} {p:.2f}" for token, p in trace.top_after[:3])
        token = escape(trace.token)
        gate = [f"{trace.gate['score']:.2f}"] if trace.gate else []
        rows.append([token, f"{trace.entropy:.3f}", trace.route, *gate, *weights, *log_p, top])
    gate = ["gate"] if traces[0].gate else []
    columns = "token", "S_q", "route", *gate, *experts, "log p", "after", "next token, after"
    print_table(columns, rows)
    if run.has_router:
        config = run.router.config
        print_text(
            f"S_q has q = {config.q:g} and belongs to the prediction of the next token. Route A: "
            f"S_q above {config.threshold:.3g}; else B. A row of dots: no expert acts."
        )
        if gate:
            print_text(
                f"The gate opens above {config.gate_threshold:.3g}; a score of -1000 means that "
                "it has read too little. --json gives the nearest stored entries."
            )


@command(
    MODEL,
    SEED,
    FORGET,
    argument("--prompts", type=Path, help="JSONL file: prompt, optionally expected and group"),
    argument("--leave-out", type=int, default=0, metavar="N",
             help="leave every n-th question out of the fit, and measure only those"),
    argument("--feature-layer", type=int, help="hidden state to read (default: 1/5 of the depth)"),
    argument("--roc", type=Path, help="write the ROC curve as an HTML file"),
    argument("--json", action="store_true", help="print JSON"),
    argument("--results", type=Path, help="results file that keeps the rates, such as gate.json"),
)  # fmt: skip
def gate(args) -> None:
    """Fit the gate to a set, without training, and show which prompts open it."""
    from ..data.built_in import shipped_adapters
    from ..data.forget_sets import load_forget_set
    from ..experiments.gate import open_rates, prepare_gate, read_prompts, score_prompts, store
    from ..models.loading import load_model

    own = read_prompts(args.prompts) if args.prompts else []
    forget_set = load_forget_set(args.forget, args.retain)
    adapter = args.adapter
    if adapter is None and forget_set.needs_teaching:  # without one, the model as it is will do
        adapter = shipped_adapters(forget_set.name, args.model).get("target")
    values = {"seed": args.seed, "feature_layer": args.feature_layer}
    with TerminalCallback() as callback:
        callback.on_stage("loading the model", 0.0)
        lm = load_model(args.model, args.device, args.dtype, adapter)
        fitted, prompts = prepare_gate(lm, forget_set, values, callback, args.leave_out)

        def progress(done: int, total: int) -> None:
            callback.on_stage("scoring the prompts", done / total)

        scores = score_prompts(lm, fitted, [*prompts, *own], progress)
    rates, own = open_rates(scores), scores[len(prompts) :]
    if args.results:
        names = ("forget", "retain", "adapter", "prompts")
        config = {name: str(value) for name in names if (value := getattr(args, name))}
        config |= {"seed": args.seed, "leave_out": args.leave_out}
        store(args.results, lm, fitted, rates, config, args.typed)
    if args.roc:
        from ..experiments.figures import gate_roc

        gate_roc(scores).write_html(args.roc, include_plotlyjs=True)
    if args.json:
        print_json({"rates": rates, "prompts": own})
        return
    rows = [
        [group, rate["expected"], str(rate["prompts"]), f"{rate['open']:.1%}",
         f"{rate['low']:.1%} to {rate['high']:.1%}"]
        for group, rate in rates.items()
    ]  # fmt: skip
    print_table(("prompts", "should be", "number", "open", "95 % interval"), rows)
    columns = "prompt", "expected", "gate", "score", "topic", "nearest forget", "nearest retain"
    rows = [
        [escape(s["prompt"]), s["expected"], "open" if s["open"] else "shut", f"{s['score']:.3f}",
         f"{s['topic']:.2f}", f"{s['forget_index']} ({s['forget_similarity']:.2f})",
         f"{s['retain_index']} ({s['retain_similarity']:.2f})"]
        for s in own
    ]  # fmt: skip
    if rows:
        print_table(columns, rows)


@command(
    MODEL,
    SEED,
    argument("--forget", default="imaginary-authors", help="the set"),
    argument(
        "--which", default="target", help="target (learns all) or retain (not the forget set)"
    ),
    argument("--retain-items", type=int, help="learn only so many retain examples"),
    argument("--out", type=Path, required=True, help="folder of the adapter"),
    argument("--epochs", type=int, default=12, help="passes over the set"),
)
def teach(args) -> None:
    """Teach a model a made-up set, as a LoRA adapter, so that it can forget it."""
    from ..data.forget_sets import load_forget_set
    from ..models.loading import load_model
    from ..models.teaching import TeachConfig, teach

    check_value("epochs", args.epochs, {"min": 1, "max": 1000})
    forget_set = load_forget_set(args.forget).with_retain_limit(args.retain_items)
    lm = load_model(args.model, args.device, args.dtype)
    config = TeachConfig(epochs=args.epochs, seed=args.seed)
    with TerminalCallback() as callback:
        folder = teach(lm, forget_set, args.which, args.out, config, callback.on_step)
    print(f"The adapter is in {folder}.")


@command(MODEL, argument("--out", type=Path, help="file (default: in the cache)"))
def prepare(args) -> None:
    """Record a model's own answers to all built-in prompts."""
    from ..models.knowledge import record
    from ..models.loading import load_model

    lm = load_model(args.model, args.device, args.dtype)
    with TerminalCallback() as callback:
        stage = "the model's own answers"
        path = record(lm, args.out, lambda done, total: callback.on_stage(stage, done / total))
    print(f"Recorded in {path}.")


@command(
    argument("--logs", type=Path, required=True, help="the log"),
    argument("--retain-logs", type=Path, help="log of the retain model, for forget quality"),
)
def evaluate(args) -> None:
    """Print the figures of an evaluation log (ours, open-unlearning's, TOFU's) as JSON."""
    from ..evaluation.logs import read_log
    from ..evaluation.summary import summary

    retain = read_log(args.retain_logs) if args.retain_logs else None
    print_json(summary(read_log(args.logs), retain))


@command()
def app(args) -> None:
    """Serve the page on http://127.0.0.1:7860."""
    try:
        from ..app.main import build, launch
    except ImportError:
        raise UserError("The page needs gradio: pip install 'alter_demo[app]'.") from None
    launch(build())
