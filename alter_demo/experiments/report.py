"""How each type of results is shown: table, figures and description, on the page and in documents.

A document has places for tables between `<!-- results:NAME -->` and `<!-- end -->`, where NAME is
a results file; "harry-potter" is the stored example and "summary" the key figures of all files.
"""

import html
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from plotly.io import write_images

from ..errors import UserError
from ..files import EXAMPLE, RESULTS
from . import figures, tables
from .results import REFERENCES, as_text, read_results
from .tables import OURS, SHOWN


def to_markdown(table: pd.DataFrame, digits=".3g", whole: Sequence[str] = ()) -> str:
    """A table and its index as Markdown. Where methods are compared, ours are bold.

    The columns in `whole` and memory have no decimals. A column "diverged" is not shown: it says
    why a row has no figures.
    """

    def cell(value, column: str) -> str:
        own = ".0f" if column in whole or "MB" in column else digits
        text = f"{value:{own}}" if isinstance(value, float) else str(value)
        return "" if pd.isna(value) else text

    flat = table.reset_index()
    text = flat.apply(lambda column: column.map(lambda value: cell(value, column.name)))
    if "seeds" in text and "method" in text:
        text["method"] = text["method"].replace({m: f"**{m}**" for m in OURS})
    if "diverged" in text:
        reasons = flat["diverged"].map(lambda n: "diverged" if n else "none")
        text = text.where(text != "", reasons, axis=0).drop(columns="diverged")
    return text.to_markdown(index=False, disable_numparse=True)


def hardware(results: dict) -> str:
    return ", ".join(sorted({r["hardware"] for r in results["runs"] if r.get("hardware")})) + "."


def not_dominated(table: pd.DataFrame, x: str, y: str, names: str) -> str:
    """The sentence about the Pareto front, if there are several methods to compare."""
    if y not in table or len(table.index.difference(list(REFERENCES))) < 2:
        return ""
    return f" Not dominated in ({names}): {', '.join(tables.pareto(table, x, y))}."


def grid_note(results: dict) -> str:
    table, growing = tables.medians(results), tables.shares(results)
    y = tables.forgetting(table)
    front = not_dominated(table, "model_utility", y, f"utility, {SHOWN[y].removesuffix(' p')}")
    more = "" if growing is None else f"\n\n{to_markdown(growing)}"
    return f"Medians; {hardware(results)}{front}{more}"


def choice_note(results: dict) -> str:
    front = not_dominated(tables.accuracies(results), "kept", "ASG", "kept, ASG")
    return f"Percent correct, medians; {hardware(results)}{front}"


def attacks_note(results: dict) -> str:
    leaks = sum(len(r.get("leaks", ())) for r in tables.shown_runs(results))
    return f"{leaks} leaks are stored with their text; {hardware(results)}"


def cosine_note(results: dict) -> str:
    return f"Mean cosine of the learned weights; {hardware(results)}"


def tuning_table(results: dict) -> pd.DataFrame:
    """One row per method with all its settings, the chosen one in bold."""
    chosen, cells = tables.chosen_settings(results), {}
    for (method, setting), row in tables.tried(results).iterrows():
        values = json.loads(setting)
        scores = f"{row['forget_quality']:.2g} / {row['model_utility']:.3f}"
        if pd.isna(row["score"]):
            scores = "diverged" if row["diverged"] else "none"
        text = ", ".join(f"{k} {as_text(v)}" for k, v in values.items()) + f": {scores}"
        cells.setdefault(method, []).append(f"**{text}**" if values == chosen[method] else text)
    column = "setting: forget quality p / model utility (chosen in bold)"
    return pd.Series(cells).str.join("; ").rename_axis("method").to_frame(column)


def words_table(results: dict) -> pd.DataFrame:
    """The share of the words on each route, and its most frequent words."""
    rows = []
    for run in results["runs"]:
        for group, routes in run["words"].items():
            for route, counts in sorted(routes.items()):
                share = f"{run['metrics'][f'{group}_{route}_share']:.0%}"
                words = ", ".join(word for word, _ in Counter(counts).most_common(12))
                words = html.escape(words, quote=False).replace("|", "")
                rows.append([group, route, share, words])
    columns = ["answers to", "route", "share", "most frequent words"]
    return pd.DataFrame(rows, columns=columns).set_index("answers to")


def example_markdown(example: dict) -> str:
    """The run of the stored example: before and after, group by group."""
    names = {"probability": "answer probability", "rouge_l": "ROUGE-L"}
    names |= {"rouge_l_to_base": "ROUGE-L to base model", "repetition": "repeated 4-grams"}
    before, after = (pd.DataFrame(example[k]).T[[*names]] for k in ("before", "after"))
    table = (before.map("{:.4f} → ".format) + after.map("{:.4f}".format)).rename(columns=names)
    table.insert(0, "examples", pd.Series(example["data"]))
    kept = after["probability"] / before["probability"]
    table = table.assign(**{"probability kept": kept.map("{:.1%}".format)})
    table.index = table.index.str.replace("_", " ").rename("group")
    seconds = example["seconds"]
    return (
        f"{to_markdown(table)}\n\n{example['steps']} steps in {seconds['unlearn']} s, peak memory "
        f"{example['peak_memory_mb']} MB, {seconds['evaluate']} s of measuring; "
        f"{example['hardware']}, {example['date']}."
    )


@dataclass(frozen=True)
class ResultType:
    """How results of one type are shown."""

    table: Callable[[dict], pd.DataFrame]  # on the page, described by its docstring
    note: Callable[[dict], str] | None = hardware  # the text below the table in documents
    figures: dict[str, Callable] = field(default_factory=dict)  # each draws plotly or an image
    document: Callable[[dict], pd.DataFrame] | None = None  # the table in documents, if another
    digits: str = ".3g"
    whole: tuple[str, ...] = ()  # columns without decimals

    @property
    def description(self) -> str:
        return " ".join(self.table.__doc__.split())

    def frame(self, results: dict) -> pd.DataFrame:
        """The table on the page."""
        return self.table(results).drop(columns="diverged", errors="ignore").reset_index()


RESULT_TYPES = {
    "grid": ResultType(tables.grid, grid_note, whole=("seconds",),
                       figures={"tradeoff": figures.tradeoff, "cost": figures.cost}),
    "tuning": ResultType(tables.tried, None, document=tuning_table),
    "rounds": ResultType(tables.rounds, figures={"rounds": figures.sequential}),
    "choice": ResultType(tables.accuracies, choice_note),
    "attacks": ResultType(tables.attacked, attacks_note, digits=".3f",
                          figures={"relearning": figures.relearning}),
    "ablation": ResultType(tables.ablated),
    "bench": ResultType(tables.costs, None),
    "gate": ResultType(tables.gate_rates),
    "heterogeneity": ResultType(tables.heterogeneity, cosine_note, digits=".3f", whole=("seconds",),
                                figures={"domains": figures.heterogeneity}),
    "words": ResultType(tables.words, document=words_table,
                        figures={"clouds": figures.word_clouds}),
}  # fmt: skip


def result_type(results: dict) -> ResultType:
    """Raises UserError for results of an unknown type."""
    if results["type"] not in RESULT_TYPES:
        types = ", ".join(RESULT_TYPES)
        raise UserError(f"Unknown type of results {results['type']!r}. The types are {types}.")
    return RESULT_TYPES[results["type"]]


def table_of(results: dict) -> str:
    """The table of a results file and its note, as Markdown."""
    shown = result_type(results)
    text = to_markdown((shown.document or shown.table)(results), shown.digits, shown.whole)
    return f"{text}\n\n{shown.note(results)}" if shown.note else text


def commands_of(results: dict) -> list[str]:
    """The commands that make the runs in the table."""
    return list(dict.fromkeys(run["command"] for run in tables.shown_runs(results)))


def figures_of(results: dict) -> dict[str, Callable]:
    """The figures that these results have the numbers for."""
    runs, drawn = results["runs"], dict(result_type(results).figures)
    if not any(run["metrics"] for run in runs):
        return {}
    has_base = any(run["method"] in figures.COST_BASES for run in runs)
    if not has_base or not any("seconds" in run for run in runs):
        drawn.pop("cost", None)
    return drawn


def fill(text: str, contents: Mapping[str, str]) -> str:
    """`text` with a table in each place that is marked for one of `contents`."""

    def filled(place: re.Match) -> str:
        start, name, end = place.groups()
        return f"{start}{contents[name]}\n{end}" if name in contents else place[0]

    return re.sub(r"(?s)(<!-- results:(\S+) -->\n).*?(<!-- end -->)", filled, text)


def all_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Name of the place in a document -> its table, for all results in `folder`."""
    results = {file.stem: read_results(file) for file in sorted(folder.glob("*.json"))}
    if not results:
        raise UserError(f"{folder} holds no results yet. Run `python -m alter_demo tofu` first.")
    contents = {name: table_of(own) for name, own in results.items()}
    if EXAMPLE.is_file():
        example = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        contents["harry-potter"] = example_markdown(example)
    if {file for file, *_ in tables.SUMMARY.values()} <= results.keys():
        note = (
            "Medians over the seeds. The best baseline has the highest product of forgetting "
            "(where lower is better: 1 minus the ratio to the target) and utility."
        )
        contents["summary"] = f"{to_markdown(tables.summary(results))}\n\n{note}"
    return contents


def report(folder: Path = RESULTS, documents: Sequence[Path] | None = None) -> list[Path]:
    """Write all tables into the documents, and the figures next to the results folder.

    `documents` are README.md and docs/*.md by default; those without a place for a table are left.
    Returns the files that were written.
    """
    contents, written = all_tables(folder), []
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise UserError("The figures need Chromium or Chrome. Install one of them.")
    os.environ.setdefault("BROWSER_PATH", browser)
    for document in documents or [Path("README.md"), *sorted(Path("docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8") if document.is_file() else ""
        if "<!-- results:" in text:
            document.write_text(fill(text, contents), encoding="utf-8")
            written.append(document)
    if not written:
        raise UserError("No document has a place for a table (<!-- results:NAME -->).")
    return written + write_figures(folder)


def write_figures(folder: Path) -> list[Path]:
    """Draw all figures of the results in `folder` as images beside it."""
    drawn = {}
    for file in sorted(folder.glob("*.json")):
        results = read_results(file)
        for name, draw in figures_of(results).items():
            drawn[folder.parent / f"{file.stem}_{name}.png"] = draw(results)
    charts = {path: figure for path, figure in drawn.items() if not hasattr(figure, "save")}
    for path in drawn.keys() - charts.keys():
        drawn[path].save(path)
    if charts:  # one start of the browser for all
        write_images([*charts.values()], [*charts], scale=1.5, **figures.SIZE)
    return [*drawn]
