"""Tables, figures and documents come from results files, and from nothing else."""

import json
import shlex
import threading
from pathlib import Path

import pytest

from alter_demo.cli.commands import parse_settings
from alter_demo.cli.experiments import config_of
from alter_demo.cli.main import parser
from alter_demo.config import training_config
from alter_demo.errors import UserError
from alter_demo.experiments import figures, report, tables
from alter_demo.experiments.results import (
    MARKS,
    REFERENCES,
    add_result,
    overrides_of,
    read_results,
    settings_of,
)
from alter_demo.files import RESULTS

ROOT = Path(__file__).parents[1]
STORED = sorted(RESULTS.glob("*.json"))
SPENT = {"seconds": {"unlearn": 10.0}, "peak_memory_mb": 100, "hardware": "a laptop"}


def one_run(method, seed=0, metrics=None, overrides=None, **more):
    config = {"forget": "own", "overrides": overrides or {}}
    run = {
        "method": method,
        "seed": seed,
        "metrics": metrics or {},
        "config": config | {"training": {}},
    }
    run["id"] = json.dumps([method, seed, overrides, more.get("round")])
    return run | {"command": f"python -m alter_demo {method}"} | more


def scored(method, seed, quality, utility, **more):
    metrics = {"forget_quality": quality, "model_utility": utility}
    return one_run(method, seed, metrics, more.pop("overrides", None), **more)


def grid_results() -> dict:
    runs = [scored("target", 0, 0.001, 0.6), scored("retain", 0, 1.0, 0.6)]
    for seed, quality, utility in ((0, 0.1, 0.5), (1, 0.3, 0.4), (2, 0.2, 0.9)):
        runs.append(scored("lora", seed, quality, utility, **SPENT))
    runs.append(scored("npo", 0, 0.1, 0.5))
    runs.append(scored("lora", 0, 1.0, 1.0, overrides={"lr": 1}))  # in no table
    return {"type": "grid", "runs": runs}


def rows_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not row[0].startswith(":-")]


def test_medians_and_pareto_front():
    table = tables.medians(grid_results())
    shown = table.loc["lora"][["forget_quality", "model_utility", "seeds"]]
    assert shown.tolist() == [0.2, 0.5, 3]
    assert tables.pareto(table) == ["lora"]  # npo is no better in either
    text = report.table_of(grid_results())
    assert ["lora", "0.2", "0.5", "10", "100", "3"] in rows_of(text)
    assert "a laptop" in text and text.endswith("Not dominated in (utility, forget quality): lora.")
    names = {t.name: (t.x[0], t.y[0]) for t in figures.tradeoff(grid_results()).data if t.text}
    assert names["lora"] == (0.5, 0.2) and names["retain"] == (0.6, 1.0)
    with pytest.raises(UserError, match="no runs"):
        tables.medians({"type": "grid", "runs": []})


def test_costs_are_relative_to_a_base():
    results = grid_results()
    assert set(report.figures_of(results)) == {"tradeoff"}  # nothing to compare costs with
    spent = {"seconds": {"unlearn": 4.0}, "peak_memory_mb": 200}
    results["runs"].append(scored("asym_lora", 0, 0.1, 0.5, **spent))
    assert set(report.figures_of(results)) == {"tradeoff", "cost"}
    data = figures.cost(results).data
    bars = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in data}
    assert bars["seconds / asym_lora"]["lora"] == 2.5 and bars["peak MB / asym_lora"]["lora"] == 0.5
    for run in results["runs"]:  # seconds of a shared machine are not stored
        run.pop("seconds", None)
    assert set(report.figures_of(results)) == {"tradeoff"}
    assert "seconds" not in rows_of(report.table_of(results))[0]
    assert "peak MB" in rows_of(report.table_of(results))[0]


def test_diverged_runs_are_counted():
    runs = [scored("lora", 0, 0.2, 0.5), one_run("lora", 1, stopped="diverged")]
    results = {"type": "grid", "runs": [*runs, one_run("npo", stopped="diverged")]}
    table = tables.medians(results)
    assert table.loc["npo", "diverged"] == 1 and "npo" not in tables.pareto(table)
    assert ["lora", "0.2", "0.5", "2 (1 diverged)"] in rows_of(report.table_of(results))


def test_mixed_setups_have_no_median():
    results = grid_results()
    results["runs"][2]["config"]["tokens"] = 8
    with pytest.raises(UserError, match="mixes data, models or sizes"):
        report.table_of(results)


def test_known_from_pretraining_shows_asg():
    metrics = {"target": (0.5, 40.0), "alter": (0.5, 5.0), "npo": (0.4, 1.0), "elm": (0.3, 2.0)}
    runs = [one_run(m, metrics={"model_utility": u, "ASG": a}) for m, (u, a) in metrics.items()]
    results = {"type": "grid", "runs": runs}
    text = report.table_of(results)
    assert "ASG" in rows_of(text)[0] and "forget quality p" not in text
    assert text.endswith("(utility, ASG): npo, alter.") and [
        "**alter**",
        "0.5",
        "5",
        "1",
    ] in rows_of(text)
    assert figures.tradeoff(results).layout.yaxis.autorange == "reversed"


def test_a_growing_forget_set_has_its_own_table():
    def run(method, left, kept, share=None):
        metrics = {"forget_knowmem_ROUGE": left, "retain_knowmem_ROUGE": kept, "model_utility": 1.0}
        return one_run(method, metrics=metrics, overrides=share and {"share": share})

    runs = [run("target", 1.0, 1.0), run("alter", 0.2, 0.9), run("alter", 0.3, 0.95, share=0.5)]
    results = {"type": "grid", "runs": runs}
    first, second = report.table_of(results).split("Medians")
    assert len(rows_of(first)) == 3 and rows_of(second) == [
        ["method", "50% of the set: forget / retain", "100% of the set: forget / retain"],
        ["alter", "0.300 / 0.950", "0.200 / 0.900"],
    ]
    assert report.commands_of(results)[-1] == "python -m alter_demo alter"


def test_tuning_shows_every_setting_and_the_best():
    runs = [
        scored("target", 0, 0.1, 0.6),
        one_run("npo", stopped="diverged", overrides={"lr": 0.1}),
    ]
    for values, quality in (({"lr": 0.001}, 0.2), ({"lr": 0.01}, 0.5), ({"r": 4}, 0.1)):
        runs.append(scored("lora", 0, quality, 0.5, overrides=values))
        runs[-1]["config"] |= {"training": {"lr": 0.002} | values, "adapter": {"r": 8} | values}
    runs.append(scored("alter", 0, 0.5, 0.5, overrides={"threshold": "auto"}))  # may be a word
    results = {"type": "tuning", "runs": runs}
    assert tables.chosen_settings(results)["lora"] == {"lr": 0.01, "r": 8}
    cells = dict(rows_of(report.table_of(results)))
    assert cells["npo"] == "**lr 0.1: diverged**" and cells["alter"].startswith("**threshold auto:")
    assert cells["lora"] == (
        "lr 0.001, r 8: 0.2 / 0.500; **lr 0.01, r 8: 0.5 / 0.500**; lr 0.002, r 4: 0.1 / 0.500"
    )
    frame = report.result_type(results).frame(results)
    assert list(frame)[:2] == ["method", "setting"] and "diverged" not in frame


def test_defaults_are_the_settings_that_measured_best():
    stored = read_results(RESULTS / "tuning.json")
    for method, setting in tables.chosen_settings(stored).items():
        own = training_config(method)
        assert {k: getattr(own, k) for k in setting} == setting, method


def test_rounds_in_their_order():
    runs = [scored("npo", 0, 0.1, 1 / k, round=k, overrides={"rounds": 10}) for k in (10, 1, 2)] + [
        one_run("lora", round=1, overrides={"rounds": 10}, stopped="diverged")
    ]
    results = {"type": "rounds", "runs": runs}
    assert rows_of(report.table_of(results)) == [
        ["method", "round", "model utility", "forget quality p"],
        ["lora", "1", "diverged", "diverged"],
        ["npo", "1", "1", "0.1"],
        ["npo", "2", "0.5", "0.1"],
        ["npo", "10", "0.1", "0.1"],
    ]
    (line, _) = sorted(figures.sequential(results).data, key=lambda t: t.name != "npo")
    assert list(line.x) == [1, 2, 10]


def test_multiple_choice_in_percent():
    metrics = {"a_acc": 0.5, "b_acc": 0.75, "forget_acc": 0.5, "kept_acc": 0.75}
    runs = [one_run("target", metrics=metrics), one_run("alter", metrics=metrics | {"a_acc": 0.25})]
    runs.append(one_run("alter", metrics=metrics, overrides={"lr": 0.01}))
    results = {"type": "choice", "runs": runs}
    text = report.table_of(results)
    assert rows_of(text)[0] == ["method", "a", "b", "kept", "seeds"]
    assert rows_of(text)[2:] == [["**alter**", "25", "75", "75", "1"]] and "dominated" not in text
    for run, asg in zip(
        runs, (9.0, 2.0, 1.0), strict=True
    ):  # then settings stand beside the others
        run["metrics"] = run["metrics"] | {"ASG": asg}
    text = report.table_of(results)
    assert ["alter lr=0.01", "50", "75", "75", "1", "1"] in rows_of(text)
    assert text.endswith("Not dominated in (kept, ASG): alter lr=0.01.")


def test_variants_of_one_method():
    def variant(name, method="alter", **values):
        return scored(method, 0, 0.5, 0.6, overrides={"variant": name} | values, steps=30)

    runs = [scored("target", 0, 0.1, 0.6), variant("as it is"), variant("rank 2", r=2)]
    results = {"type": "ablation", "runs": runs}
    rows = rows_of(report.table_of(results))
    assert rows[0] == ["variant", "forget quality p", "model utility", "steps"]
    assert [row[0] for row in rows[1:]] == ["as it is", "rank 2"]
    runs.append(variant("rank 2", "alter_selective"))
    with pytest.raises(UserError, match="two methods"):
        report.table_of(results)


def test_attacks_compare_shared_seeds():
    def attacked(method, seed, rouge, items=24, **settings):
        metrics = {
            "asked_ROUGE": rouge,
            "relearn_forget_0_ROUGE": rouge,
            "relearn_forget_5_ROUGE": 1,
        }
        overrides = {"attack": {"items": items}} | settings
        return one_run(method, seed, metrics, overrides, leaks=[{"said": "Hogwarts"}])

    runs = [attacked("npo", 0, 0.1), attacked("npo", 1, 0.9), attacked("alter", 0, 0.2)]
    runs += [attacked("retain", 0, 0.3), attacked("alter", 0, 0.7, r=32)]
    results = {"type": "attacks", "runs": runs}
    text = report.table_of(results)
    shown = [[row[0], row[2], row[-1]] for row in rows_of(text)[1:]]
    assert shown == [["retain", "0.300", "1"], ["npo", "0.100", "1"], ["**alter**", "0.200", "1"]]
    assert "4 leaks are stored" in text  # that of the setting is not counted
    assert [list(line.x) for line in figures.relearning(results).data] == [[0, 5]] * 3
    results["runs"] = runs[4:]  # settings alone are shown
    assert rows_of(report.table_of(results))[1][0] == "alter r=32"
    results["runs"] = [attacked("npo", 0, 0.1), attacked("npo", 1, 0.1, items=4)]
    with pytest.raises(UserError, match="mixes"):
        report.table_of(results)


def test_the_report_fills_the_marked_places(tmp_path):
    (tmp_path / "results").mkdir()
    results = grid_results()
    results["runs"].append(scored("asym_lora", 0, 0.1, 0.5, **SPENT))
    (tmp_path / "results" / "tofu.json").write_text(json.dumps(results))
    places = "Before.\n<!-- results:tofu -->\nold\n<!-- end -->\nAfter.\n"
    texts = {"README.md": places, "docs.md": f"Two. {places}", "other.md": "Nothing to fill.\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    documents = [tmp_path / name for name in texts]
    written = report.report(tmp_path / "results", documents)
    for name in ("README.md", "docs.md"):
        text = (tmp_path / name).read_text()
        assert "old" not in text and "| lora " in text and text.endswith("After.\n")
    assert (tmp_path / "other.md").read_text() == texts["other.md"]
    images = [p for p in written if p.suffix == ".png"]
    assert len(written) == 4 and len(images) == 2
    assert all(p.stat().st_size > 1000 for p in images)
    again = report.fill(documents[1].read_text(), report.all_tables(tmp_path / "results"))
    assert again == documents[1].read_text()
    with pytest.raises(UserError, match="No document"):
        report.report(tmp_path / "results", documents[2:])
    with pytest.raises(UserError, match="no results yet"):
        report.report(tmp_path / "none", documents)


def test_documents_hold_the_stored_results_and_nothing_else():
    contents = report.all_tables(RESULTS)
    assert {"imaginary-authors", "tofu", "harry-potter", "summary"} <= set(contents)
    texts = [p.read_text() for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    for name, table in contents.items():
        place = f"<!-- results:{name} -->\n{table}\n<!-- end -->"
        assert any(place in text for text in texts), f"{name}: run python -m alter_demo report"


def test_the_summary_has_the_best_baseline():
    table = tables.summary({file.stem: read_results(file) for file in STORED})
    assert list(table.index) == list(tables.SUMMARY)
    medians = tables.medians(read_results(RESULTS / "tofu.json"))
    scores = (medians["forget_quality"] * medians["model_utility"]).drop(
        [*REFERENCES[:2], *tables.OURS]
    )
    assert table.loc["TOFU", "best baseline"].startswith(f"{scores.idxmax()}: ")


@pytest.mark.parametrize("file", STORED, ids=lambda path: path.stem)
def test_stored_runs_carry_their_command(file):
    """Each command asks for the method, seed, settings and size of the runs that carry it."""
    results = read_results(file)
    assert results["type"] in report.RESULT_TYPES and report.commands_of(results)
    for run in results["runs"]:
        args = parser().parse_args(shlex.split(run["command"])[3:])
        assert args.results == Path("assets/results") / file.name
        assert ("round" in run) == (results["type"] == "rounds")
        if "size" in args:
            names = ("forget", "model", "retain_items", "limit", "kept", "tokens")
            config = vars(config_of(args))
            assert {k: config[k] for k in names} == {k: run["config"][k] for k in names}
        if run["method"] in REFERENCES or "seeds" not in args:
            continue
        assert run["seed"] in args.seeds and args.forget == run["config"]["forget"]
        assert run["method"] in ([args.method] if "method" in args else args.methods)
        overrides = overrides_of(run)
        if "variant" in overrides:
            assert overrides["variant"] in args.variants
            continue
        assert getattr(args, "rounds", None) == overrides.get("rounds")
        assert results["type"] == "rounds" or overrides.get("share", 1) in getattr(
            args, "shares", [1]
        )
        settings = parse_settings(getattr(args, "set", []))
        known = tables.values_of(run, settings)
        assert settings_of(run).keys() <= settings.keys() == known.keys()
        for name, values in settings.items():
            assert known[name] in (values if isinstance(values, list) else [values]), name


def test_results_files_are_added_to(tmp_path):
    path = tmp_path / "r.json"
    assert read_results(path) == {"type": None, "runs": []}
    add_result(path, one_run("lora", 0, {"x": 1.0}), "grid")
    add_result(path, one_run("lora", 0, {"x": 2.0}), "grid")  # in place of the first
    again = add_result(path, one_run("lora", 0, {"x": 3.0}), "tuning", stale=())
    assert [r["metrics"]["x"] for r in again["runs"]] == [2, 3] and again["type"] == "grid"
    assert all(r["date"] for r in again["runs"]) and again == read_results(path)
    assert path.stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match="holds results of type 'grid', not 'attacks'"):
        add_result(path, one_run("lora"), "attacks")
    before = path.read_text()
    threads = [
        threading.Thread(target=add_result, args=(path, one_run("npo", seed), "grid"))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r["seed"] for r in read_results(path)["runs"]} == {*range(8)}
    for damaged in (before[:-9], "[]", '{"runs": []}', '{"type": "grid", "runs": [{"id": "1"}]}'):
        path.write_text(damaged)
        with pytest.raises(UserError, match="not a complete results file"):
            add_result(path, one_run("lora"), "grid")
    with pytest.raises(UserError, match="is a folder"):
        read_results(tmp_path)
    assert MARKS.isdisjoint(settings_of(one_run("lora", overrides={"share": 0.5})))
