"""What is stored from a run and from LoRAs side by side, as table, drawing and command."""

import numpy as np
import pytest
from conftest import OWN_FORGET, quick

from alter_demo import heterogeneity, load_model, report, unlearn
from alter_demo.errors import UserError
from alter_demo.example import store_words
from alter_demo.runs import UnlearnConfig


def drawn(results, folder):
    """Every drawing of the results as a file, with the table's lines."""
    for name, draw in report.drawings_of(results).items():
        figure, path = draw(results), folder / f"{name}.png"
        figure.save(path) if hasattr(figure, "save") else path.write_text(figure.to_json())
        assert path.stat().st_size > 1000
    return report.table_of(results).splitlines()


def test_loras_of_several_domains(tiny, tmp_path):
    lm, path = load_model(str(tiny), dtype="float32"), tmp_path / "heterogeneity.json"
    results = heterogeneity.store(lm, path, n=2, steps=2, layers=1)
    run = results["runs"][0]
    assert all(abs(v) <= 1 for v in run["metrics"].values()) and run["metrics"]["B_mixed_cosine"] > 0
    weights = heterogeneity.fine_tuned(load_model(str(tiny), dtype="float32"), {"a": OWN_FORGET, "b": OWN_FORGET}, 2, 1)
    twins = heterogeneity.similarity(weights)  # of the same data the same is learned, beside the start they share
    assert np.allclose(twins["similarity"], 1) and max(np.abs(a).max() for a, _ in weights.values()) < 0.1
    assert {p["domain"] for p in run["points"]} >= {"mixed"} and {p["matrix"] for p in run["points"]} == {"A", "B"}
    assert heterogeneity.store(lm, path, n=2, steps=2, layers=1)["runs"][0]["metrics"] == run["metrics"]
    assert len(drawn(results, tmp_path)) == 5
    (command,) = report.commands_of(results, "heterogeneity")
    assert "heterogeneity --domains 2 --steps 2 --layers 1 --results" in command
    for values in ({"n": 1}, {"steps": 0}, {"layers": 99}):
        with pytest.raises(UserError, match=r"[Tt]here"):
            heterogeneity.store(lm, path, **values)


def test_words_by_way(taught, made, tmp_path):
    run = unlearn(str(taught), made, UnlearnConfig(threshold="auto"), quick(), "words", tmp_path / "runs")
    results = store_words(run, tmp_path / "words.json", items=4)
    entry = results["runs"][0]
    assert set(entry["words"]) == {"forget", "general"}
    for group, ways in entry["words"].items():
        shares = [v for k, v in entry["metrics"].items() if k.startswith(group)]
        assert len(shares) == len(ways) and sum(shares) == pytest.approx(1)
    assert len(drawn(results, tmp_path)) > 4
    rows = tmp_path / "runs" / "words" / "answers.json"
    rows.write_text("[]")
    with pytest.raises(UserError, match="no forget answers"):
        store_words(run, tmp_path / "words.json")
