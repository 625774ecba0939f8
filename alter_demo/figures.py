"""Figures and README tables, from results files only (`python -m alter_demo report`).

Nothing here is typed by hand: a table stands in README.md between `<!-- results:NAME -->` and `<!-- end -->`, with the
command that made its results above it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from .data import EXAMPLE
from .errors import UserError
from .results import REFERENCES, SIZES, read_results

RESULTS = Path(__file__).parents[1] / "assets" / "results"
ASKED = ("forget", "model", "retain_items", "limit", "kept", "tokens")
OURS = ("alter", "alter_selective")
COST_BASES = ("asym_lora", "grad_diff")  # what a method's seconds and memory are set beside
SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "cross", "pentagon", "hexagon", "circle-open",
           "square-open", "triangle-up-open", "triangle-down-open", "pentagon-open", "hexagon-open")  # fmt: skip
FALLING = {  # measures of forgetting that are better when lower -> the axis of a drawing
    "ASG": "ASG, distance to answers about what is not known (lower is better)",
    "forget_knowmem_ROUGE": "knowledge of what is forgotten, ROUGE-L F1 (lower is better)",
}
BLUE, GREY, ORANGE = "#0b5fa5", "#6b7280", "#c2570c"
SHOWN = {
    "forget_quality": "forget quality p",
    "model_utility": "model utility",
    "retain_Q_A_ROUGE": "retain ROUGE-L",
    "forget_Q_A_Prob": "forget probability",
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
    asked = {json.dumps({k: run["config"].get(k) for k in ASKED}) for run in results["runs"]}
    if len(asked) > 1:
        raise UserError("The results file mixes different data, models or sizes: one file for each (--results).")
    numbers = dict.fromkeys((*SHOWN, "seconds", "MB"), float)  # absent: NaN
    table = pd.DataFrame(rows).astype(numbers).groupby("method", sort=False)
    counts, lost = table["seed"].nunique(), table["diverged"].sum()
    return table.median(numeric_only=True).drop(columns="seed").assign(seeds=counts, diverged=lost)


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


def tradeoff(results: dict) -> go.Figure:
    """Forget quality against model utility for all methods, the retain-only model as a star (ALTER, Fig. 4).

    Our rows and the two references carry their names; the rivals, which may lie close together, have a symbol each.
    """
    table = medians(results)
    y = forgetting(table)
    shown = "p" if y == "forget_quality" else y
    figure = go.Figure()
    front = table.loc[pareto(table)]
    figure.add_scatter(
        x=front["model_utility"], y=front[y], mode="lines", line={"dash": "dot", "color": GREY},
        name="Pareto front", hoverinfo="skip",
    )  # fmt: skip
    symbols = itertools.cycle(SYMBOLS)
    for method, row in table.iterrows():
        ours, reference = method in OURS, method in REFERENCES
        named = ours or reference
        symbol = {"retain": "star", "target": "x"}.get(method) or ("diamond" if ours else next(symbols))
        figure.add_scatter(
            x=[row["model_utility"]], y=[row[y]], mode="markers+text", text=[method if named else ""],
            textposition="bottom center", name=method, showlegend=not named, cliponaxis=False,
            hovertemplate=f"{method}: utility %{{x:.3f}}, {shown} %{{y:.2g}}<extra></extra>",
            marker={"symbol": symbol, "size": 16 if named else 11,
                    "color": BLUE if ours else ORANGE if reference else GREY},
        )  # fmt: skip
    figure.update_layout(xaxis_title="model utility (higher is better)")
    values = table["model_utility"].dropna()
    margin = 0.2 * max(values.max() - values.min(), 0.05) if len(values) else 0
    if len(values):
        figure.update_xaxes(range=[values.min() - margin, values.max() + margin])  # room for the names
    if y in FALLING:
        figure.update_yaxes(title=FALLING[y], autorange="reversed")
    else:
        figure.update_yaxes(title="forget quality, p of the KS test", type="log", exponentformat="e")
    return plain_look(figure)


def commands_of(results: dict, name: str) -> list[str]:
    """The commands that a results file comes from, read off its runs: one for each set of values that were tried."""
    runs = [run for run in results["runs"] if run["method"] not in REFERENCES]
    asked = results["runs"][0]["config"]
    size = next((k for k, v in SIZES.items() if v and all(asked.get(x) == v[x] for x in ("limit", "kept"))), "cpu")
    if is_attacks(results):
        seeds, methods = ({str(run[k]): None for run in runs} for k in ("seed", "method"))
        options = f"--forget {asked['forget']} --methods {' '.join(methods)} --seeds {' '.join(seeds)}"
        return [f"python -m alter_demo attack {options} --results assets/results/{name}.json"]
    if is_choice(results):
        seeds, methods = ({str(run[k]): None for run in runs} for k in ("seed", "method"))
        options = f"--forget {asked['forget']} --methods {' '.join(methods)} --seeds {' '.join(seeds)}"
        return [f"python -m alter_demo wmdp {options} --results assets/results/{name}.json"]
    if own := variants(results):
        seeds = dict.fromkeys(str(run["seed"]) for run in own)
        options = f"--forget {asked['forget']} --size {size} --method {own[0]['method']} --seeds {' '.join(seeds)}"
        return [f"python -m alter_demo ablation {options} --results assets/results/{name}.json"]
    tried: dict[str, dict[str, list]] = {}  # method -> setting -> values
    for run in runs:
        own = tried.setdefault(run["method"].split("/")[0], {})
        for key, value in (run["config"].get("overrides") or {}).items():
            own[key] = [*dict.fromkeys([*own.get(key, []), value])]
        own.pop("share", None)  # tried by default
    found = []
    for values in [v for k, v in enumerate(tried.values()) if v not in list(tried.values())[:k]]:
        rounds = values.get("rounds", [])
        listed = [f"{k}={','.join(f'{x:g}' for x in v)}" for k, v in values.items() if k != "rounds"]
        seeds = sorted({str(run["seed"]) for run in runs})
        muse = asked["forget"].startswith("muse-")
        shown = [] if muse or size == "cpu" else ["--size", size]
        parts = [f"python -m alter_demo {'muse' if muse else 'tofu'} --forget", asked["forget"], *shown]
        parts += ["--methods", *(m for m, v in tried.items() if v == values), "--seeds", *seeds]
        parts += [f"--rounds {rounds[0]}"] if rounds else []
        parts += ["--set", *listed] if listed else []
        found.append(" ".join([*parts, f"--results assets/results/{name}.json"]))
    return found


def cost(results: dict) -> go.Figure:
    """Seconds and peak memory of each method, relative to AsymLoRA and to full fine-tuning (grad_diff)."""
    table = medians(results).drop(index=list(REFERENCES), errors="ignore")
    figure = go.Figure()
    for base, colour in zip(COST_BASES, (BLUE, GREY), strict=True):
        for column, pattern in (("seconds", ""), ("MB", "/")):
            if base in table.index:
                figure.add_bar(
                    x=table.index, y=table[column] / table.loc[base, column], marker_color=colour,
                    marker_pattern_shape=pattern, name=f"{column} over {base}'s",
                )  # fmt: skip
    figure.add_hline(y=1, line_dash="dot")
    figure.update_layout(barmode="group", yaxis_title="ratio")
    return plain_look(figure)


def by_round(results: dict) -> pd.DataFrame:
    """Model utility after each round of sequential unlearning, a column a method, medians over the seeds."""
    rows = [(*r["method"].split("/"), r["metrics"]["model_utility"]) for r in results["runs"] if "/" in r["method"]]
    if not rows:
        raise UserError("The results file holds no rounds: tofu --rounds makes some.")
    table = pd.DataFrame(rows, columns=["method", "round", "utility"]).astype({"round": int})
    return table.groupby(["round", "method"])["utility"].median().unstack()


def sequential(results: dict) -> go.Figure:
    """Model utility over the rounds while the forget set grows (ALTER, Fig. 5)."""
    return lines(by_round(results)).update_layout(xaxis_title="round", yaxis_title="model utility")


def lines(table: pd.DataFrame) -> go.Figure:
    """A line for each column of `table`, ours bold; symbols tell the others apart without colour."""
    figure, symbols = go.Figure(), itertools.cycle(SYMBOLS)
    for method in table:
        ours = method in OURS
        figure.add_scatter(
            x=table.index, y=table[method], mode="lines+markers", name=method,
            marker={"symbol": "diamond" if ours else next(symbols), "size": 10},
            line={"width": 4 if ours else 2, "dash": "solid" if ours else "dot"},
        )  # fmt: skip
    return plain_look(figure)


def plain_look(figure: go.Figure) -> go.Figure:
    return figure.update_layout(
        template="simple_white", width=900, height=560, margin={"l": 70, "r": 30, "t": 30, "b": 60}, font={"size": 14}
    )


def markdown(results: dict) -> str:
    """The medians as a Markdown table, best methods in the order of the table of methods."""
    table = medians(results)
    rows, columns = [], [k for k in SHOWN if table[k].notna().any()]
    for method, row in table.iterrows():
        cells = ["" if pd.isna(row[k]) else f"{row[k]:.3g}" for k in columns]
        spent = ["" if pd.isna(row[k]) else f"{row[k]:.0f}" for k in ("seconds", "MB")]
        seeds = f"{row['seeds']:.0f}" + (f" ({row['diverged']:.0f} diverged)" if row["diverged"] else "")
        rows.append([f"**{method}**" if method in OURS else method, *cells, *spent, seeds])
    lines = pipes(["method", *(SHOWN[k] for k in columns), "seconds", "peak MB", "seeds"], rows)
    front, rivals = pareto(table), table.index.difference(list(REFERENCES))
    name = SHOWN[forgetting(table)].removesuffix(" p")
    verdict = f" Not dominated in (utility, {name}): {', '.join(front)}." if len(rivals) > 1 else ""
    grown = f"\n\n{shares_markdown(results)}" if shares(results) else ""
    return f"{lines}\n\nMedians; {hardware(results)}.{verdict}{grown}"


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


def hardware(results: dict) -> str:
    return ", ".join(sorted({r["hardware"] for r in results["runs"] if r.get("hardware")}))


def tried(results: dict) -> pd.DataFrame:
    """Every setting tried for each method with its score, forget quality times model utility, medians over seeds.

    Raises:
        UserError: no run of the file has settings of its own.
    """
    rows = [
        {"method": r["method"], "setting": json.dumps(own, sort_keys=True), "seed": r["seed"], "steps": r.get("steps"),
         **{k: r["metrics"].get(k) for k in ("forget_quality", "model_utility")}}
        for r in results["runs"] if (own := r["config"].get("overrides"))
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no settings that were tried: tofu --set lr=1e-5,1e-4 makes some.")
    numbers = dict.fromkeys(("forget_quality", "model_utility", "steps"), float)
    table = pd.DataFrame(rows).astype(numbers).groupby(["method", "setting"], sort=False).median(numeric_only=True)
    return table.assign(score=table["forget_quality"] * table["model_utility"])


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
            name = ", ".join(f"{k} {v:g}" for k, v in values.items())
            figures = (
                "diverged" if pd.isna(row["score"]) else f"{row['forget_quality']:.2g} / {row['model_utility']:.3f}"
            )
            cells.append(f"**{name}: {figures}**" if values == chosen[method] else f"{name}: {figures}")
        rows.append([method, "; ".join(cells)])
    return pipes(["method", "setting: forget quality p / model utility (chosen in bold)"], rows)


def is_tuning(results: dict) -> bool:
    own = [r["config"].get("overrides") for r in results["runs"] if r["method"] not in REFERENCES]
    return bool(own) and all(o and not {"rounds", "attack", "variant", "share"} & set(o) for o in own)


def variants(results: dict) -> list[dict]:
    return [run for run in results["runs"] if "variant" in (run["config"].get("overrides") or {})]


def accuracies(results: dict) -> pd.DataFrame:
    """Multiple choice in percent, one row a method, medians over the seeds: that of what is forgotten first.

    Raises:
        UserError: the file holds no multiple choice.
    """
    runs = [r for r in results["runs"] if not r["config"].get("overrides")]
    names = dict.fromkeys(k for r in runs for k in r["metrics"] if k.endswith("_acc") and k != "forget_acc")
    if not names:
        raise UserError("The results file holds no multiple choice: python -m alter_demo wmdp makes some.")
    more = {
        "general_ROUGE_to_base": SHOWN["general_ROUGE_to_base"],
        "general_repetition": "repeated 4-grams",
        "general_perplexity": "perplexity of everyday answers",
    }
    rows = [
        {"method": r["method"], "seed": r["seed"],
         **{k.removesuffix("_acc").replace("_", " "): 100 * r["metrics"].get(k, float("nan")) for k in names},
         **{name: r["metrics"].get(k, float("nan")) for k, name in more.items()},
         "seconds": r.get("seconds", {}).get("unlearn", float("nan"))}
        for r in runs
    ]  # fmt: skip
    table = pd.DataFrame(rows).groupby("method", sort=False)
    return table.median(numeric_only=True).drop(columns="seed").assign(seeds=table["seed"].nunique())


def is_choice(results: dict) -> bool:
    return any("forget_acc" in run["metrics"] for run in results["runs"])


def choice_markdown(results: dict) -> str:
    table = accuracies(results)
    rows = [
        [f"**{m}**" if m in OURS else m, *("" if pd.isna(v) else f"{v:.3g}" for v in row)]
        for m, row in table.iterrows()
    ]
    return f"{pipes(['method', *table.columns], rows)}\n\nPercent right, medians; {hardware(results)}."


ABLATED = ("forget_quality", "model_utility", "retain_Q_A_ROUGE", "forget_Q_A_Prob", "extraction_strength",
           "general_ROUGE_to_base", "forget_repetition")  # fmt: skip


def ablated(results: dict) -> pd.DataFrame:
    """What each variant of ALTER comes to, one row a variant, medians over the seeds.

    Raises:
        UserError: the file holds no variants.
    """
    rows = [
        {"variant": r["config"]["overrides"]["variant"], **{SHOWN[k]: r["metrics"].get(k) for k in ABLATED},
         "steps": r.get("steps"), "seconds": r.get("seconds", {}).get("unlearn")}
        for r in variants(results)
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no variants: python -m alter_demo ablation makes some.")
    table = pd.DataFrame(rows)
    return table.astype({k: float for k in table if k != "variant"}).groupby("variant", sort=False).median()


def ablation_markdown(results: dict) -> str:
    table = ablated(results)
    rows = [[name, *("diverged" if pd.isna(v) else f"{v:.3g}" for v in row)] for name, row in table.iterrows()]
    return f"{pipes(['variant', *table.columns], rows)}\n\n{hardware(results)}."


def has_rounds(results: dict) -> bool:
    return any("/" in run["method"] for run in results["runs"])


def attack_runs(results: dict) -> list[dict]:
    return [run for run in results["runs"] if "attack" in (run["config"].get("overrides") or {})]


def is_attacks(results: dict) -> bool:
    return bool(attack_runs(results))


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


def attacked(results: dict) -> pd.DataFrame:
    """ROUGE-L of what each attack brings back, one row a method, medians over the seeds.

    Raises:
        UserError: the file holds no attacks.
    """
    rows = [
        {"method": r["method"], "seed": r["seed"], **{name: r["metrics"].get(k) for name, k in ATTACKS.items()}}
        for r in attack_runs(results)
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no attacks: python -m alter_demo attack makes some.")
    table = pd.DataFrame(rows).astype(dict.fromkeys(ATTACKS, float)).groupby("method", sort=False)
    return table.median(numeric_only=True).drop(columns="seed").assign(seeds=table["seed"].nunique())


def relearning(results: dict, source: str = "forget") -> go.Figure:
    """ROUGE-L on the forget questions over the steps of relearning, a line a method, medians over the seeds."""
    key = re.compile(rf"relearn_{source}_(\d+)_ROUGE")
    rows = [
        {"method": r["method"], "step": int(m[1]), "value": v}
        for r in results["runs"] for k, v in r["metrics"].items() if (m := key.fullmatch(k))
    ]  # fmt: skip
    if not rows:
        raise UserError("The results file holds no relearning: python -m alter_demo attack makes some.")
    table = pd.DataFrame(rows).groupby(["step", "method"])["value"].median().unstack()
    titles = {"xaxis_title": "steps of relearning", "yaxis_title": "ROUGE-L on what was forgotten"}
    return lines(table).update_layout(titles)


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
    leaks = sum(len(r.get("leaks", ())) for r in results["runs"])
    return (
        f"{pipes(['method', *ATTACKS, 'seeds'], rows)}\n\n{leaks} leaks are kept with their text; {hardware(results)}."
    )


def table_of(results: dict) -> str:
    """The README's table of a results file: of a grid, of rounds, of attacks, of an ablation, or of what was tried."""
    if is_attacks(results):
        return attacks_markdown(results)
    if variants(results):
        return ablation_markdown(results)
    if is_choice(results):
        return choice_markdown(results)
    if is_tuning(results):
        return tuning_markdown(results)
    return rounds_markdown(results) if has_rounds(results) else markdown(results)


def rounds_markdown(results: dict) -> str:
    table = by_round(results)
    return pipes(["round", *table.columns], [[str(k), *(f"{v:.3f}" for v in row)] for k, row in table.iterrows()])


GROUP_COLUMNS = {
    "probability": "answer probability",
    "rouge_l": "ROUGE-L",
    "rouge_l_to_base": "ROUGE-L to the untouched model's answers",
    "repetition": "repeated 4-grams",
}


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


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` in the place that is marked for `name`, unchanged where there is none."""
    place = re.compile(rf"(<!-- results:{re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def pipes(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [header, ["---"] * len(header), *rows])


def report(folder: Path = RESULTS, readme: Path = Path("README.md")) -> list[Path]:
    """Write the static images beside the results and the tables into the README; returns what was written.

    Raises:
        UserError: no results, no README, no browser for the images.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"There are no results in {folder}/ yet: python -m alter_demo tofu makes some.")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not readme.is_file():
        raise UserError(f"There is no {readme} to write the tables into.")
    if browser is None:
        raise UserError("The images need a Chromium or Chrome on this machine.")
    os.environ.setdefault("BROWSER_PATH", browser)
    text, written = readme.read_text(encoding="utf-8"), [readme]
    if EXAMPLE.is_file():
        text = fill(text, "harry-potter", run_markdown(json.loads(EXAMPLE.read_text(encoding="utf-8"))))
    for file in files:
        results = read_results(file)
        text = fill(text, file.stem, table_of(results))
        if is_tuning(results) or variants(results) or is_choice(results):
            continue
        drawings = [("rounds", sequential)] if has_rounds(results) else [("tradeoff", tradeoff)]
        if is_attacks(results):
            drawings = [("relearning", relearning)]
        elif {run["method"] for run in results["runs"]} & set(COST_BASES):
            drawings.append(("cost", cost))
        for name, draw in drawings:
            image = folder.parent / f"{file.stem}_{name}.png"
            draw(results).write_image(image, scale=1.5)
            written.append(image)
    readme.write_text(text, encoding="utf-8")
    return written
