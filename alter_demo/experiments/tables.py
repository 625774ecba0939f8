"""Tables from results files, as data frames; `report` writes them as Markdown.

The page shows the docstrings of those in `report.RESULT_TYPES` as descriptions.
"""

import json

import pandas as pd

from ..errors import UserError
from ..inspection.charts import word_table
from .results import REFERENCES, label, overrides_of, settings_of

OURS = ("alter", "alter_selective")

# what all runs of a table must share, of their config and of their overrides
SETUP = ("forget", "model", "retain_items", "limit", "kept", "tokens", "loaded", "weights",
         "attack", "rounds")  # fmt: skip

LOWER_IS_BETTER = {  # measures of forgetting that fall -> axis title
    "ASG": "ASG, distance to not knowing (lower is better)",
    "forget_knowmem_ROUGE": "forget knowledge, ROUGE-L F1 (lower is better)",
}

# metric -> column of the tables, in this order
SHOWN = {
    "forget_quality": "forget quality p", "model_utility": "model utility",
    "retain_Q_A_ROUGE": "retain ROUGE-L", "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE-L", "extraction_strength": "extraction strength",
    "privleak": "privleak", "forget_repetition": "repeated 4-grams",
    "forget_BLEU": "forget BLEU", "ASG": "ASG",
    "forget_knowmem_ROUGE": "forget knowledge", "forget_verbmem_ROUGE": "verbatim memorisation",
    "retain_knowmem_ROUGE": "retain knowledge",
    "neighbours_ROUGE_to_base": "neighbours, ROUGE-L to base model",
    "general_ROUGE_to_base": "general, ROUGE-L to base model",
}  # fmt: skip
CHOICE = {
    **{k: SHOWN[k] for k in ("forget_Q_A_ROUGE", "forget_BLEU", "ASG", "general_ROUGE_to_base")},
    "general_repetition": "repeated 4-grams",
}
ABLATED = ["forget_quality", "model_utility", "retain_Q_A_ROUGE", "forget_Q_A_Prob"]
ABLATED += ["extraction_strength", "general_ROUGE_to_base", "forget_repetition"]
ROUNDS = ["model_utility", "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE"]
ROUNDS += ["extraction_strength", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"]
ATTACKS = {
    "before_ROUGE": "base model", "asked_ROUGE": "asked directly",
    "paraphrased_ROUGE": "paraphrased", "role_play_ROUGE": "role play",
    "few_shot_ROUGE": "few shots", "neutral_text_ROUGE": "other text first",
    "prefix_forced_ROUGE": "answer started", "int8_ROUGE": "int8", "int4_ROUGE": "4-bit",
    "adapter_removed_ROUGE": "adapter removed", "relearn_forget_10_ROUGE": "relearned, 10 steps",
    "relearn_half_10_ROUGE": "relearned on half",
    "relearn_unrelated_10_ROUGE": "relearned on other text",
    "sampled_leaked": "sampled answers that leak",
}  # fmt: skip

# forget set -> results file, measures of forgetting and of utility
SUMMARY = {
    "Harry Potter": ("harry-potter-choice", "ASG", "kept_acc"),
    "imaginary authors": ("imaginary-authors-gpu", "forget_quality", "model_utility"),
    "TOFU": ("tofu", "forget_quality", "model_utility"),
    "school (astronomy)": ("school", "forget_acc", "kept_acc"),
    "MUSE News": ("muse-news", "forget_knowmem_ROUGE", "retain_knowmem_ROUGE"),
}
ACCURACIES = {"forget_acc": "accuracy", "kept_acc": "accuracy on other questions"}


def shown_runs(results: dict) -> list[dict]:
    """The runs in the table: those with the methods' own settings.

    Other settings are included where they are the subject, where there is nothing else, and in
    multiple choice with ASG. (Those on `school` were chosen by its own questions.)
    """
    runs, type = results["runs"], results["type"]
    own = [r for r in runs if not settings_of(r)]
    has_asg = type == "choice" and any("ASG" in r["metrics"] for r in runs)
    with_settings = has_asg or type in ("tuning", "rounds", "ablation")
    return runs if with_settings or all(r["method"] in REFERENCES for r in own) else own


def runs_frame(runs: list[dict]) -> pd.DataFrame:
    """One row per run: its metrics, overrides and cost. UserError if the setups differ."""
    if not runs:
        raise UserError("The results file holds no runs of this type yet.")
    setups = [[(overrides_of(r) | r["config"]).get(k) for k in SETUP] for r in runs]
    if any(setup != setups[0] for setup in setups):
        raise UserError(
            "The results file mixes data, models or sizes. Use one file for each (--results)."
        )
    rows = [{"share": 1.0} | overrides_of(r) | r["metrics"] | r for r in runs]
    table = pd.DataFrame(rows).rename(columns={"peak_memory_mb": "peak MB"})
    return table.assign(
        method=[label(r) for r in runs],
        seconds=[r.get("seconds", {}).get("unlearn") for r in runs],
        diverged=[r.get("stopped") == "diverged" for r in runs],
    )


def medians_by(keys: list[str], columns, table: pd.DataFrame) -> pd.DataFrame:
    """Medians of `columns` over the rows that share `keys`, with the number of their seeds and of
    those that diverged."""
    rows = table.reindex(columns=[*keys, *columns, "seed", "diverged"])
    groups = rows.astype(dict.fromkeys(columns, float)).groupby(keys, sort=False)
    counts = {"seeds": groups["seed"].nunique(), "diverged": groups["diverged"].sum()}
    return groups[[*columns]].median().assign(**counts)


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that hold anything, under the names that a reader sees."""
    return table.dropna(axis=1, how="all").rename(columns=SHOWN | CHOICE | ATTACKS)


def medians(results: dict) -> pd.DataFrame:
    """One row per method, medians over its seeds: the columns of SHOWN and the cost."""
    table = runs_frame(shown_runs(results))
    return medians_by(["method"], (*SHOWN, "seconds", "peak MB"), table[table["share"] == 1])


def grid(results: dict) -> pd.DataFrame:
    """All methods with their own settings, medians over the seeds."""
    table = medians(results)
    lost = table.pop("diverged").map(lambda n: f" ({n} diverged)" if n else "")
    return named(table).assign(seeds=table["seeds"].astype(str) + lost)


def forgetting(table: pd.DataFrame) -> str:
    """The measure of forgetting in `table`: forget quality, or else one of LOWER_IS_BETTER."""
    measures = ("forget_quality", *LOWER_IS_BETTER)
    return next((k for k in measures if table[k].notna().any()), "forget_quality")


def pareto(table: pd.DataFrame, x="model_utility", y: str | None = None) -> list[str]:
    """The methods that no other method beats in both columns, by rising x."""
    y = y or forgetting(table)
    points = table.drop(list(REFERENCES), errors="ignore")[[x, y]].dropna()
    values = points.to_numpy() * (1, -1 if y in LOWER_IS_BETTER else 1)
    others = values[:, None]  # (methods, 1, 2): each method against each
    beaten = ((others >= values).all(2) & (others > values).any(2)).any(0)
    return points[~beaten].sort_values(x).index.tolist()


def shares(results: dict) -> pd.DataFrame | None:
    """What is left of the forget set and of the rest as the forget set grows (MUSE)."""
    keys = ["forget_knowmem_ROUGE", "retain_knowmem_ROUGE"]
    table = runs_frame(shown_runs(results))
    if (table["share"] == 1).all():
        return None
    table = medians_by(["method", "share"], keys, table[~table["method"].isin(REFERENCES)])
    pairs = table[keys].map("{:.3f}".format).agg(" / ".join, axis=1)
    pairs = pairs.unstack().sort_index(axis=1).reindex(table.index.unique("method"))
    return pairs.rename(columns=lambda share: f"{share:.0%} of the set: forget / retain")


def tried(results: dict) -> pd.DataFrame:
    """All settings that were tried. The one with the highest score is the default."""
    runs = [r for r in results["runs"] if overrides_of(r)]
    names: dict[str, dict] = {}  # method -> what was tried on it; each of its runs states them all
    for run in runs:
        names.setdefault(run["method"], {}).update(settings_of(run))
    settings = [json.dumps(values_of(r, names[r["method"]]), sort_keys=True) for r in runs]
    table = runs_frame(runs).assign(method=[r["method"] for r in runs], setting=settings)
    columns = ("steps", "forget_quality", "model_utility")
    table = medians_by(["method", "setting"], columns, table).drop(columns="seeds")
    return table.assign(score=table["forget_quality"] * table["model_utility"])


def values_of(run: dict, names) -> dict:
    """The values of the settings `names` in a run, also where they are the method's own."""
    config = run["config"]
    known = config.get("adapter", {}) | config.get("training", {}) | settings_of(run)
    return {k: known[k] for k in names if k in known}


def chosen_settings(results: dict) -> dict[str, dict]:
    """The setting with the highest score of each method."""
    best = tried(results)["score"].fillna(-1).groupby("method", sort=False).idxmax()
    return {method: json.loads(setting) for method, setting in best}


def rounds(results: dict) -> pd.DataFrame:
    """The forget set grows round by round. Each round measures all of it."""
    table = runs_frame(results["runs"])
    return named(medians_by(["method", "round"], ROUNDS, table).drop(columns="seeds")).sort_index()


def accuracies(results: dict) -> pd.DataFrame:
    """Percent of multiple-choice questions answered correctly. *school*: subjects written for this
    project in place of WMDP and MMLU. On plain texts alter_selective trains longer than the others.
    """
    table = runs_frame(shown_runs(results))
    tasks = [c for c in table if c.endswith("_acc") and c != "forget_acc"]
    table[tasks] *= 100
    table = named(medians_by(["method"], (*tasks, *CHOICE, "seconds"), table))
    names = {k: k.removesuffix("_acc").replace("_", " ") for k in tasks}
    return table.drop(columns="diverged").rename(columns=names)


def ablated(results: dict) -> pd.DataFrame:
    """ALTER without one of its parts, or with another value."""
    runs = [r for r in results["runs"] if "variant" in overrides_of(r)]
    table = runs_frame(runs)
    if len({r["method"] for r in runs}) > 1:
        raise UserError("The results file mixes variants of two methods. Use one file for each.")
    columns = (*ABLATED, "steps", "seconds")
    return named(medians_by(["variant"], columns, table).drop(columns="seeds"))


def attacked(results: dict) -> pd.DataFrame:
    """ROUGE-L of what each attack brings back. The right answer scores 1."""
    runs = with_shared_seeds(shown_runs(results))
    table = runs_frame(sorted(runs, key=lambda r: r["method"] not in REFERENCES))
    return medians_by(["method"], ATTACKS, table).drop(columns="diverged").rename(columns=ATTACKS)


def with_shared_seeds(runs: list[dict]) -> list[dict]:
    """The runs of the seeds that all methods share, or all runs if there are none: what comes back
    varies much by the seed."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        if run["method"] not in REFERENCES:
            seeds.setdefault(label(run), set()).add(run["seed"])
    shared = set.intersection(*seeds.values()) if seeds else set()
    return [r for r in runs if not shared or r["method"] in REFERENCES or r["seed"] in shared]


def gate_rates(results: dict) -> pd.DataFrame:
    """Share of prompts that open the gate, by kind of prompt, with 95 % intervals in brackets."""
    layers = [run["config"]["feature_layer"] for run in results["runs"]]
    usual, cells = max(layers, key=layers.count), {}
    for run, layer in zip(results["runs"], layers, strict=True):
        name = run["config"]["forget"] + ("" if layer == usual else f", layer {layer}")
        for group, rate in run["rates"].items():
            share = f"{rate['open']:.1%} of {rate['prompts']}"
            share += f" ({rate['low'] * 100:.1f} to {rate['high'] * 100:.1f})"
            cells.setdefault((group, rate["expected"]), {})[name] = share
    table = pd.DataFrame.from_dict(cells, orient="index").fillna("")
    return table.rename_axis(["prompts", "should be"])


def heterogeneity(results: dict) -> pd.DataFrame:
    """LoRAs of several domains from one start. Their A's are more alike than their B's."""
    names = {"apart": "two domains", "mixed": "a domain and the mixture"}
    columns = {f"{m}_{k}_cosine": f"{m}: {name}" for m in "AB" for k, name in names.items()}
    columns |= {"learn": "seconds"}
    table = pd.DataFrame({"seed": r["seed"]} | r["metrics"] | r["seconds"] for r in results["runs"])
    return table.set_index("seed")[[*columns]].rename(columns=columns)


def costs(results: dict) -> pd.DataFrame:
    """The cost of a training step and of a token, compared with LoRA and full fine-tuning."""
    methods = ("alter", "lora", "full")
    speeds = {"base": "base model", "alter": "experts active", "alter_idle": "experts inactive"}
    columns = {f"step_seconds_{m}": f"{m}: step, s" for m in methods}
    columns |= {"ratio_alter_over_lora": "ALTER / LoRA"}
    columns |= {f"peak_memory_mb_{m}": f"{m}: peak MB" for m in methods}
    columns |= {f"tokens_per_second_{k}": f"tokens/s, {name}" for k, name in speeds.items()}
    table = pd.DataFrame(run["config"] | run["metrics"] for run in results["runs"])
    table["model"] += ", " + table["dtype"].mask(table["load_in_4bit"], "4-bit")
    table["machine"] = [run["hardware"].rsplit(" (", 1)[0] for run in results["runs"]]
    table = table.set_index(["model", "machine"]).reindex(columns=[*columns])
    return table.astype(float).rename(columns=columns)


def words(results: dict) -> pd.DataFrame:
    """Which words of the base model's answers go through A, and which through B."""
    return word_table(results["runs"][-1]["words"]["forget"]).set_index("route")


def summary(results: dict[str, dict]) -> pd.DataFrame:
    """The key figures of all `results`, one row per forget set: our methods and the best baseline,
    the one with the highest product of forgetting and utility."""
    names, rows = SHOWN | ACCURACIES, {}
    for forget_set, (file, forget, utility) in SUMMARY.items():
        runs = [r for r in results[file]["runs"] if not overrides_of(r)]
        table = medians_by(["method"], (forget, utility), runs_frame(runs))[[forget, utility]]
        text = table.map("{:.3g}".format).agg(" / ".join, axis=1)
        note, forgotten = "", table[forget]
        if forget != "forget_quality":
            note, forgotten = " (lower is better)", 1 - forgotten / forgotten["target"]
        scores = (forgotten * table[utility]).drop([*REFERENCES, *OURS], errors="ignore")
        if len(scores):
            text["best baseline"] = f"{scores.idxmax()}: {text[scores.idxmax()]}"
        text["forgetting / utility"] = f"{names[forget]}{note} / {names[utility]}"
        rows[forget_set] = text
    columns = ["forgetting / utility", "target", *OURS[::-1], "best baseline", "retain"]
    return pd.DataFrame(rows).T.reindex(columns=columns).rename_axis("forget set")
