"""Multiple choice through lm-eval, on a tiny model and without the hub."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from alter_demo import data, load_model, report, wmdp
from alter_demo.adapter import AlterConfig
from alter_demo.cli import main
from alter_demo.errors import UserError
from alter_demo.grid import Bench, GridConfig, How, grid_config
from alter_demo.methods import METHODS
from alter_demo.training import train_config

FEW = {"max_steps": 2, "batch_size": 2, "probe_every": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("ALTER_DATA_DIR", raising=False)


def test_school_questions_are_sound():
    questions = data.read_set("school")["questions"]
    assert {f"school_{q['subject']}" for q in questions} == set(wmdp.TASKS["school"])
    assert all(len(set(q["choices"])) == 4 for q in questions) and len({q["question"] for q in questions}) == 200
    made = data.load_forget_set("school")
    assert not any("?" in i.answer for i in [*made.forget, *made.retain])  # statements are trained on, no questions
    docs = wmdp.school_task("astronomy")["custom_dataset"]()["test"]
    assert len({d["answer"] for d in docs}) == 4  # the right one stands anywhere


@pytest.mark.parametrize("adapter", [False, True])
def test_lm_eval_scores_as_by_hand(taught, adapter):
    """The likeliest choice wins; ours is computed token by token. Without the question only the choices are left."""
    lm = load_model(str(taught), dtype="float32")
    if adapter:  # lm-eval passes ids alone, padded on the right: the routes must not notice
        torch.manual_seed(5)
        lm.model = get_peft_model(lm.model, AlterConfig(n_experts=2, threshold=1.9)).eval()
        for name, p in lm.model.named_parameters():
            if "alter_B" in name or "alter_gate" in name:
                torch.nn.init.normal_(p, std=0.3)
    docs = list(wmdp.school_task("biology")["custom_dataset"]()["test"])

    def log_likelihood(question, choice):
        prompt, whole = (lm.tokenizer(t).input_ids for t in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_p = lm.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        return sum(log_p[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    for blind, prompt in ((False, "Question: {}\nAnswer:"), (True, "Answer:")):
        right = 0
        for d in docs:
            ranked = [log_likelihood(prompt.format(d["question"]), c) for c in d["choices"]]
            right += ranked.index(max(ranked)) == d["answer"]
        found = wmdp.accuracy(lm, lm.model, wmdp.load_tasks(("school_biology",), blind))
        assert found == {"school_biology": right / len(docs)}


def test_texts_are_trained_on_longer_than_questions(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("alter_demo.runs.unlearn", lambda *a, **k: asked.append(a[3]) or sys.exit(0))
    for forget in ("school", "imaginary-authors"):
        bench = Bench(grid_config("full", forget=forget), [], How(tmp_path / "r.json"), untaught=True)
        with pytest.raises(SystemExit):
            main(["unlearn", "--forget", forget, "--runs", str(tmp_path)])
        assert bench.configs("alter_selective", 0, {})[1] == asked[-1]
        assert bench.configs("alter_selective", 0, {"gamma": 2.0})[1].gamma == 2.0
    texts, questions = asked
    assert replace(questions, **METHODS["alter_selective"].texts) == texts != questions
    assert train_config("npo", of_texts=True) == train_config("npo")


def test_before_and_after_through_the_command_line(tiny, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("alter_demo.answers.OWN_TOKENS", 4)
    path = tmp_path / "school.json"
    options = ["wmdp", "--model", str(tiny), "--seeds", "0", "--limit", "3", "--results", str(path)]
    steps = [f"{k}={v}" for k, v in FEW.items()]
    assert main([*options, "--methods", "alter_selective", "--set", *steps]) == 0
    told = capsys.readouterr().err
    assert "school subjects stand in for WMDP" in told  # --forget auto, no hub
    assert "Running loglikelihood" not in told  # lm-eval's own bars
    runs = json.loads(path.read_text())["runs"]
    assert [r["method"] for r in runs] == ["target", "blind", "alter_selective"]
    for run in runs:
        assert run["config"]["forget"] == "school" and 0 <= run["metrics"]["forget_acc"] <= 1
        assert {f"{t}_acc" for t in wmdp.TASKS["school"]} < run["metrics"].keys()
    before = path.read_text()
    assert main([*options, "--methods", "alter_selective", "--set", *steps]) == 0
    assert path.read_text() == before  # nothing is run twice
    assert (
        main([*options, "--tasks", "wmdp_bio", "mmlu"]) == 2
        and "holds answers to other tasks" in capsys.readouterr().err
    )
    assert main([*options, "--tasks", "school_biology", "school_astronomy"]) == 2  # would be another `forget_acc`
    assert main([*options, "--tasks", "school_biology"]) == 2 and "two tasks" in capsys.readouterr().err
    for run in runs:
        run["config"]["overrides"] = {}
    assert report.table_of({"runs": runs}).count("| **alter_selective** |") == 1
    assert "wmdp --forget school --methods alter_selective" in report.commands_of({"runs": runs}, "school")[0]


def test_without_hub_and_with_unknown_names_one_sentence(tiny, tmp_path, monkeypatch):
    how = How(tmp_path / "r.json")
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        wmdp.load_tasks(("wmdp_bio",))
    with pytest.raises(UserError, match="knows no task 'wmdp_magic'"):
        wmdp.load_tasks(("wmdp_magic",))
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        wmdp.choice_grid(GridConfig(forget="wmdp-cyber", model=str(tiny)), ["alter"], [0], how)
    with pytest.raises(UserError, match="not for 'imaginary-authors'"):
        wmdp.choice_grid(GridConfig(forget="imaginary-authors"), ["alter"], [0], how)
    folder = tmp_path / "wmdp"
    folder.mkdir()
    for part in ("forget", "retain"):
        (folder / f"cyber-{part}-corpus.jsonl").write_text(json.dumps({"text": f"A paper ({part}). " * 400}) + "\n")
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path))
    made = data.load_forget_set("wmdp-cyber")
    assert len(made.forget) == 1 and len(made.forget[0].answer) == data.WMDP_CHARACTERS
    with pytest.raises(UserError, match="bio-forget-corpus"):
        data.load_forget_set("wmdp-bio")


def test_too_little_memory_is_told_before_loading(tiny, monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    with pytest.raises(UserError, match=r"billion weights, which need .* GB of memory"):
        load_model(str(tiny))
