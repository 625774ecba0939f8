"""What is stored of a run and of LoRAs side by side, as a table and a figure."""

import json

import numpy as np
import pytest
from conftest import OWN_FORGET

from alter_demo import load_model, unlearn
from alter_demo.config import AdapterConfig, UnlearnConfig, training_config
from alter_demo.data.forget_sets import load_forget_set
from alter_demo.errors import UserError
from alter_demo.experiments import heterogeneity, report
from alter_demo.experiments.example import store_words


def drawn(results, folder):
    """Draw every figure of the results into a file; the lines of their table."""
    for name, draw in report.figures_of(results).items():
        figure, path = draw(results), folder / f"{name}.png"
        figure.save(path) if hasattr(figure, "save") else path.write_text(figure.to_json())
        assert path.stat().st_size > 1000
    return report.table_of(results).splitlines()


def test_loras_of_several_domains(tiny, tmp_path):
    lm, path = load_model(str(tiny), dtype="float32"), tmp_path / "heterogeneity.json"
    results = heterogeneity.store(lm, path, n=2, steps=2, layers=1, command="as typed")
    run = results["runs"][0]
    assert results["type"] == "heterogeneity" and report.commands_of(results) == ["as typed"]
    assert all(abs(v) <= 1 for v in run["metrics"].values())
    assert run["metrics"]["B_mixed_cosine"] > 0
    sets = {"a": OWN_FORGET, "b": OWN_FORGET}
    weights = heterogeneity.fine_tuned(load_model(str(tiny), dtype="float32"), sets, 2, 1)
    twins = heterogeneity.similarity(weights)  # of the same data, without the start they share
    assert np.allclose(twins["similarity"], 1)
    assert max(np.abs(a).max() for a, _ in weights.values()) < 0.1
    assert {p["domain"] for p in run["points"]} >= {"mixed"}
    assert {p["matrix"] for p in run["points"]} == {"A", "B"}
    again = heterogeneity.store(lm, path, n=2, steps=2, layers=1)["runs"]
    assert len(again) == 1 and again[0]["metrics"] == run["metrics"]
    assert len(drawn(results, tmp_path)) == 5
    for name, values in (
        ("domains", {"n": 1}),
        ("steps", {"steps": 0}),
        ("layers", {"layers": 99}),
    ):
        with pytest.raises(UserError, match=f"`{name}` must be"):
            heterogeneity.store(lm, path, **{"layers": 1} | values)


def test_words_by_route(taught, few, own_data, tmp_path):
    values = {"max_steps": 6, "batch_size": 2, "stop_ratio": 1e-9, "probe_every": 2}
    training = training_config("alter_selective", **values)
    config = UnlearnConfig(adapter=AdapterConfig(threshold="auto"), training=training)
    run = unlearn(str(taught), load_forget_set(*map(str, own_data)), config)
    run.save(tmp_path / "runs" / "words")
    run.evaluate()
    results = store_words(run, tmp_path / "words.json", examples=4)
    entry = results["runs"][0]
    assert set(entry["words"]) == {"forget", "general"}
    for group, routes in entry["words"].items():
        shares = [v for k, v in entry["metrics"].items() if k.startswith(group)]
        assert len(shares) == len(routes) and sum(shares) == pytest.approx(1)
    assert len(drawn(results, tmp_path)) > 4
    (tmp_path / "runs" / "words" / "answers.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="no forget answers"):
        store_words(run, tmp_path / "words.json")
