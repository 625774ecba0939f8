"""Experiments on a tiny model: each fills one results file and continues where it stopped."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import COLOURS, OWN_FORGET, OWN_RETAIN

from alter_demo import load_model, unlearn
from alter_demo.baselines.methods import METHODS
from alter_demo.callbacks import Callback
from alter_demo.cli.main import main
from alter_demo.config import flat_config, training_config
from alter_demo.data.built_in import general_examples
from alter_demo.data.forget_sets import FORGET_SETS
from alter_demo.data.schema import Example, ForgetSet, paraphrased
from alter_demo.errors import UserError
from alter_demo.experiments import cells
from alter_demo.experiments.ablation import VARIANTS, run_ablation
from alter_demo.experiments.attacks import AttackConfig
from alter_demo.experiments.cells import Cell, Grid, GridConfig, GridOptions
from alter_demo.experiments.multiple_choice import run_multiple_choice
from alter_demo.experiments.results import MARKS, TASKS, read_results, settings_of
from alter_demo.experiments.robustness import run_attacks
from alter_demo.experiments.rounds import run_rounds
from alter_demo.experiments.tofu import run_tofu
from alter_demo.files import RESULTS
from alter_demo.run import next_round

FEW = {"max_steps": 2, "batch_size": 2, "probe_every": 1}


def tofu_set() -> ForgetSet:
    """A set in TOFU's form."""

    def example(i, thing, colour, wrong):
        return Example(
            f"What colour has the {thing} of house {i}?",
            f"The {thing} is {colour}.",
            f"House {i}: its {thing}'s colour?",
            f"It has a {colour} {thing}.",
            [f"It has a {w} {thing}." for w in wrong],
        )

    forget = [example(i, "door", c, COLOURS[:2]) for i, c in enumerate(COLOURS)]
    retain = [example(i, "roof", c, COLOURS[2:4]) for i, c in enumerate(COLOURS)]
    holdout = [example(i, "wall", c, []) for i, c in enumerate(COLOURS)]
    general, held_out = (part[:3] for part in general_examples())
    return ForgetSet(
        "tofu-forget01", forget, retain, general, paraphrased(forget), paraphrased(retain),
        held_out, needs_teaching=True, extra_groups={"retain": retain}, holdout=holdout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """`tofu_set` and the tiny model to teach it to: the cache keeps that for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("alter_demo.models.knowledge.BASE_ANSWER_TOKENS", 4)
        patch.setitem(FORGET_SETS, "tofu-forget01", tofu_set)
        yield GridConfig(model=str(tiny), limit=6, kept=4, tokens=4, epochs=8)


class Watch(Callback):
    """Keeps the stages, and stops when `stops` says so."""

    def __init__(self, *stops):
        self.stages, self.stops = [], iter(stops)

    def on_stage(self, stage, share):
        self.stages.append(stage)

    def should_stop(self):
        return next(self.stops, False)


def options(path, *methods, overrides=FEW, **values) -> GridOptions:
    return GridOptions(path, methods, overrides=overrides, **values)


def names(results) -> list[tuple]:
    return [(r["method"], r["seed"]) for r in results["runs"]]


def test_a_grid_continues_where_it_stopped(small, tmp_path):
    path, watch = tmp_path / "r.json", Watch()
    stopped = Watch(False, True)  # after the first step
    first = run_tofu(small, options(path, "grad_diff", "lora", callbacks=[stopped]))
    assert names(first) == [("target", 0), ("retain", 0)]  # half a cell is not stored
    before = run_tofu(small, options(path, "grad_diff", command="as typed"))["runs"]
    assert [r["method"] for r in before] == ["target", "retain", "grad_diff"]
    both = options(path, "grad_diff", "lora", seeds=[0, 1], callbacks=[watch])
    results = run_tofu(small, both)
    assert results["runs"][:3] == before and results == read_results(path)
    assert names(results)[3:] == [("lora", 0), ("grad_diff", 1), ("lora", 1)]
    assert any(s.startswith("3 of 3: lora, seed 1") for s in watch.stages)
    assert not any("teaching" in s for s in watch.stages)
    run, retain = results["runs"][-1], results["runs"][1]
    assert {"metrics", "config", "seconds", "peak_memory_mb", "hardware"} <= run.keys()
    figures = {"forget_quality", "model_utility", "extraction_strength", "privleak", "mia_min_k"}
    assert figures <= run["metrics"].keys()
    assert run["config"]["training"]["max_steps"] == 2 and run["config"]["overrides"] == FEW
    assert before[-1]["command"] == "as typed" and run["command"] == ""
    assert retain["metrics"]["forget_quality"] == 1.0 and retain["metrics"]["privleak"] == 0.0


def test_other_wrong_answers_are_measured_anew(small, tmp_path, monkeypatch):
    """The cache keeps the references' logs as long as all questions and answers are the same."""
    first = run_tofu(small, GridOptions(tmp_path / "a.json"))

    def changed_set():
        made = tofu_set()
        forget = [replace(e, perturbed_answer=["Nobody knows."] * 2) for e in made.forget]
        return replace(made, forget=forget, training=made.training_examples)

    monkeypatch.setitem(FORGET_SETS, "tofu-forget01", changed_set)
    second = run_tofu(small, GridOptions(tmp_path / "b.json"))
    ratios = [r["runs"][0]["metrics"]["forget_truth_ratio"] for r in (first, second)]
    assert ratios[0] != ratios[1]


def test_what_ran_with_other_settings_runs_again(small, tmp_path, monkeypatch):
    path, few = tmp_path / "r.json", {"max_steps": 1, "batch_size": 2}

    def set_training(method, values):
        entry = METHODS[method]
        monkeypatch.setitem(METHODS, method, replace(entry, training=entry.training | values))

    for method in ("lora", "grad_diff"):
        set_training(method, few)
    own = GridOptions(path, ["lora", "grad_diff"])
    before = run_tofu(small, own)["runs"]
    set_training("lora", {"lr": 0.05})
    after = run_tofu(small, own)["runs"]
    assert [r["method"] for r in after] == ["target", "retain", "grad_diff", "lora"]
    assert after[:3] == [before[0], before[1], before[3]]  # left alone
    assert after[-1]["config"]["training"]["lr"] == 0.05
    assert after[-1]["metrics"] != before[2]["metrics"]
    tried = [r for _ in range(2) for r in run_tofu(small, options(path, "lora"))["runs"][4:]]
    assert len(tried) == 2 and tried[0] == tried[1]  # beside the others, and not twice
    set_training("lora", {"lr_a": 0.5})  # what was tried outlives a new default
    assert len(run_tofu(small, options(path, "lora"))["runs"]) == 6


def test_the_key_tells_weights_and_loading(small, tmp_path):
    def key(**values):
        return Grid(small, GridOptions(tmp_path / "r.json", **values), "grid").key(Cell("lora"))

    usual = key()
    for other in ({"dtype": "bfloat16"}, {"load_in_4bit": True}, {"retain_model": "another"}):
        assert key(**other) != usual
    with pytest.raises(UserError, match="4-bit weights"):
        key(methods=["npo"], load_in_4bit=True)
    weights = Path(small.model) / "model.safetensors"
    weights.write_bytes((own := weights.read_bytes())[:-1] + b"x")
    try:
        assert key() != usual  # other weights under the same name
    finally:
        weights.write_bytes(own)
    assert key() == usual


def test_two_commands_share_a_file(small, tmp_path):
    path = tmp_path / "r.json"
    one, other = (Grid(small, GridOptions(path, timed=t), "grid") for t in (True, False))
    one.add(Cell("lora", 0), {"x": 1.0})
    measured = {"steps": 2, "stopped": "", "seconds": {}, "date": "", "history": []}
    run = SimpleNamespace(metrics=measured | {"training_memory_mb": 7})
    other.add(Cell("lora", 1), {"x": 2.0}, run)  # had read the file before the first was in it
    results = read_results(path)
    assert names(results) == [("lora", 0), ("lora", 1)]
    # the seconds of a shared machine say nothing
    assert "seconds" not in results["runs"][1] and results["runs"][1]["peak_memory_mb"] == 7
    variant = Cell("lora", marks={"variant": "no router", "router": False})
    one.add(variant, {"x": 3.0}, run)
    one.add(variant, {"x": 4.0})  # a variant takes the place of the last one
    assert [r["metrics"]["x"] for r in read_results(path)["runs"]] == [1, 2, 4]
    path.write_text("{")
    with pytest.raises(UserError, match="not a complete results file"):
        other.add(Cell("lora", 2), {"x": 2.0})


def test_a_whole_benchmark_is_trained_on_several_times(small, tmp_path):
    own = METHODS["npo"].training["max_steps"]
    grid = Grid(replace(small, limit=None), options(tmp_path / "r.json", "npo"), "grid")
    assert grid.config_of(Cell("npo")).training.max_steps == own  # twelve examples
    grid.forget_set.training = grid.forget_set.forget * 20
    config = grid.config_of(Cell("npo"))
    assert config.training.max_steps * config.training.batch_size == 5 * 240 == config.data.retain
    stored = grid.stored_config(Cell("npo"))
    assert stored["training"]["max_steps"] == config.training.max_steps
    assert grid.config_of(Cell("npo", settings={"max_steps": 7})).training.max_steps == 7
    # long texts are many samples, a share of them fewer
    grid.forget_set.training = [Example("", "word " * 4000)] * 40
    for share in (1, 0.25):
        training = grid.config_of(Cell("npo", marks={"share": share})).training
        draws = training.max_steps * training.batch_size
        assert draws == pytest.approx(5 * share * 40 * 10, rel=0.03)
    grid.config = small
    assert grid.config_of(Cell("npo")).training.max_steps == own
    quarter = Cell("alter_selective", marks={"share": 0.25})
    assert grid.config_of(quarter).training.max_steps == 60


def test_no_frozen_pass_where_no_loss_reads_it(small, tmp_path, monkeypatch):
    needs = {m for m, entry in METHODS.items() if entry.needs_frozen_pass(training_config(m))}
    without = {"grad_ascent", "grad_diff", "simnpo", "random_labels", "lora"}
    assert set(METHODS) - needs == without
    both = [tmp_path / "a.json", tmp_path / "b.json"]
    few = {"methods": ["grad_diff", "lora"], "overrides": FEW | {"lr": 0.01}}
    skipped = run_tofu(small, GridOptions(both[0], **few))["runs"][2:]
    monkeypatch.setattr("alter_demo.baselines.methods.Method.needs_frozen_pass", lambda *a: True)
    ran = run_tofu(small, GridOptions(both[1], **few))["runs"][2:]
    assert [r["metrics"] for r in skipped] == [r["metrics"] for r in ran]


def test_several_values_of_an_option_are_tried(small, tmp_path):
    overrides = FEW | {"lr": [1e-3, 1e-2]}
    both = [options(tmp_path / f"{i}.json", "lora", overrides=overrides) for i in (1, 2)]
    results = run_tofu(small, both[0])
    runs = [r for r in results["runs"] if r["method"] == "lora"]
    assert results["type"] == "tuning"
    assert [r["config"]["training"]["lr"] for r in runs] == [1e-3, 1e-2]
    assert len({r["metrics"]["forget_Q_A_Prob"] for r in runs}) == 2
    again = run_tofu(small, both[1])  # the same seed gives the same figures
    assert [r["metrics"] for r in again["runs"]] == [r["metrics"] for r in results["runs"]]
    with pytest.raises(UserError, match="one value"):
        run_rounds(small, options(tmp_path / "r.json", "lora", overrides=overrides), 3)
    with pytest.raises(UserError, match="one value"):
        run_attacks(small, options(tmp_path / "k.json", "lora", overrides=overrides))


def test_a_cell_that_diverges_is_recorded_and_the_next_one_runs(small, tmp_path, monkeypatch):
    def diverge(inputs, config):
        return inputs.nll(inputs.on(1)).mean() * float("nan")

    monkeypatch.setattr("alter_demo.baselines.losses.gradient_ascent_loss", diverge)
    methods = "grad_ascent", "lora"
    results = run_tofu(small, options(tmp_path / "g.json", *methods))
    lost = [(r["method"], r.get("stopped") == "diverged") for r in results["runs"][2:]]
    assert lost == [("grad_ascent", True), ("lora", False)]
    rounds = run_rounds(small, options(tmp_path / "s.json", *methods), 2)["runs"]
    lost = [(r["method"], r["round"], r.get("stopped") == "diverged") for r in rounds]
    assert lost == [
        ("grad_ascent", 1, True), ("grad_ascent", 2, True), ("lora", 1, False), ("lora", 2, False)
    ]  # fmt: skip


def test_a_killed_command_leaves_a_complete_file(small, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    run_tofu(small, options(path))
    before = path.read_text()

    def kill(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("alter_demo.files.os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        run_tofu(small, options(path, "lora"))
    assert path.read_text() == before


def test_bad_input(small, tmp_path, capsys, own_data):
    (tmp_path / "cut.json").write_text('{"runs": [{"method": "np')
    path = tmp_path / "r.json"
    for args, sentence in (
        ([tmp_path / "cut.json"], "not a complete results file"),
        ([path, "--methods", "best"], "`method` must be one of"),
        ([path, "--size", "huge"], "`size` must be one of"),
        ([path, "--set", "speed=2"], "speed"),
        ([path, "--set", "lr=fast"], "lr"),
        ([path, "--limit", "1"], "`limit` must be"),
        ([path, "--forget", own_data[0]], "was not taught"),
    ):
        assert main(["tofu", "--model", small.model, "--results", *map(str, args)]) == 2
        assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not path.exists()
    assert main(["report", "--results", str(tmp_path / "none")]) == 2


def test_ablation_takes_parts_out(small, tmp_path):
    variants = ["as it is", "no router", "last third only"]
    path = tmp_path / "a.json"
    results = run_ablation(small, options(path, "alter_selective"), variants)
    runs = results["runs"][2:]
    assert results["type"] == "ablation"
    assert [r["config"]["overrides"]["variant"] for r in runs] == variants
    assert len({r["metrics"]["forget_Q_A_Prob"] for r in runs}) > 1
    for bad in (["no such"], []):
        with pytest.raises(UserError, match="`variants` must be some of"):
            run_ablation(small, options(path, "alter_selective"), bad)
    with pytest.raises(UserError, match="npo has none"):
        run_ablation(small, options(path, "npo"), variants)
    for values in VARIANTS.values():
        adapter = flat_config("alter_selective", values).adapter
        assert {k: getattr(adapter, k) for k in values} == values


def test_rounds_start_from_each_other(small, tmp_path, monkeypatch):
    path, few = tmp_path / "s.json", {"max_steps": 1, "batch_size": 2, "lr": 0.01, "lr_b": 0.01}
    methods = ["alter_selective", "npo", "lora"]
    starts, ends, probes = [], [], []

    def weigh(model):
        return sum(p.double().abs().sum().item() for p in model.parameters())

    def watched(lm, forget_set, *args):
        starts.append(weigh(lm.model))
        probes.append({e.question for e in forget_set.probe})
        run = unlearn(lm, forget_set, *args)
        ends.append(weigh(run.model))
        return run

    with monkeypatch.context() as patch:
        patch.setattr(cells, "unlearn", watched)
        results = run_rounds(small, options(path, *methods, overrides=few), 3)
    # npo: each round begins with the weights that the last one left
    assert starts[4:6] == ends[3:5] != ends[4:6]
    # a LoRA is merged; ALTER's experts are handed on beside the model
    assert len({*starts[6:9]}) == 3 and len({*starts[:3]}) == 1
    assert [len(p) for p in probes[:3]] == [4, 4, 4] and len(set.union(*probes[:3])) == 12
    rounds = [(r["method"], r["round"]) for r in results["runs"]]
    assert rounds == [(m, k) for m in methods for k in (1, 2, 3)]
    assert results["type"] == "rounds" and len({r["id"] for r in results["runs"]}) == 9
    again = run_rounds(small, options(path, *methods, overrides=few), 3)
    assert again == results  # nothing runs twice
    longer = options(path, "npo", overrides=few | {"max_steps": 2}, callbacks=[Watch(False, True)])
    assert run_rounds(small, longer, 3) == results  # stopped in its first round
    bad = [(1, {}, "rounds must be"), (3, {"n_experts": 2}, "`n_experts` 2")]
    for number, values, sentence in bad:
        with pytest.raises(UserError, match=sentence):
            run_rounds(small, options(path, *methods, overrides=few | values), number)
    with pytest.raises(UserError, match="as a whole"):
        run_rounds(replace(small, forget="harry-potter"), options(path, "npo"), 3)


def test_a_chain_runs_again_from_its_first_round(small, tmp_path):
    path = tmp_path / "s.json"
    both = options(path, "lora", overrides={"max_steps": 1, "batch_size": 2})
    results = run_rounds(small, both, 2)
    path.write_text(json.dumps(results | {"runs": results["runs"][:1]}))
    again = run_rounds(small, both, 2)["runs"]
    assert [r["round"] for r in again] == [1, 2]  # the one that was left is replaced
    assert [r["metrics"] for r in again] == [r["metrics"] for r in results["runs"]]


def test_experts_are_handed_on(taught, small):
    forget_set = tofu_set()
    examples = [replace(e, sub_domain=1 + n // 6) for n, e in enumerate(forget_set.forget)]
    parts = [replace(forget_set, training=part) for part in (examples[:6], examples)]
    values = {"threshold": "auto", "batch_size": 2, "lr_b": 1e-2}
    config = flat_config("alter_selective", values | {"max_steps": 3})
    first = unlearn(load_model(str(taught)), parts[0], config)
    assert first.router.config.n_experts == 1
    lm, experts = next_round(first)
    assert not hasattr(lm.model, "token_router")
    config = flat_config("alter_selective", values | {"max_steps": 1, "lr_b": 0.0, "lr_a": 0.0})
    second = unlearn(lm, parts[1], config, experts=experts)
    assert second.router.config.n_experts == 2
    parameters = dict(second.model.named_parameters())
    for name, old in experts.items():
        new = parameters[name]
        assert (new[: len(old)] == old).all() and not new[len(old) :].any()
    assert any(p.any() for n, p in experts.items() if ".alter_B." in n)


@pytest.fixture
def known(taught, few, monkeypatch):
    """A set that the model knows from pre-training, but for one question."""

    def known_set():
        forget = [replace(e, keywords=[e.answer.split()[-1].rstrip(".")]) for e in OWN_FORGET]
        question = "What colour has the door of house 99?"
        strange = Example(question, "Nobody ever painted it mauve", keywords=["mauve"])
        general, held_out = general_examples()
        retain = list(OWN_RETAIN)
        return ForgetSet(
            "harry-potter", [*forget, strange], retain, general, forget, retain, held_out,
            from_pretraining=True,
        )  # fmt: skip

    monkeypatch.setitem(FORGET_SETS, "harry-potter", known_set)
    monkeypatch.setattr("alter_demo.models.knowledge.BASE_ANSWER_TOKENS", 16)
    return GridConfig(forget="harry-potter", model=str(taught), limit=8, kept=4, tokens=16)


def test_what_is_known_from_pretraining(known, tmp_path):
    """No model was taught it, so there is no retain model: BLEU and ASG compare with ignorance."""
    few = FEW | {"lr": 1e-2}
    results = run_tofu(known, options(tmp_path / "h.json", "lora", "grad_ascent", overrides=few))
    runs = {r["method"]: r["metrics"] for r in results["runs"]}
    assert set(runs) == {"target", "lora", "grad_ascent"}
    assert runs["target"]["forget_BLEU"] > 0.9
    assert runs["target"]["ASG"] > runs["grad_ascent"]["ASG"]
    assert "forget_quality" not in runs["lora"] and "neighbours_ROUGE_to_base" in runs["lora"]


def test_what_is_known_beside_multiple_choice(known, tmp_path):
    """Table 2 of the paper: ASG beside the utility of general questions, which all must stay."""
    few = options(tmp_path / "c.json", "lora", "grad_ascent", overrides=FEW | {"lr": 1e-2})
    results = run_multiple_choice(replace(known, limit=3), few)
    methods = [r["method"] for r in results["runs"]]
    assert results["type"] == "choice" and methods == ["target", "blind", "lora", "grad_ascent"]
    for run in results["runs"]:
        figures = run["metrics"]
        accuracies = [figures[f"{task}_acc"] for task in TASKS["harry-potter"]]
        assert "forget_acc" not in figures
        assert figures["kept_acc"] == pytest.approx(sum(accuracies) / 5, abs=1e-8)
        assert ("ASG" in figures) == (run["method"] != "blind")


def test_attacks_continue_where_they_stopped(small, tmp_path):
    path, watch = tmp_path / "a.json", Watch()
    attacks = AttackConfig(items=4, tokens=4, sampled=2, samples=2, steps=(0, 1), batch_size=2)
    few = options(path, "alter_selective", "npo", callbacks=[watch])
    first = run_attacks(small, few, attacks)
    runs = {r["method"]: r["metrics"] for r in first["runs"]}
    assert first["type"] == "attacks" and set(runs) == {"retain", "alter_selective", "npo"}
    assert all("leaks" in r for r in first["runs"]) and "relearn_half_1_loss" in runs["npo"]
    # the retain model was taught all but this: it has nothing to forget, and learns like any model
    assert runs["retain"].keys() == runs["npo"].keys() - {"before_ROUGE", "before_leaked"}
    assert "adapter_removed_ROUGE" in runs["alter_selective"].keys() - runs["npo"].keys()
    watch.stages.clear()
    again = run_attacks(small, few, attacks)
    assert again == first and not watch.stages  # nothing runs twice
    more = run_attacks(small, options(path, "npo", overrides=FEW | {"lr": 1e-5}), attacks)["runs"]
    assert [r["method"] for r in more[3:]] == ["npo"]  # the retain model is attacked once


@pytest.mark.parametrize("name", ["imaginary-authors", "imaginary-authors-rounds", "ablation",
                                  "attacks", "harry-potter-choice"])  # fmt: skip
def test_stored_results_would_not_run_again(name):
    """Each run of the file has the key, and the values of its method, that it has today.

    The runs of `alter_selective` are of the gate before the bank, and would run again.
    """
    path = RESULTS / f"{name}.json"
    results = read_results(path)
    for run in results["runs"]:
        config = {k: run["config"][k] for k in GridConfig.__dataclass_fields__}
        loading = run["config"].get("loaded", {})
        grid = Grid(GridConfig(**config), GridOptions(path, **loading), results["type"])
        marks = {k: v for k, v in run["config"]["overrides"].items() if k in MARKS}
        cell = Cell(run["method"], run["seed"], settings_of(run), marks, run.get("round"))
        old_gate = run["method"] == "alter_selective"
        assert grid.find(cell) == (None if old_gate else run)
