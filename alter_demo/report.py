"""Results files as the page and the README show them: one `Kind` for each command that writes one.

A table stands in README.md between `<!-- results:NAME -->` and `<!-- end -->`, with the command that made its results
above it (`python -m alter_demo report`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from . import figures, tables
from .data import EXAMPLE
from .errors import UserError
from .results import REFERENCES, SIZES, TASKS, read_results, tasks_of


@dataclass(frozen=True)
class Kind:
    """What the results of one kind are shown as."""

    holds: Callable[[dict], bool]
    frame: Callable[[dict], pd.DataFrame]  # on the page
    markdown: Callable[[dict], str]  # in the README
    commands: Callable[[dict], list[str]]  # that make such results, without `--results`
    drawings: dict[str, Callable] = field(default_factory=dict)  # name of the image -> plotly figure, or PIL image
    said: str = ""


def overridden(name: str) -> Callable[[dict], bool]:
    """Whether any run's overrides hold `name`."""
    return lambda results: any(name in (run["config"].get("overrides") or {}) for run in results["runs"])


def has(key: str) -> Callable[[dict], bool]:
    return lambda results: any(key in run for run in results["runs"])


def is_tuning(results: dict) -> bool:
    own = [r["config"].get("overrides") for r in results["runs"] if r["method"] not in REFERENCES]
    return bool(own) and all(o and not {"rounds", "attack", "variant", "share"} & set(o) for o in own)


def is_choice(results: dict) -> bool:
    return any("kept_acc" in run["metrics"] for run in results["runs"])


def loaded_as(results: dict) -> list[str]:
    """Options that say which model the results are of, and how it was loaded, where they are not the usual ones."""
    asked = results["runs"][0]["config"]
    found = [] if asked["model"] == "smollm2-135m" else ["--model", asked["model"]]
    loaded = dict(asked.get("loaded") or {})
    machines = {r["hardware"] for r in results["runs"] if r.get("hardware")}
    if "dtype" not in loaded and any("(float32)" in m and "threads" not in m for m in machines):
        loaded["dtype"] = "float32"  # the usual one on a CPU alone
    for name, value in loaded.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return found


def size_of(results: dict, default: str = "cpu") -> list[str]:
    asked = results["runs"][0]["config"]
    tokens = asked.get("tokens")
    size = next((k for k, v in SIZES.items() if tokens == v.get("tokens", 200)), default)
    found = [] if size == default else ["--size", size]
    return found if asked.get("limit") == SIZES[size].get("limit") else [*found, "--limit", str(asked["limit"])]


def rivals(results: dict) -> list[dict]:
    return [run for run in results["runs"] if run["method"] not in REFERENCES]


def plainly(command: str, results: dict, more: list[str]) -> str:
    """The command with forget set, methods and seeds as the runs have them."""
    seeds, methods = ({str(run[k]): None for run in rivals(results)} for k in ("seed", "method"))
    forget = results["runs"][0]["config"]["forget"]
    parts = [command, "--forget", forget, "--methods", *methods, "--seeds", *seeds, *loaded_as(results), *more]
    return " ".join(parts)


def by_setting(command: str, runs: list[dict], more: list[str]) -> list[str]:
    """The command of the methods' own settings, and one for each set of values that was tried."""
    tried: dict[tuple[str, ...], list[dict]] = {}
    for run in rivals({"runs": runs}):
        tried.setdefault(tuple(tables.tried_on(run)), []).append(run)
    settings = {values: ["--set", *values] if values else [] for values in tried}
    return [plainly(command, {"runs": own}, [*more, *settings[values]]) for values, own in tried.items()]


def attack_commands(results: dict) -> list[str]:
    runs = tables.attack_runs(results)
    items = str(runs[0]["config"]["overrides"]["attack"]["items"])
    return by_setting("python -m alter_demo attack", runs, [*size_of(results), "--items", items])


def choice_commands(results: dict) -> list[str]:
    runs = tables.choice_runs(results)
    asked, scored = runs[0]["config"], tasks_of(runs[0])
    more = [] if asked["limit"] is None else ["--limit", str(asked["limit"])]
    more += [] if tuple(scored) == TASKS[asked["forget"]] else ["--tasks", *scored]
    return by_setting("python -m alter_demo wmdp", runs, more)


def grid_commands(results: dict) -> list[str]:
    """The command of the methods' own settings; where there are tries alone, one for each set of values, with the
    methods that they were tried on."""
    forget = results["runs"][0]["config"]["forget"]
    results = {"runs": [r for r in rivals(results) if not tables.tried_on(r)] or results["runs"]}
    tried: dict[tuple, dict[str, list]] = {}  # (method, names of its settings) -> setting -> values
    names: dict[str, dict] = {}
    for run in rivals(results):
        names.setdefault(run["method"], {}).update(dict.fromkeys(run["config"].get("overrides") or {}))
    shares = sorted({(run["config"].get("overrides") or {}).get("share", 1.0) for run in rivals(results)})
    for run in rivals(results):
        overrides = {k: v for k, v in tables.setting(run, names[run["method"]]).items() if k != "share"}
        own = tried.setdefault((run["method"].split("/")[0], *overrides), {k: [] for k in overrides})
        for key, value in overrides.items():
            own[key] = [*dict.fromkeys([*own[key], value])]
    seeds, found = sorted({str(run["seed"]) for run in rivals(results)}), []
    for values in [v for k, v in enumerate(tried.values()) if v not in list(tried.values())[:k]]:
        rounds = values.get("rounds", [])
        listed = [f"{k}={','.join(map(tables.plain, v))}" for k, v in values.items() if k != "rounds"]
        muse = forget.startswith("muse-")
        parts = [f"python -m alter_demo {'muse' if muse else 'tofu'} --forget", forget]
        parts += loaded_as(results) + ([] if muse else size_of(results))
        parts += ["--methods", *(key[0] for key, v in tried.items() if v == values), "--seeds", *seeds]
        parts += [f"--rounds {rounds[0]}"] if rounds else []
        parts += ["--shares", *map(tables.plain, shares)] if muse and not rounds else []
        parts += ["--set", *listed] if listed else []
        found.append(" ".join(parts))
    return found


def ablation_commands(results: dict) -> list[str]:
    own = rivals(results)
    seeds = " ".join(dict.fromkeys(str(run["seed"]) for run in own))
    forget, method = own[0]["config"]["forget"], own[0]["method"]
    names = dict.fromkeys(shlex.quote(run["config"]["overrides"]["variant"]) for run in own)
    parts = ["--method", method, "--seeds", seeds, *loaded_as(results), *size_of(results, "tune"), "--variants", *names]
    return [f"python -m alter_demo ablation --forget {forget} {' '.join(parts)}"]


def heterogeneity_commands(results: dict) -> list[str]:
    asked = results["runs"][0]["config"]
    return [
        "python -m alter_demo heterogeneity " + " ".join(f"--{k} {asked[k]}" for k in ("domains", "steps", "layers"))
    ]


def bench_commands(results: dict) -> list[str]:
    found = []
    for asked in (run["config"] for run in results["runs"]):
        more = ["--load-in-4bit"] * asked["load_in_4bit"] + ["--steps", str(asked["steps"])]
        found.append(f"python -m alter_demo bench --model {asked['model']} --dtype {asked['dtype']} {' '.join(more)}")
    return list(dict.fromkeys(found))


def figures_of(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="diverged").reset_index()


# the first that holds; the last holds for all
KINDS: dict[str, Kind] = {
    "bench": Kind(
        lambda r: all(x["method"] == "bench" for x in r["runs"]) and bool(r["runs"]), tables.costs,
        tables.costs_markdown, bench_commands,
        said="A training step and a generated token, beside PEFT's LoRA and full fine-tuning.",
    ),
    "heterogeneity": Kind(
        has("points"), tables.heterogeneity, tables.heterogeneity_markdown, heterogeneity_commands,
        {"domains": figures.heterogeneity},
        "LoRAs of several domains from one start: what their A's learned is more alike than what their B's learned.",
    ),
    "words": Kind(
        has("words"), tables.words, tables.words_markdown, lambda r: ["python -m alter_demo words runs/hp"],
        {"clouds": figures.word_clouds}, "Which words of the untouched model's answers go through A, which through B.",
    ),
    "attacks": Kind(
        overridden("attack"), lambda r: tables.attacked(r).reset_index(), tables.attacks_markdown,
        attack_commands, {"relearning": figures.relearning},
        "ROUGE-L of what each attack brings back (the right answer scores 1).",
    ),
    "ablation": Kind(
        overridden("variant"), lambda r: figures_of(tables.ablated(r)), tables.ablation_markdown, ablation_commands,
        said="ALTER without one of its parts, or with another number.",
    ),
    "choice": Kind(
        is_choice, lambda r: tables.accuracies(r).reset_index(), tables.choice_markdown,
        choice_commands,
        said="Percent of multiple-choice questions answered rightly. *school*: subjects written for this project, in "
        "place of WMDP and MMLU. On plain texts alter_selective trains longer than the others.",
    ),
    "tuning": Kind(
        is_tuning, lambda r: figures_of(tables.tried(r)), tables.tuning_markdown, grid_commands,
        said="Every setting that was tried; the highest score of a method is its default.",
    ),
    "rounds": Kind(
        lambda r: any("/" in run["method"] for run in r["runs"]), lambda r: figures_of(tables.rounds(r)),
        tables.rounds_markdown, grid_commands, {"rounds": figures.sequential},
        "The forget set grows round by round; what is left of all of it is measured after each.",
    ),
    "grid": Kind(
        lambda r: True, tables.named_medians, tables.markdown,
        grid_commands, {"tradeoff": figures.tradeoff, "cost": figures.cost},
    ),
}  # fmt: skip


def kind_of(results: dict) -> Kind:
    return next(kind for kind in KINDS.values() if kind.holds(results))


def table_of(results: dict) -> str:
    """The README's table of a results file."""
    return kind_of(results).markdown(results)


def commands_of(results: dict, name: str) -> list[str]:
    """The commands that the results file `name` comes from, read off its runs."""
    return [f"{c} --results assets/results/{name}.json" for c in kind_of(results).commands(results)]


def drawings_of(results: dict) -> dict[str, Callable]:
    """The drawings that these results have the numbers for."""
    bases = {run["method"] for run in results["runs"]} & set(figures.COST_BASES)
    drawn = kind_of(results).drawings if any(run["metrics"] for run in results["runs"]) else {}
    timed = any("seconds" in run for run in results["runs"])
    return {name: draw for name, draw in drawn.items() if name != "cost" or (bases and timed)}


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` in the place that is marked for `name`, unchanged where there is none."""
    place = re.compile(rf"(<!-- results:{re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def report(folder: Path = tables.RESULTS, readme: Path = Path("README.md")) -> list[Path]:
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
        text = fill(text, "harry-potter", tables.run_markdown(json.loads(EXAMPLE.read_text(encoding="utf-8"))))
    for file in files:
        results = read_results(file)
        text = fill(text, file.stem, table_of(results))
        for name, draw in drawings_of(results).items():
            image, drawn = folder.parent / f"{file.stem}_{name}.png", draw(results)
            drawn.save(image) if hasattr(drawn, "save") else drawn.write_image(image, scale=1.5)
            written.append(image)
    readme.write_text(text, encoding="utf-8")
    return written
