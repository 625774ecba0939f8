"""The grid on a tiny model: it fills one results file, goes on where it stopped, and its tables come from there."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import COLOURS, OWN_FORGET, OWN_RETAIN

from alter_demo import attacks, data, figures, grid, report, tables, wmdp
from alter_demo.cli import grid_of, main, parser
from alter_demo.data import ForgetSet, Item, general_items
from alter_demo.errors import UserError
from alter_demo.grid import GridConfig, How
from alter_demo.methods import METHODS
from alter_demo.results import TASKS, read_results
from alter_demo.training import train_config

ROOT = Path(__file__).parents[1]
FEW = {"max_steps": 2, "batch_size": 2, "probe_every": 1}


@pytest.fixture
def small(tiny, cache, monkeypatch):
    """A set in TOFU's form that `grid` finds under the name tofu-forget01, and the tiny model to teach it to."""

    def item(i, what, right, wrong):
        return Item(
            f"What colour has the {what} of house {i}?", f"The {what} is {right}.", f"House {i}: its {what}'s colour?",
            f"It has a {right} {what}.", [f"It has a {w} {what}." for w in wrong],
        )  # fmt: skip

    def make():
        forget = [item(i, "door", c, COLOURS[:2]) for i, c in enumerate(COLOURS)]
        keep = [item(i, "roof", c, COLOURS[2:4]) for i, c in enumerate(COLOURS)]
        train, held_out = general_items()
        others = [item(i, "wall", c, []) for i, c in enumerate(COLOURS)]
        return ForgetSet(
            "tofu-forget01", forget, keep, train[:3], data.asked_differently(forget), data.asked_differently(keep),
            held_out[:3], learned=True, more={"retain": keep}, holdout=others,
        )  # fmt: skip

    monkeypatch.setattr("alter_demo.answers.OWN_TOKENS", 4)
    monkeypatch.setitem(data.FORGET_SETS, "tofu-forget01", make)
    return GridConfig(model=str(tiny), limit=6, kept=4, tokens=4, epochs=8)


def test_a_grid_goes_on_where_it_stopped(small, tmp_path):
    path, seen = tmp_path / "r.json", []
    stops = iter([False, True])
    grid.grid(small, ["grad_diff", "lora"], [0], How(path, FEW, should_stop=lambda: next(stops, True)))
    first = json.loads(path.read_text())["runs"]
    assert [r["method"] for r in first] == ["target", "retain"]  # the item that was stopped does not count
    grid.grid(small, ["grad_diff"], [0], How(path, FEW))
    before = json.loads(path.read_text())["runs"]
    assert [r["method"] for r in before] == ["target", "retain", "grad_diff"]
    tell = How(path, FEW, on_stage=lambda what, share: seen.append(what))
    results = grid.grid(small, ["grad_diff", "lora"], [0, 1], tell)
    after = json.loads(path.read_text())["runs"]
    assert after[:3] == before and results["runs"] == after
    assert [(r["method"], r["seed"]) for r in after[3:]] == [("lora", 0), ("grad_diff", 1), ("lora", 1)]
    assert any(s.startswith("3 of 3: lora, seed 1") for s in seen) and not any("teaching" in s for s in seen)
    run = after[-1]
    assert {"method", "seed", "metrics", "config", "seconds", "peak_memory_mb", "hardware"} <= set(run)
    assert {"forget_quality", "model_utility", "extraction_strength", "privleak", "mia_min_k"} <= set(run["metrics"])
    assert run["config"]["train"]["max_steps"] == 2 and run["config"]["overrides"] == FEW
    assert after[1]["metrics"]["forget_quality"] == 1.0 and after[1]["metrics"]["privleak"] == 0.0


def test_other_wrong_answers_are_measured_anew(small, tmp_path, monkeypatch):
    """The references' logs are kept in the cache, as long as all that they were asked is the same."""
    first = grid.grid(small, [], [0], How(tmp_path / "a.json"))
    make = data.FORGET_SETS["tofu-forget01"]

    def other():
        made = make()
        changed = [replace(i, perturbed_answer=["Nobody knows."] * 2) for i in made.forget]
        return replace(made, forget=changed, training=made.trained_on)

    monkeypatch.setitem(data.FORGET_SETS, "tofu-forget01", other)
    second = grid.grid(small, [], [0], How(tmp_path / "b.json"))
    ratios = [r["runs"][0]["metrics"]["forget_truth_ratio"] for r in (first, second)]
    assert ratios[0] != ratios[1]


def test_seconds_of_a_busy_machine_are_not_kept(small, tmp_path):
    path = tmp_path / "r.json"
    results = grid.grid(small, ["grad_diff"], [0], How(path, {**FEW, "batch_size": 1}, timed=False))
    run = results["runs"][-1]
    assert run["method"] == "grad_diff" and "seconds" not in run and "peak_memory_mb" in run
    for run in results["runs"]:
        run["config"]["overrides"] = {}
    head = tables.markdown(results).splitlines()[0]
    assert "seconds" not in head and "peak MB" in head
    assert set(report.drawings_of(results)) == {"tradeoff"}


def test_what_ran_with_other_settings_is_run_again(small, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    few = {"max_steps": 1, "batch_size": 2}
    for method in ("lora", "grad_diff"):
        monkeypatch.setitem(METHODS, method, replace(METHODS[method], train=METHODS[method].train | few))
    before = grid.grid(small, ["lora", "grad_diff"], [0], How(path))["runs"]
    monkeypatch.setitem(METHODS, "lora", replace(METHODS["lora"], train=METHODS["lora"].train | {"lr": 0.05}))
    after = grid.grid(small, ["lora", "grad_diff"], [0], How(path))["runs"]
    assert [r["method"] for r in after] == ["target", "retain", "grad_diff", "lora"]  # the others were left alone
    assert after[-1]["config"]["train"]["lr"] == 0.05 and after[-1]["metrics"] != before[2]["metrics"]
    usual = grid.Bench(small, ["lora"], How(path))
    for other in ({"dtype": "bfloat16"}, {"load_in_4bit": True}, {"retain_model": "another"}):
        assert grid.Bench(small, ["lora"], How(path, **other)).key("lora", 0, {}) != usual.key("lora", 0, {})
    with pytest.raises(UserError, match="4-bit weights"):
        grid.Bench(small, ["npo"], How(path, load_in_4bit=True))


def test_two_commands_share_a_file(small, tmp_path):
    one, other = (grid.Bench(small, ["lora"], How(tmp_path / "r.json")) for _ in range(2))
    one.hardware = other.hardware = "a laptop"
    one.add("lora", 0, {"x": 1.0}, {})
    other.add("lora", 1, {"x": 2.0}, {})  # had read the file before the first was in it
    assert [r["seed"] for r in read_results(tmp_path / "r.json")["runs"]] == [0, 1]
    one.add("lora", 0, {"x": 3.0}, {"variant": "no router", "router": False})
    one.add("lora", 0, {"x": 4.0}, {"variant": "no router", "router": False})  # a variant is run again, not beside it
    assert [r["metrics"]["x"] for r in read_results(tmp_path / "r.json")["runs"]] == [1, 2, 4]
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(UserError, match="not a whole results file"):
        other.add("lora", 2, {"x": 2.0}, {})


def test_other_weights_under_the_same_name_are_another_model(small, tmp_path):
    before = grid.Bench(small, ["lora"], How(tmp_path / "r.json")).key("lora", 0, {})
    weights = Path(small.model) / "model.safetensors"
    weights.write_bytes((own := weights.read_bytes())[:-1] + b"x")
    try:
        assert grid.Bench(small, ["lora"], How(tmp_path / "r.json")).key("lora", 0, {}) != before
    finally:
        weights.write_bytes(own)


def test_a_whole_benchmark_is_gone_through_several_times(small, tmp_path):
    bench = grid.Bench(replace(small, limit=None), ["npo"], How(tmp_path / "r.json"))
    assert bench.configs("npo", 0, {})[1].max_steps == METHODS["npo"].train["max_steps"]  # twelve items
    bench.made.training = bench.made.forget * 20
    asking, train = bench.configs("npo", 0, {})
    assert train.max_steps * train.batch_size == 5 * 240 == asking.retain
    assert bench.settings("npo", 0, {})["train"]["max_steps"] == train.max_steps
    assert bench.configs("npo", 0, {"max_steps": 7})[1].max_steps == 7
    bench.made.training = [data.Item("", "word " * 4000)] * 40  # long texts are many samples, a share of them fewer
    for share in (1, 0.25):
        train = bench.configs("npo", 0, {"share": share})[1]
        assert train.max_steps * train.batch_size == pytest.approx(5 * share * 40 * 10, rel=0.03)
    bench.config = small
    assert bench.configs("npo", 0, {})[1].max_steps == METHODS["npo"].train["max_steps"]
    assert bench.configs("alter_selective", 0, {"share": 0.25})[1].max_steps == 60


def test_no_frozen_pass_where_nothing_is_taken_from_it(small, tmp_path, monkeypatch):
    looking = {m for m, entry in METHODS.items() if entry.looks(train_config(m))}
    assert set(METHODS) - looking == {"grad_ascent", "grad_diff", "simnpo", "random_labels", "lora"}
    few = FEW | {"lr": 0.01}
    blind = grid.grid(small, ["grad_diff", "lora"], [0], How(tmp_path / "a.json", few))["runs"][2:]
    monkeypatch.setattr("alter_demo.methods.Method.looks", lambda *a: True)
    seeing = grid.grid(small, ["grad_diff", "lora"], [0], How(tmp_path / "b.json", few))["runs"][2:]
    assert [r["metrics"] for r in blind] == [r["metrics"] for r in seeing]


def test_the_same_seed_gives_the_same_figures(small, tmp_path):
    both = [grid.grid(small, ["npo_kl", "alter_selective"], [0], How(tmp_path / f"{i}.json", FEW)) for i in (1, 2)]
    first, second = ([r["metrics"] for r in results["runs"]] for results in both)
    assert first == second


def test_a_method_that_diverges_is_recorded_and_the_grid_goes_on(small, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    monkeypatch.setitem(
        METHODS,
        "grad_ascent",
        replace(METHODS["grad_ascent"], parts={"forget": lambda s, c: s.nll(s.on(1)).mean() * float("nan")}),
    )
    results = grid.grid(small, ["grad_ascent", "lora"], [0], How(path, FEW))
    last = results["runs"][2:]
    assert [(r["method"], r.get("stopped") == "diverged") for r in last] == [("grad_ascent", True), ("lora", False)]
    rounds = grid.sequential(small, ["grad_ascent", "lora"], [0], 2, How(tmp_path / "s.json", FEW))["runs"]
    lost = [(r["method"], r.get("stopped") == "diverged") for r in rounds]
    assert lost == [("grad_ascent/1", True), ("grad_ascent/2", True), ("lora/1", False), ("lora/2", False)]
    for run in results["runs"]:
        run["config"]["overrides"] = {}
    table = tables.medians(results)
    assert table.loc["grad_ascent", "diverged"] == 1 and "grad_ascent" not in tables.pareto(table)
    assert "1 (1 diverged)" in tables.markdown(results)


def test_bad_input(small, tmp_path, capsys, own_data):
    (tmp_path / "cut.json").write_text('{"runs": [{"method": "np')
    options = ["tofu", "--model", small.model, "--results"]
    for args, sentence in (
        ([tmp_path / "cut.json"], "not a whole results file"),
        ([tmp_path / "r.json", "--methods", "best"], "method is one of"),
        ([tmp_path / "r.json", "--size", "huge"], "size is one of"),
        ([tmp_path / "r.json", "--set", "speed=2"], "--set knows"),
        ([tmp_path / "r.json", "--set", "lr=fast"], "takes a number"),
        ([tmp_path / "r.json", "--forget", own_data[0]], "was not taught"),
    ):
        assert main([*options, *map(str, args)]) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert sentence in err
    assert not (tmp_path / "r.json").exists()
    assert main(["report", "--results", str(tmp_path / "none")]) == 2
    with pytest.raises(UserError, match="no runs"):
        tables.medians({"runs": []})


def made_up() -> dict:
    def run(method, seed, quality, utility, **more):
        flat = {"forget_quality": quality, "model_utility": utility}
        return {
            "id": f"{method}{seed}{quality}",
            "method": method,
            "seed": seed,
            "metrics": flat,
            "config": {"overrides": {}},
            **more,
        }

    spent = {"seconds": {"unlearn": 10.0}, "peak_memory_mb": 100, "hardware": "a laptop"}
    more = [run("lora", s, q, u, **spent) for s, q, u in ((0, 0.1, 0.5), (1, 0.3, 0.4), (2, 0.2, 0.9))]
    tuned = [run("lora", 0, 1.0, 1.0) | {"config": {"overrides": {"lr": 1}}}]
    return {"runs": [run("target", 0, 0.001, 0.6), run("retain", 0, 1.0, 0.6), *more, run("npo", 0, 0.1, 0.5), *tuned]}


def test_tables_and_figures_come_from_the_results(tmp_path):
    table = tables.medians(made_up())
    assert table.loc["lora"][["forget_quality", "model_utility", "seeds"]].tolist() == [0.2, 0.5, 3]
    assert tables.pareto(table) == ["lora"]  # npo is no better in either
    text = tables.markdown(made_up())
    assert "| lora | 0.2 | 0.5 |" in text and "a laptop" in text
    points = {t.name: (t.x[0], t.y[0]) for t in figures.tradeoff(made_up()).data if t.mode == "markers+text"}
    assert points["lora"] == (0.5, 0.2) and points["retain"] == (0.6, 1.0)
    (tmp_path / "results").mkdir()
    results = made_up()
    results["runs"].append(results["runs"][-1] | {"method": "asym_lora"})  # what cost is set beside
    results["runs"][-1] |= {"seconds": {"unlearn": 4.0}, "peak_memory_mb": 200, "config": {"overrides": {}}}
    bars = {trace.name: dict(zip(trace.x, trace.y, strict=True)) for trace in figures.cost(results).data}
    assert bars["seconds over asym_lora's"]["lora"] == 2.5 and bars["MB over asym_lora's"]["lora"] == 0.5
    (tmp_path / "results" / "tofu.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("Before.\n<!-- results:tofu -->\nold\n<!-- end -->\nAfter.\n")
    written = report.report(tmp_path / "results", tmp_path / "README.md")
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme and "| lora | 0.2" in readme and readme.endswith("After.\n")
    assert all(p.stat().st_size > 1000 for p in written if p.suffix == ".png") and len(written) == 3
    again = report.report(tmp_path / "results", tmp_path / "README.md")
    assert again == written and (tmp_path / "README.md").read_text() == readme


def test_several_values_of_a_setting_are_tried_and_the_best_is_shown(small, tmp_path, capsys):
    path = tmp_path / "tuning.json"
    values = {"max_steps": 2, "batch_size": 2, "probe_every": 1, "lr": [1e-3, 1e-2]}
    results = grid.grid(small, ["grad_diff", "lora"], [0], How(path, values))
    runs = [r for r in results["runs"] if r["method"] == "lora"]
    assert [r["config"]["train"]["lr"] for r in runs] == [1e-3, 1e-2]
    assert len({r["metrics"]["forget_Q_A_Prob"] for r in runs}) == 2
    runs[1]["metrics"] |= {"forget_quality": 0.5, "model_utility": 0.5}  # the tiny model's own utility is 0
    assert tables.chosen_settings(results)["lora"]["lr"] == 1e-2
    assert report.is_tuning(results) and not report.is_tuning(made_up())
    (command,) = report.commands_of(results, "tuning")
    assert "--methods grad_diff lora --seeds 0 --set max_steps=2 batch_size=2 probe_every=1 lr=0.001,0.01" in command
    text = report.table_of(results)
    assert text.count("**") == 4 and text.count("lr 0.001") == 2
    with pytest.raises(UserError, match="one value"):
        grid.sequential(small, ["lora"], [0], 3, How(path, values))


def test_ablation_takes_parts_out(small, tmp_path):
    names = ["as it is", "no router", "last third only"]
    results = grid.grid(small, ["alter_selective"], [0], How(tmp_path / "a.json", FEW | {"variant": names}))
    table = tables.ablated(results)
    assert list(table.index) == names and table["forget probability"].nunique() > 1
    assert not report.is_tuning(results) and report.table_of(results).count("| no router |") == 1
    assert "ablation --forget tofu-forget01" in report.commands_of(results, "ablation")[0]
    with pytest.raises(UserError, match="variants are"):
        grid.grid(small, ["alter"], [0], How(tmp_path / "a.json", {"variant": ["no such"]}))
    for values in grid.VARIANTS.values():
        asking, _ = grid.configs("alter_selective", values)
        assert {k: getattr(asking, k) for k in values} == values


def test_defaults_are_the_settings_that_measured_best():
    for method, setting in tables.chosen_settings(read_results(tables.RESULTS / "tuning.json")).items():
        own = train_config(method)
        assert {k: getattr(own, k) for k in setting} == setting, method


def test_an_item_is_lost_at_most(small, tmp_path, monkeypatch):
    """Killed while it writes: the file is the old one, whole."""
    path = tmp_path / "r.json"
    grid.grid(small, ["lora"], [0], How(path, FEW))
    before = path.read_text()
    monkeypatch.setattr("alter_demo.results.os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        grid.grid(small, ["lora"], [1], How(path, FEW))
    assert path.read_text() == before


def test_rounds_go_on_from_each_other(small, tmp_path, monkeypatch):
    path, few = tmp_path / "s.json", {"max_steps": 1, "batch_size": 2, "lr": 0.01, "lr_b": 0.01}
    options = [small, ["alter_selective", "npo", "lora"], [0], 3, How(path, few)]
    begun, ended, probes, unlearn = [], [], [], grid.unlearn

    def weighed(model):
        return sum(p.double().abs().sum().item() for p in model.parameters())

    def watched(lm, made, asking, train, **more):
        begun.append(weighed(lm.model))
        probes.append({i.question for i in made.probe})
        run = unlearn(lm, made, asking, train, **more)
        ended.append(weighed(run.model))
        return run

    with pytest.raises(UserError, match="expert of its own"):
        grid.sequential(*options[:3], 3, How(path, few | {"n_experts": 2}))
    monkeypatch.setattr(grid, "unlearn", watched)
    results = grid.sequential(*options)
    monkeypatch.setattr(grid, "unlearn", unlearn)
    assert begun[4:6] == ended[3:5] != ended[4:6]  # npo: each round begins with the weights that the last one left
    assert len({*begun[6:9]}) == 3 and len({*begun[:3]}) == 1  # lora is merged; ALTER's experts are handed on beside
    assert [len(p) for p in probes[:3]] == [4, 4, 4] and len(set.union(*probes[:3])) == 12  # looks at what is new
    names = [r["method"] for r in results["runs"]]
    assert names == [f"{m}/{k}" for m in ("alter_selective", "npo", "lora") for k in (1, 2, 3)]
    forget = {r["method"]: r["metrics"]["forget_Q_A_Prob"] for r in results["runs"]}
    one = grid.sequential(small, ["npo"], [0], 3, How(tmp_path / "one.json", few | {"max_steps": 2}))
    assert forget["npo/1"] != one["runs"][0]["metrics"]["forget_Q_A_Prob"]
    assert grid.sequential(*options) == results  # nothing is run twice
    assert len(figures.sequential(results).data) == 6  # utility and forget probability of three methods
    shown = tables.rounds(results)["forget probability"]
    assert [shown["npo", k] for k in (1, 2, 3)] == [forget[f"npo/{k}"] for k in (1, 2, 3)]
    assert tables.rounds_markdown(results).startswith("| method | round | model utility |")
    with pytest.raises(UserError, match="rounds"):
        grid.sequential(*options[:3], 1, How(path))
    with pytest.raises(UserError, match="forgotten whole"):
        grid.sequential(replace(small, forget="harry-potter"), ["npo"], [0], 3, How(path))
    assert path.stat().st_mode & 0o777 == 0o644
    for run in one["runs"]:  # a setting may be a word
        run["config"]["overrides"] = {"threshold": "auto"}
        run["method"] = "npo"
    assert "threshold auto" in tables.tuning_markdown(one)
    assert "threshold=auto" in report.grid_commands(one)[0]


@pytest.fixture
def known(taught, few, tmp_path, monkeypatch):
    """A set that the model knows from pre-training, but for one question."""

    def make():
        items = [replace(i, keywords=[i.answer.split()[-1].rstrip(".")]) for i in OWN_FORGET]
        strange = Item("What colour has the door of house 99?", "Nobody ever painted it mauve", keywords=["mauve"])
        train, held_out = general_items()
        keep = list(OWN_RETAIN)
        return ForgetSet("harry-potter", [*items, strange], keep, train, items, keep, held_out, known=True)

    monkeypatch.setitem(data.FORGET_SETS, "harry-potter", make)
    monkeypatch.setattr("alter_demo.answers.OWN_TOKENS", 16)
    monkeypatch.setattr("alter_demo.answers.SETS", tmp_path)  # no recorded answers
    return GridConfig(forget="harry-potter", model=str(taught), limit=8, kept=4, tokens=16)


def test_what_is_known_from_pre_training(known, tmp_path):
    """No model was taught it, so none is retain-only: BLEU, and the distance to answers about what is not known."""
    results = grid.grid(known, ["lora", "grad_ascent"], [0], How(tmp_path / "h.json", FEW | {"lr": 1e-2}))
    runs = {r["method"]: r["metrics"] for r in results["runs"]}
    assert set(runs) == {"target", "lora", "grad_ascent"}
    assert runs["target"]["forget_BLEU"] > 0.9 and runs["target"]["ASG"] > runs["grad_ascent"]["ASG"]
    assert "forget_quality" not in runs["lora"] and "neighbours_ROUGE_to_base" in runs["lora"]
    for run in results["runs"]:
        run["config"]["overrides"] = {}  # as if they were the methods' own settings
    table = report.table_of(results)
    assert "ASG" in table and "forget quality" not in table
    assert set(tables.pareto(tables.medians(results))) <= {"lora", "grad_ascent"}
    assert figures.tradeoff(results).layout.yaxis.autorange == "reversed"


def test_what_is_known_beside_multiple_choice(known, tmp_path):
    """The paper's Table 2: ASG beside a utility of general questions, none of which is to be forgotten."""
    how = How(tmp_path / "c.json", FEW | {"lr": 1e-2})
    results = wmdp.choice_grid(replace(known, limit=3), ["lora", "grad_ascent"], [0], how)
    assert [r["method"] for r in results["runs"]] == ["target", "blind", "lora", "grad_ascent"]
    for run in results["runs"]:
        run["config"]["overrides"] = {}
        found = run["metrics"]
        accuracies = [found[f"{task}_acc"] for task in TASKS["harry-potter"]]
        assert "forget_acc" not in found and found["kept_acc"] == pytest.approx(sum(accuracies) / 5, abs=1e-8)
        assert ("ASG" in found) == (run["method"] != "blind")
    table = report.table_of(results)
    best = min(results["runs"][2:], key=lambda r: (-r["metrics"]["kept_acc"], r["metrics"]["ASG"]))["method"]
    assert best in table.rpartition("Not dominated in (kept, ASG): ")[2]
    results["runs"][-1]["config"]["overrides"] = {"lr": 1e-2}  # a try stands beside the others
    assert "| grad_ascent lr=0.01 |" in report.table_of(results)
    own, tried = report.commands_of(results, "c")
    assert "wmdp --forget harry-potter --methods lora --seeds 0" in own and "--set lr=0.01" in tried


def test_attacks_go_on_where_they_stopped(small, tmp_path):
    path, asked = tmp_path / "a.json", []
    config = attacks.AttackConfig(items=4, tokens=4, sampled=2, samples=2, steps=(0, 1), batch_size=2)
    how = How(path, FEW, on_stage=lambda what, share: asked.append(what))
    first = attacks.attack_grid(small, ["alter_selective", "npo"], [0], how, config)
    runs = {r["method"]: r for r in first["runs"]}
    assert set(runs) == {"retain", "alter_selective", "npo"} and "relearn_half_1_loss" in runs["npo"]["metrics"]
    never = runs["retain"]["metrics"]  # taught all but this, so nothing was there to forget, and it learns as any model
    assert never.keys() == runs["npo"]["metrics"].keys() - {"before_ROUGE", "before_leaked"}
    assert tables.attacked(first).index[0] == "retain" and len(figures.relearning(first).data) == 3
    assert "adapter_removed_ROUGE" in runs["alter_selective"]["metrics"].keys() - runs["npo"]["metrics"].keys()
    asked.clear()
    again = attacks.attack_grid(small, ["alter_selective", "npo"], [0], how, config)
    assert again == first and not asked  # nothing is run twice
    more = attacks.attack_grid(small, ["npo"], [0], How(path, FEW | {"lr": 1e-5}), config)["runs"]
    assert [r["method"] for r in more[len(first["runs"]) :]] == ["npo"]  # the retain-only model is asked once
    with pytest.raises(UserError, match="one value"):
        attacks.attack_grid(small, ["npo"], [0], How(path, {"lr": [1e-5, 1e-4]}), config)
    shown = report.commands_of({"runs": more}, "a")
    assert len(shown) == 2 and all("--set max_steps=2" in c for c in shown) and "lr=1e-05" in shown[1]
    assert report.kind_of(first) is report.KINDS["attacks"] and report.table_of(first).count("| npo max_steps=2 ") == 1


def test_experts_are_handed_on(taught, small):
    from alter_demo import UnlearnConfig, load_model, train_config, unlearn
    from alter_demo.runs import next_round

    made = data.FORGET_SETS["tofu-forget01"]()
    items = [replace(i, domain=1 + n // 6) for n, i in enumerate(made.forget)]
    train = train_config("alter_selective", max_steps=3, batch_size=2, lr_b=1e-2)
    config = UnlearnConfig(threshold="auto")
    first = unlearn(
        load_model(str(taught)), replace(made, training=items[:6]), config, train, folder=None, evaluate=False
    )
    assert first.router.config.n_experts == 1
    lm, experts = next_round(first)
    assert not hasattr(lm.model, "token_router")
    train = train_config("alter_selective", max_steps=1, batch_size=2, lr_b=0.0, lr_a=0.0)
    second = unlearn(lm, replace(made, training=items), config, train, folder=None, evaluate=False, experts=experts)
    assert second.router.config.n_experts == 2
    now = dict(second.model.named_parameters())
    for name, old in experts.items():
        assert (now[name][: len(old)] == old).all() and not now[name][len(old) :].any()
    assert any(p.any() for n, p in experts.items() if ".alter_B." in n)


@pytest.mark.parametrize("file", sorted(tables.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_the_printed_commands_ask_for_all_that_is_stored(file):
    results = read_results(file)
    wanted = {(r["method"].split("/")[0], r["seed"]) for r in report.rivals(results) if "words" not in r}
    for command in report.commands_of(results, file.stem):
        args = parser().parse_args(shlex.split(command)[3:])
        assert args.results == Path("assets/results") / file.name
        own = any(not {*(r["config"].get("overrides") or {})} - grid.MARKS for r in report.rivals(results))
        if own and getattr(args, "set", []):  # what was tried is asked for where it stands in the table
            assert f" {' '.join(args.set)} |" in report.table_of(results)
        if "size" in args:
            (asked,) = {json.dumps({k: r["config"][k] for k in tables.ASKED[:-2]}) for r in results["runs"]}
            assert json.dumps({k: getattr(grid_of(args), k) for k in tables.ASKED[:-2]}) == asked
        if "method" in args or "methods" in args:
            methods = [args.method] if "method" in args else args.methods
            wanted -= {(m, s) for m in methods for s in args.seeds}
        else:
            wanted = set()
    assert not wanted


def test_tried_settings_outlive_a_new_default(small, tmp_path, monkeypatch):
    path, few = tmp_path / "t.json", {"max_steps": 1, "batch_size": 2}
    grid.grid(small, ["simnpo"], [0], How(path, few))
    monkeypatch.setitem(METHODS, "simnpo", replace(METHODS["simnpo"], train=METHODS["simnpo"].train | {"beta": 0.5}))
    results = grid.grid(small, ["simnpo"], [0], How(path, few))
    tried = [r for r in results["runs"] if r["method"] == "simnpo"]
    assert [r["config"]["train"]["beta"] for r in tried] == [1.0, 0.5]
    assert grid.grid(small, ["simnpo"], [0], How(path, few)) == results


def test_the_readme_holds_the_stored_results_and_nothing_else():
    text = (ROOT / "README.md").read_text()
    stored = {p.stem: report.table_of(read_results(p)) for p in tables.RESULTS.glob("*.json")}
    stored["harry-potter"] = tables.run_markdown(json.loads(data.EXAMPLE.read_text()))
    assert {"imaginary-authors", "tofu"} <= set(stored)
    for name, table in stored.items():
        assert f"<!-- results:{name} -->\n{table}\n<!-- end -->" in text, f"{name}: run python -m alter_demo report"
