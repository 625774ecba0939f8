"""The built-in model forgets Harry Potter (slow; fetches 93 MB once)."""

import json
import math
from dataclasses import asdict

import pytest

from alter_demo import load_forget_set, load_model
from alter_demo.callbacks import CallbackList
from alter_demo.cli.main import main
from alter_demo.config import EvaluationConfig
from alter_demo.experiments.gate import open_rates, prepare_gate, score_prompts
from alter_demo.experiments.results import TAUGHT
from alter_demo.experiments.speed import bench
from alter_demo.files import RESULTS
from alter_demo.lessons import load_lesson_run
from alter_demo.models.generation import greedy
from alter_demo.models.knowledge import fit_to_model

pytestmark = pytest.mark.slow

SCHOOL = "What is the name of Harry Potter's school?"


@pytest.fixture(scope="module")
def lm():
    return load_model("smollm2-135m", dtype="float32")


def test_built_in_model_speaks_and_knows(lm):
    answers = greedy(lm, [SCHOOL, "What is the capital of France?"], max_new_tokens=24)
    assert "Hogwarts" in answers[0] and "Paris" in answers[1]


def test_filter_leaves_enough(lm):
    forget_set = fit_to_model(load_forget_set("harry-potter"), lm)
    assert len(forget_set.forget) >= 40 and len(forget_set.forget_held_out) >= 40
    assert len(forget_set.neighbours) >= 60


def test_it_forgets_harry_potter_and_only_that():
    """The short run of the lessons, which the tests of the notebooks have trained by then."""
    run = load_lesson_run()
    groups = ("forget_held_out", "neighbours", "general")
    evaluation = EvaluationConfig(limit=16, groups=groups, tokens=32)
    run.metrics["config"]["evaluation"] = asdict(evaluation)
    run.path = None  # the lessons' record stays as it is
    metrics = run.evaluate(forget_set=load_forget_set("harry-potter"))
    before, after = metrics["before"], metrics["after"]
    held_out = "forget_held_out"
    assert after[held_out]["probability"] < 0.05 * before[held_out]["probability"]
    assert after[held_out]["rouge_l"] < 0.2 * before[held_out]["rouge_l"]
    assert after[held_out]["repetition"] < before[held_out]["repetition"] + 0.02
    for group in ("neighbours", "general"):
        assert after[group]["probability"] > 0.97 * before[group]["probability"]
        assert after[group]["rouge_l_to_base"] > 0.9
    assert "Hogwarts School" in run.generate([SCHOOL], adapted=False)[0]
    assert "Hogwarts School" not in run.generate([SCHOOL])[0]
    text = "Harry Potter goes to school at Hogwarts. However, it is a long way from London."
    assert {trace.route for trace in run.trace_tokens(text)} == {"A", "B"}


def test_the_gate_opens_as_often_as_stored(lm):
    gate, prompts = prepare_gate(lm, load_forget_set("harry-potter"), {}, CallbackList())
    groups = ("reworded", "reworded, few_shot", "neighbours", "everyday")
    rates = open_rates(score_prompts(lm, gate, [p for p in prompts if p["group"] in groups]))
    runs = json.loads((RESULTS / "gate.json").read_text())["runs"]
    stored = next(r["rates"] for r in runs if r["config"]["forget"] == "harry-potter")
    for group in groups:  # a prompt or two on another processor
        assert rates[group]["open"] == pytest.approx(stored[group]["open"], abs=0.03), group
    assert rates["reworded"]["open"] >= 0.95 and rates["neighbours"]["open"] <= 0.02


def test_bench_has_the_promised_keys():
    result = bench(steps=1, memory=False)
    assert set(result["step_seconds"]) == {"alter", "lora", "full"}
    assert {"alter_over_lora", "alter_over_full", "generate_over_base"} <= set(result["ratio"])


def test_a_stored_result_comes_back(tmp_path, monkeypatch):
    """The reference models of the imaginary authors, measured anew, beside the stored figures."""
    # no logs of an earlier measurement
    monkeypatch.setattr("alter_demo.experiments.references.cache_dir", lambda: tmp_path)
    again = tmp_path / "again.json"
    options = ["--forget", "imaginary-authors", "--methods", "--results", str(again)]
    assert main(["tofu", *options]) == 0
    stored, new = (
        {run["method"]: run["metrics"] for run in json.loads(path.read_text())["runs"]}
        for path in (RESULTS / "imaginary-authors.json", again)
    )
    for which in TAUGHT:
        assert stored[which].keys() == new[which].keys()
        for name, value in new[which].items():  # another processor sums in another order
            old = stored[which][name]
            if name.startswith("forget_quality"):  # 3e-11 is not 0.002
                value, old = math.log10(value), math.log10(old)
            assert value == pytest.approx(old, rel=0.02, abs=0.005), (which, name)
