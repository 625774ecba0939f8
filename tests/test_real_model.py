"""The built-in model forgets Harry Potter: the one slow test (fetches 93 MB once)."""

import json
import math

import pytest

from alter_demo import UnlearnConfig, grid, load_model, unlearn
from alter_demo.answers import adapt, greedy
from alter_demo.bench import bench
from alter_demo.cli import main
from alter_demo.data import load_forget_set
from alter_demo.results import TAUGHT
from alter_demo.tables import RESULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lm():
    return load_model("smollm2-135m", dtype="float32")


def test_built_in_model_speaks_and_knows(lm):
    hogwarts, paris = greedy(
        lm, ["What is the name of Harry Potter's school?", "What is the capital of France?"], max_new_tokens=24
    )
    assert "Hogwarts" in hogwarts and "Paris" in paris


def test_filter_leaves_enough(lm):
    made = adapt(load_forget_set("harry-potter"), lm)
    assert len(made.forget) >= 40 and len(made.forget_held_out) >= 40 and len(made.neighbours) >= 60


def test_it_forgets_harry_potter_and_only_that():
    groups = ("forget_held_out", "neighbours", "general")
    run = unlearn("smollm2-135m", "harry-potter", UnlearnConfig(limit=16, groups=groups, tokens=32), folder=None)
    before, after = run.metrics["before"], run.metrics["after"]
    held_out = "forget_held_out"
    assert after[held_out]["probability"] < 0.05 * before[held_out]["probability"]
    assert after[held_out]["rouge_l"] < 0.2 * before[held_out]["rouge_l"]
    assert after[held_out]["repetition"] < before[held_out]["repetition"] + 0.02
    for group in ("neighbours", "general"):
        assert after[group]["probability"] > 0.97 * before[group]["probability"]
        assert after[group]["rouge_l_to_base"] > 0.9
    question = "What is the name of Harry Potter's school?"
    assert "Hogwarts School" in run.answer([question], adapted=False)[0]
    assert "Hogwarts School" not in run.answer([question])[0]
    records = run.tokens("Harry Potter goes to school at Hogwarts. However, it is a long way from London.")
    assert {r.route for r in records} == {"A", "B"}


def test_bench_has_the_promised_keys():
    result = bench(steps=1, memory=False)
    assert set(result["step_seconds"]) == {"alter", "lora", "full"}
    assert {"alter_over_lora", "alter_over_full", "generate_over_base"} <= set(result["ratio"])


def test_a_stored_result_comes_back(tmp_path, monkeypatch):
    """The two reference models of the imaginary authors, measured anew, beside what assets/results says of them."""
    monkeypatch.setattr(grid, "cache_dir", lambda: tmp_path)  # no logs of an earlier measurement
    kept = RESULTS / "imaginary-authors.json"
    again = tmp_path / "again.json"
    assert main(["tofu", "--forget", "imaginary-authors", "--methods", "--results", str(again)]) == 0
    old, new = ({r["method"]: r["metrics"] for r in json.loads(p.read_text())["runs"]} for p in (kept, again))
    for which in TAUGHT:
        assert old[which].keys() == new[which].keys()
        for name, value in new[which].items():  # another processor sums in another order
            stored = old[which][name]
            if name.startswith("forget_quality"):  # 3e-11 is not 0.002
                value, stored = math.log10(value), math.log10(stored)
            assert value == pytest.approx(stored, rel=0.02, abs=0.005), (which, name)
