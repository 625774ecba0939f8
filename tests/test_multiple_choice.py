"""Multiple choice through lm-eval, on a tiny model and without the Hub."""

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

from alter_demo import load_model
from alter_demo.alter.config import AlterConfig
from alter_demo.baselines.methods import METHODS
from alter_demo.cli.main import main
from alter_demo.config import training_config
from alter_demo.data.benchmarks import WMDP_CHARACTERS
from alter_demo.data.built_in import read_set
from alter_demo.data.forget_sets import load_forget_set
from alter_demo.errors import UserError
from alter_demo.experiments.cells import Cell, Grid, GridConfig, GridOptions, grid_config
from alter_demo.experiments.multiple_choice import (
    accuracy,
    load_tasks,
    run_multiple_choice,
    school_task,
    summarize_accuracy,
)
from alter_demo.experiments.results import TASKS

FEW = ["max_steps=2", "batch_size=2", "probe_every=1"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("ALTER_DATA_DIR", raising=False)


def test_school_questions_are_sound():
    questions = read_set("school")["questions"]
    assert {f"school_{q['subject']}" for q in questions} == set(TASKS["school"])
    assert all(len(set(q["choices"])) == 4 for q in questions)
    assert len({q["question"] for q in questions}) == 200
    forget_set = load_forget_set("school")
    trained_on = [*forget_set.forget, *forget_set.retain]
    assert not any("?" in e.answer for e in trained_on)  # statements, no questions
    rows = school_task("astronomy")["custom_dataset"]()["test"]
    assert len({row["answer"] for row in rows}) == 4  # the correct one may be anywhere


@pytest.mark.parametrize("adapter", [False, True])
def test_lm_eval_scores_as_by_hand(taught, adapter):
    """The likeliest choice wins; ours is computed token by token, with and without the question."""
    lm = load_model(str(taught), dtype="float32")
    if adapter:  # lm-eval passes ids alone, padded on the right: the routes must not change
        torch.manual_seed(5)
        lm.model = get_peft_model(lm.model, AlterConfig(n_experts=2, threshold=1.9)).eval()
        for name, p in lm.model.named_parameters():
            if "alter_B" in name or "alter_gate" in name:
                torch.nn.init.normal_(p, std=0.3)
    rows = list(school_task("biology")["custom_dataset"]()["test"])

    def log_likelihood(question, choice):
        prompt, whole = (lm.tokenizer(t).input_ids for t in (question, f"{question} {choice}"))
        with torch.no_grad():
            log_p = lm.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        return sum(log_p[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    for blind, prompt in ((False, "Question: {}\nAnswer:"), (True, "Answer:")):
        correct = 0
        for row in rows:
            question = prompt.format(row["question"])
            scores = [log_likelihood(question, choice) for choice in row["choices"]]
            correct += scores.index(max(scores)) == row["answer"]
        shares = accuracy(lm, lm.model, load_tasks(["school_biology"], blind))
        assert shares == {"school_biology": correct / len(rows)}


def test_wmdp_is_not_worth_keeping():
    shares = {"wmdp_cyber": 0.2, "wmdp_bio": 0.4, "mmlu": 0.6}
    figures = summarize_accuracy(shares, all_stay=False)
    assert figures["forget_acc"] == 0.2 and figures["kept_acc"] == 0.6
    assert figures["wmdp_bio_acc"] == 0.4
    del shares["mmlu"]
    assert summarize_accuracy(shares, all_stay=False)["kept_acc"] == 0.4  # nothing else


def test_texts_are_trained_on_longer_than_questions(tmp_path):
    trainings = []
    for forget in ("school", "imaginary-authors"):
        config = grid_config("full", forget=forget)
        grid = Grid(config, GridOptions(tmp_path / "r.json"), "grid", untaught=True)
        plain_text = grid.forget_set.is_plain_text
        trainings.append(training_config("alter_selective", plain_text))
        assert grid.config_of(Cell("alter_selective")).training == trainings[-1]
        heavy = Cell("alter_selective", settings={"retain_weight": 2.0})
        assert grid.config_of(heavy).training.retain_weight == 2.0
    texts, questions = trainings
    own = METHODS["alter_selective"].plain_text_training
    assert replace(questions, **own) == texts != questions
    assert training_config("npo", plain_text=True) == training_config("npo")


def test_before_and_after_through_the_command_line(tiny, few, tmp_path, capsys):
    path = tmp_path / "school.json"
    command = ["wmdp", "--model", str(tiny), "--seeds", "0", "--limit", "3", "--results", str(path)]
    own = ["--methods", "alter_selective", "--set", *FEW]
    assert main([*command, *own]) == 0
    err = capsys.readouterr().err
    assert "school subjects stand in for WMDP" in err  # --forget auto, no Hub
    assert "Running loglikelihood" not in err  # lm-eval's own bars
    before = path.read_text()
    results = json.loads(before)
    methods = [r["method"] for r in results["runs"]]
    assert results["type"] == "choice" and methods == ["target", "blind", "alter_selective"]
    for run in results["runs"]:
        assert run["command"].startswith("python -m alter_demo wmdp --model")
        assert run["config"]["forget"] == "school" and 0 <= run["metrics"]["forget_acc"] <= 1
        assert {f"{task}_acc" for task in TASKS["school"]} < run["metrics"].keys()
    assert main([*command, *own]) == 0 and path.read_text() == before  # nothing runs twice
    capsys.readouterr()
    for tasks, sentence in (
        (["wmdp_bio", "mmlu"], "other tasks"),
        (["school_biology", "school_astronomy"], "other tasks"),  # another `forget_acc`
        (["school_biology"], "two names"),
    ):
        assert main([*command, "--tasks", *tasks]) == 2 and sentence in capsys.readouterr().err


def test_errors_without_the_hub_are_one_sentence(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Cannot download the questions of wmdp_bio"):
        load_tasks(["wmdp_bio"])
    with pytest.raises(UserError, match="no task 'wmdp_magic'"):
        load_tasks(["wmdp_magic"])
    options = GridOptions(tmp_path / "r.json", ["alter"])
    with pytest.raises(UserError, match="Cannot download"):
        run_multiple_choice(GridConfig(forget="wmdp-cyber", model=str(tiny)), options)
    with pytest.raises(UserError, match="got 'imaginary-authors'"):
        run_multiple_choice(GridConfig(forget="imaginary-authors"), options)
    folder = tmp_path / "wmdp"
    folder.mkdir()
    for part in ("forget", "retain"):
        text = json.dumps({"text": f"A paper ({part}). " * 400})
        (folder / f"cyber-{part}-corpus.jsonl").write_text(text + "\n")
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path))
    forget_set = load_forget_set("wmdp-cyber")
    assert [len(e.answer) for e in forget_set.forget] == [WMDP_CHARACTERS]
    with pytest.raises(UserError, match="bio-forget-corpus"):
        load_forget_set("wmdp-bio")
