"""Tables from results files: as frames for the page, as Markdown for the README. Nothing here is typed by hand."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas as pd

from .charts import word_table
from .errors import UserError
from .results import MARKS, REFERENCES

RESULTS = Path(__file__).parents[1] / "assets" / "results"
ASKED = ("forget", "model", "retain_items", "limit", "kept", "tokens", "loaded", "weights")
OURS = ("alter", "alter_selective")
FALLING = {  # measures of forgetting that are better when lower -> the axis of a drawing
    "ASG": "ASG, distance to answers about what is not known (lower is better)",
    "forget_knowmem_ROUGE": "knowledge of what is forgotten, ROUGE-L F1 (lower is better)",
}
SHOWN = {
    "forget_quality": "forget quality p",
    "model_utility": "model utility",
    "retain_Q_A_ROUGE": "retain ROUGE-L",
    "forget_Q_A_Prob": "forget probability",
    "forget_Q_A_ROUGE": "forget ROUGE-L",
    "extraction_strength": "extraction strength",
    "privleak": "privleak",
    "forget_repetition": "repeated 4-grams",
    "forget_BLEU": "forget BLEU",
    "ASG": "ASG",
    "forget_knowmem_ROUGE": "knowledge kept of what is forgotten",
    "forget_verbmem_ROUGE": "verbatim memorisation",
    "retain_knowmem_ROUGE": "knowledge of the rest",
    "neighbours_ROUGE_to_base": "neighbours, ROUGE-L to own before",
    "general_ROUGE_to_base": "everyday, ROUGE-L to own before",
}
ABLATED = ("forget_quality", "model_utility", "retain_Q_A_ROUGE", "forget_Q_A_Prob", "extraction_strength",
           "general_ROUGE_to_base", "forget_repetition")  # fmt: skip
ROUNDS = ("model_utility", "forget_quality", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "extraction_strength",
          "forget_knowmem_ROUGE", "retain_knowmem_ROUGE")  # fmt: skip
ATTACKS = {  # column of the table -> figure
    "before": "before_ROUGE",
    "asked": "asked_ROUGE",
    "paraphrased": "paraphrased_ROUGE",
    "role play": "role_play_ROUGE",
    "few shots": "few_shot_ROUGE",
    "neutral text first": "neutral_text_ROUGE",
    "answer begun": "prefix_forced_ROUGE",
    "int8": "int8_ROUGE",
    "4-bit": "int4_ROUGE",
    "adapter removed": "adapter_removed_ROUGE",
    "relearnt on it, 10 steps": "relearn_forget_10_ROUGE",
    "on half of it": "relearn_half_10_ROUGE",
    "on other text": "relearn_unrelated_10_ROUGE",
    "of the draws leak": "sampled_leaked",
}
GROUP_COLUMNS = {
    "probability": "answer probability",
    "rouge_l": "ROUGE-L",
    "rouge_l_to_base": "ROUGE-L to the untouched model's answers",
    "repetition": "repeated 4-grams",
}


def medians(results: dict) -> pd.DataFrame:
    """One row a method, medians over its seeds (runs with settings of their own left out), columns of SHOWN and cost.

    Raises:
        UserError: the file holds no runs.
    """
    rows = [
        {
            "method": run["method"],
            "seed": run["seed"],
            **{k: run["metrics"].get(k) for k in SHOWN},
            "seconds": run.get("seconds", {}).get("unlearn"),
            "MB": run.get("peak_memory_mb"),
            "diverged": run.get("stopped") == "diverged",
        }
        for run in results["runs"]
        if not run["config"].get("overrides")
    ]
    if not rows:
        raise UserError("The results file holds no runs yet.")
    same_sizes(results["runs"])
    numbers = dict.fromkeys((*SHOWN, "seconds", "MB"), float)  # absent: NaN
    table = pd.DataFrame(rows).astype(numbers).groupby("method", sort=False)
    counts, lost = table["seed"].nunique(), table["diverged"].sum()
    return table.median(numeric_only=True).drop(columns="seed").assign(seeds=counts, diverged=lost)


def same_sizes(runs: list[dict], overrides: bool = False) -> None:
    """Raises UserError unless all runs were asked the same (with the same `overrides`): a median of different things is
    none."""
    names = (*ASKED, "overrides") if overrides else ASKED
    asked = {json.dumps({k: run["config"].get(k) for k in names}, sort_keys=True) for run in runs}
    if len(asked) > 1:
        raise UserError("The results file mixes different data, models or sizes: one file for each (--results).")


def named_medians(results: dict) -> pd.DataFrame:
    """The medians under the names that a person reads, without empty columns."""
    return medians(results).dropna(axis=1, how="all").reset_index().rename(columns=SHOWN)


def forgetting(table: pd.DataFrame) -> str:
    """What measures forgetting in these results: forget quality, or one of FALLING where it can't be computed."""
    return next((k for k in ("forget_quality", *FALLING) if table[k].notna().any()), "forget_quality")


def pareto(table: pd.DataFrame, x="model_utility", y: str | None = None) -> list[str]:
    """Methods that no other one beats in both columns, by x."""
    y = y or forgetting(table)
    points = table.drop(index=[r for r in REFERENCES if r in table.index])[[x, y]].dropna()
    if y in FALLING:
        points[y] = -points[y]
    if points.empty:
        return []
    beaten = [
        ((points[x] >= a) & (points[y] >= b) & ((points[x] > a) | (points[y] > b))).any() for a, b in points.to_numpy()
    ]
    return points[[not b for b in beaten]].sort_values(x).index.tolist()


def markdown(results: dict) -> str:
    """The medians as a Markdown table, best methods in the order of the table of methods."""
    table = medians(results)
    rows, columns = [], [k for k in SHOWN if table[k].notna().any()]
    costs = {k: v for k, v in {"seconds": "seconds", "MB": "peak MB"}.items() if table[k].notna().any()}
    for method, row in table.iterrows():
        cells = ["" if pd.isna(row[k]) else f"{row[k]:.3g}" for k in columns]
        spent = ["" if pd.isna(row[k]) else f"{row[k]:.0f}" for k in costs]
        seeds = f"{row['seeds']:.0f}" + (f" ({row['diverged']:.0f} diverged)" if row["diverged"] else "")
        rows.append([f"**{method}**" if method in OURS else method, *cells, *spent, seeds])
    lines = pipes(["method", *(SHOWN[k] for k in columns), *costs.values(), "seeds"], rows)
    front, rivals = pareto(table), table.index.difference(list(REFERENCES))
    name = SHOWN[forgetting(table)].removesuffix(" p")
    verdict = f" Not dominated in (utility, {name}): {', '.join(front)}." if len(rivals) > 1 else ""
    grown = f"\n\n{shares_markdown(results)}" if shares(results) else ""
    return f"{lines}\n\nMedians; {hardware(results)}.{verdict}{grown}"


def plain(value) -> str:
    """A setting's value as text."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def hardware(results: dict) -> str:
    return ", ".join(sorted({r["hardware"] for r in results["runs"] if r.get("hardware")}))


def shares(results: dict) -> list[dict]:
    return [run for run in results["runs"] if "share" in (run["config"].get("overrides") or {})]


def shares_markdown(results: dict) -> str:
    """What is left of the forgotten knowledge, and what is kept of the rest, as the forget set grows (MUSE)."""
    keys = ("forget_knowmem_ROUGE", "retain_knowmem_ROUGE")
    whole = [r for r in results["runs"] if r["method"] not in REFERENCES and not r["config"].get("overrides")]
    rows = [
        {"method": r["method"], "share": (r["config"].get("overrides") or {}).get("share", 1.0),
         **{k: r["metrics"].get(k, float("nan")) for k in keys}} for r in [*shares(results), *whole]
    ]  # fmt: skip
    table = pd.DataFrame(rows).groupby(["method", "share"], sort=False)[list(keys)].median().unstack()
    sizes = sorted({r["share"] for r in rows})
    header = ["method", *(f"{s:.0%} of the set: forgotten / rest" for s in sizes)]
    cells = [[m, *(f"{row[keys[0], s]:.3f} / {row[keys[1], s]:.3f}" for s in sizes)] for m, row in table.iterrows()]
    return pipes(header, cells)


def tried(results: dict) -> pd.DataFrame:
    """Every setting tried for each method with its score, forget quality times model utility, medians over seeds.

    Raises:
        UserError: no run of the file has settings of its own.
    """
    runs = [r for r in results["runs"] if r["config"].get("overrides")]
    names: dict[str, dict] = {}  # method -> what was tried on it; all of it is told of each run
    for r in runs:
        names.setdefault(r["method"], {}).update(dict.fromkeys(r["config"]["overrides"]))
    rows = [
        {"method": r["method"], "setting": json.dumps(setting(r, names[r["method"]]), sort_keys=True),
         "steps": r.get("steps"), "diverged": r.get("stopped") == "diverged",
         **{k: r["metrics"].get(k) for k in ("forget_quality", "model_utility")}} for r in runs
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no settings that were tried: tofu --set lr=1e-5,1e-4 makes some.")
    same_sizes(runs)
    numbers = dict.fromkeys(("forget_quality", "model_utility", "steps"), float)
    table = pd.DataFrame(rows).astype(numbers).groupby(["method", "setting"], sort=False).median(numeric_only=True)
    return table.assign(score=table["forget_quality"] * table["model_utility"])


def setting(run: dict, names) -> dict:
    """What `run` ran with, of the settings in `names`: also those that it took from its method."""
    known = run["config"].get("train", {}) | run["config"]["overrides"]
    return {k: known[k] for k in names if k in known}


def chosen_settings(results: dict) -> dict[str, dict]:
    """The setting of the highest score of each method."""
    best = tried(results)["score"].fillna(-1).groupby("method", sort=False).idxmax()
    return {method: json.loads(setting) for method, setting in best}


def tuning_markdown(results: dict) -> str:
    """What was tried, method by method, the chosen setting in bold."""
    table, chosen = tried(results), chosen_settings(results)
    rows = []
    for method, own in table.groupby(level="method", sort=False):
        cells = []
        for (_, setting), row in own.iterrows():
            values = json.loads(setting)
            name = ", ".join(f"{k} {plain(v)}" for k, v in values.items())
            figures = (
                missing(row) if pd.isna(row["score"]) else f"{row['forget_quality']:.2g} / {row['model_utility']:.3f}"
            )
            cells.append(f"**{name}: {figures}**" if values == chosen[method] else f"{name}: {figures}")
        rows.append([method, "; ".join(cells)])
    return pipes(["method", "setting: forget quality p / model utility (chosen in bold)"], rows)


def rounds(results: dict) -> pd.DataFrame:
    """One row a method and round: utility and what is left of the whole forget set, medians over the seeds."""
    runs = [r for r in results["runs"] if "/" in r["method"]]
    if not runs:
        raise UserError("The results file holds no rounds: tofu --rounds makes some.")
    same_sizes(runs, overrides=True)
    methods, numbers = zip(*(r["method"].split("/") for r in runs), strict=True)
    table = pd.DataFrame([{k: r["metrics"].get(k) for k in ROUNDS} for r in runs]).astype(float)
    table = table.dropna(axis=1, how="all").rename(columns=SHOWN)
    table["diverged"] = [r.get("stopped") == "diverged" for r in runs]
    rows = table.groupby([pd.Series(methods, name="method"), pd.Series(map(int, numbers), name="round")])
    return rows.median().assign(diverged=rows["diverged"].max())


def rounds_markdown(results: dict) -> str:
    table = rounds(results)
    shown = [k for k in table if k != "diverged"]
    rows = [
        [method, str(k), *(missing(row) if pd.isna(row[c]) else f"{row[c]:.3g}" for c in shown)]
        for (method, k), row in table.iterrows()
    ]
    return f"{pipes(['method', 'round', *shown], rows)}\n\n{hardware(results)}."


def choice_runs(results: dict) -> list[dict]:
    """The runs of multiple choice that are shown: the methods' own settings, and where the ASG stands beside them also
    what was tried. (Of `school` that is a dozen settings, chosen among by the very questions.)"""
    tries = any("ASG" in r["metrics"] for r in results["runs"])
    return [r for r in results["runs"] if tries or not r["config"].get("overrides")]


def accuracies(results: dict) -> pd.DataFrame:
    """Multiple choice in percent, one row a method, medians over the seeds: that of what is forgotten first.

    Raises:
        UserError: the file holds no multiple choice.
    """
    runs = choice_runs(results)
    names = dict.fromkeys(k for r in runs for k in r["metrics"] if k.endswith("_acc") and k != "forget_acc")
    if not names:
        raise UserError("The results file holds no multiple choice: python -m alter_demo wmdp makes some.")
    same_sizes(runs)
    shown = ("forget_Q_A_ROUGE", "forget_BLEU", "ASG", "general_ROUGE_to_base")
    more = {k: SHOWN[k] for k in shown} | {"general_repetition": "repeated 4-grams"}
    rows = [
        {"method": named(r), "seed": r["seed"],
         **{k.removesuffix("_acc").replace("_", " "): 100 * r["metrics"].get(k, float("nan")) for k in names},
         **{name: r["metrics"].get(k, float("nan")) for k, name in more.items()},
         "seconds": r.get("seconds", {}).get("unlearn", float("nan"))}
        for r in runs
    ]  # fmt: skip
    table = pd.DataFrame(rows).groupby("method", sort=False)
    found = table.median(numeric_only=True).drop(columns="seed").dropna(axis=1, how="all")
    return found.assign(seeds=table["seed"].nunique())


def choice_markdown(results: dict) -> str:
    table = accuracies(results)
    rows = [
        [f"**{m}**" if m in OURS else m, *("" if pd.isna(v) else f"{v:.3g}" for v in row)]
        for m, row in table.iterrows()
    ]
    known = "ASG" in table and len(table.index.difference(list(REFERENCES))) > 1
    verdict = f" Not dominated in (kept, ASG): {', '.join(pareto(table, 'kept', 'ASG'))}." if known else ""
    return f"{pipes(['method', *table.columns], rows)}\n\nPercent right, medians; {hardware(results)}.{verdict}"


def variants(results: dict) -> list[dict]:
    return [run for run in results["runs"] if "variant" in (run["config"].get("overrides") or {})]


def ablated(results: dict) -> pd.DataFrame:
    """What each variant of ALTER comes to, one row a variant, medians over the seeds.

    Raises:
        UserError: the file holds no variants.
    """
    rows = [
        {"variant": r["config"]["overrides"]["variant"], **{SHOWN[k]: r["metrics"].get(k) for k in ABLATED},
         "steps": r.get("steps"), "seconds": r.get("seconds", {}).get("unlearn"),
         "diverged": r.get("stopped") == "diverged"}
        for r in variants(results)
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no variants: python -m alter_demo ablation makes some.")
    same_sizes(variants(results))
    if len({r["method"] for r in variants(results)}) > 1:
        raise UserError("The results file mixes variants of two methods: one file for each (--results).")
    table = pd.DataFrame(rows)
    table = table.astype({k: float for k in table if k != "variant"}).groupby("variant", sort=False).median()
    return table if table["seconds"].notna().any() else table.drop(columns="seconds")


def ablation_markdown(results: dict) -> str:
    table = ablated(results)
    shown = [k for k in table if k != "diverged"]
    rows = [[name, *(missing(r) if pd.isna(r[k]) else f"{r[k]:.3g}" for k in shown)] for name, r in table.iterrows()]
    return f"{pipes(['variant', *shown], rows)}\n\n{hardware(results)}."


def missing(row) -> str:
    """What stands for a figure that is not there."""
    return "diverged" if row["diverged"] else "none"


def attack_runs(results: dict) -> list[dict]:
    """Those with the methods' own settings, what was tried stands beside them; all where there are tries alone."""
    runs = [run for run in results["runs"] if "attack" in (run["config"].get("overrides") or {})]
    own = [run for run in runs if not tried_on(run)]
    return own if any(run["method"] not in REFERENCES for run in own) else runs


def tried_on(run: dict) -> list[str]:
    """What was tried on a run in place of its method's own settings, as `--set` takes it."""
    return [f"{k}={plain(v)}" for k, v in (run["config"].get("overrides") or {}).items() if k not in MARKS]


def named(run: dict) -> str:
    """The method of a results file's run, with what was tried on it."""
    return " ".join([run["method"], *tried_on(run)])


def of_shared_seeds(runs: list[dict]) -> list[dict]:
    """The runs whose seed all methods have, as what comes back differs much by the seed; all where none is shared."""
    seeds: dict[str, set[int]] = {}
    for r in runs:
        if r["method"] not in REFERENCES:
            seeds.setdefault(named(r), set()).add(r["seed"])
    shared = set.intersection(*seeds.values()) if seeds else set()
    return [r for r in runs if r["method"] in REFERENCES or r["seed"] in shared] if shared else runs


def attacked(results: dict) -> pd.DataFrame:
    """ROUGE-L of what each attack brings back, one row a method, medians over the seeds that all methods have.

    Raises:
        UserError: the file holds no attacks.
    """
    rows = [
        {"method": named(r), "seed": r["seed"], **{name: r["metrics"].get(k) for name, k in ATTACKS.items()}}
        for r in sorted(of_shared_seeds(attack_runs(results)), key=lambda r: r["method"] not in REFERENCES)
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no attacks: python -m alter_demo attack makes some.")
    asked = [r["config"] | {"overrides": {"attack": r["config"]["overrides"]["attack"]}} for r in attack_runs(results)]
    same_sizes([{"config": config} for config in asked], overrides=True)
    table = pd.DataFrame(rows).astype(dict.fromkeys(ATTACKS, float)).groupby("method", sort=False)
    return table.median(numeric_only=True).drop(columns="seed").assign(seeds=table["seed"].nunique())


def attacks_markdown(results: dict) -> str:
    table = attacked(results)
    rows = [
        [
            f"**{m}**" if m in OURS else m,
            *("" if pd.isna(row[k]) else f"{row[k]:.3f}" for k in ATTACKS),
            f"{row.seeds:.0f}",
        ]
        for m, row in table.iterrows()
    ]
    leaks = sum(len(r.get("leaks", ())) for r in attack_runs(results))
    return (
        f"{pipes(['method', *ATTACKS, 'seeds'], rows)}\n\n{leaks} leaks are kept with their text; {hardware(results)}."
    )


def heterogeneity(results: dict) -> pd.DataFrame:
    """How alike the A's and B's of LoRAs of several domains are, mean cosine, one row a seed."""
    names = {"apart": "one domain beside another", "mixed": "a domain beside all mixed"}
    rows = [
        {"seed": run["seed"],
         **{f"{m}: {name}": run["metrics"][f"{m}_{k}_cosine"] for m in "AB" for k, name in names.items()},
         "seconds": run["seconds"]["learn"]} for run in results["runs"]
    ]  # fmt: skip
    return pd.DataFrame(rows)


def heterogeneity_markdown(results: dict) -> str:
    table = heterogeneity(results)
    rows = [[f"{seed:.0f}", *(f"{v:.3f}" for v in cosines), f"{s:.0f}"] for seed, *cosines, s in table.to_numpy()]
    return f"{pipes(list(table), rows)}\n\nMean cosine of what was learned; {hardware(results)}."


def costs(results: dict) -> pd.DataFrame:
    """What `bench` measured, one row a model and machine: seconds a step, peak memory, tokens a second."""
    rows = []
    for run in results["runs"]:
        m, asked = run["metrics"], run["config"]
        packed = "4-bit" if asked["load_in_4bit"] else asked["dtype"]
        rows.append({"model": f"{asked['model']}, {packed}", "machine": run["hardware"].rsplit(" (", 1)[0]})
        for method in ("alter", "lora", "full"):
            rows[-1][f"{method}: step, s"] = m.get(f"step_seconds_{method}")
        rows[-1]["ALTER / LoRA"] = m["ratio_alter_over_lora"]
        for method in ("alter", "lora", "full"):
            rows[-1][f"{method}: peak MB"] = m.get(f"peak_memory_mb_{method}")
        names = {"base": "bare", "alter": "where experts act", "alter_idle": "elsewhere"}
        rows[-1] |= {f"tokens a second, {name}": m[f"tokens_per_second_{k}"] for k, name in names.items()}
    return pd.DataFrame(rows).astype({k: float for k in rows[0] if k not in ("model", "machine")})


def costs_markdown(results: dict) -> str:
    table = costs(results)
    shape = {c: "{:.0f}" if "MB" in c else "{:.3g}" for c in table.columns}
    rows = [
        ["" if pd.isna(v) else v if isinstance(v, str) else shape[c].format(v) for c, v in row.items()]
        for _, row in table.iterrows()
    ]
    return pipes(list(table.columns), rows)


def words_markdown(results: dict) -> str:
    """The share of the words that each way takes, and its most frequent words."""
    rows = []
    for run in results["runs"]:
        for group, counts in run["words"].items():
            for way, words in sorted(counts.items()):
                top = sorted(words.items(), key=lambda x: -x[1])[:12]
                shown = ", ".join(html.escape(w, quote=False).replace("|", "") for w, _ in top)
                rows.append([group, way, f"{run['metrics'][f'{group}_{way}_share']:.0%}", shown])
    return f"{pipes(['answers to', 'way', 'of the words', 'most frequent'], rows)}\n\n{hardware(results)}."


def words(results: dict) -> pd.DataFrame:
    """(way, word, times) of the forget answers of the last run."""
    return word_table(results["runs"][-1]["words"]["forget"])


def run_markdown(stored: dict) -> str:
    """The run that the stored example comes from, as a table: before and after, group by group."""
    rows = []
    for group, after in stored["after"].items():
        before = stored["before"][group]
        kept = f"{after['probability'] / before['probability']:.1%}"
        pairs = [f"{before[k]:.4f} → {after[k]:.4f}" for k in GROUP_COLUMNS]
        rows.append([group.replace("_", " "), str(stored["data"][group]), *pairs, kept])
    lines = pipes(["group", "items", *GROUP_COLUMNS.values(), "probability kept"], rows)
    seconds = stored["seconds"]
    return (
        f"{lines}\n\n{stored['steps']} steps in {seconds['unlearn']} s, peak memory {stored['peak_memory_mb']} MB, "
        f"{seconds['evaluate']} s of measuring; {stored['hardware']}, {stored['date']}."
    )


def pipes(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])
