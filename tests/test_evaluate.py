"""Logs, figures, and the benchmark authors' own numbers."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN
from peft import get_peft_model

from alter_demo import load_model
from alter_demo.alter.tuner import AlterConfig
from alter_demo.cli.main import main
from alter_demo.data.rendering import render
from alter_demo.data.schema import Example
from alter_demo.evaluation.logs import read_log, to_open_unlearning, write_log
from alter_demo.evaluation.measure import add_fluency, evaluate_groups
from alter_demo.evaluation.summary import MIA, Log, group_figures, interval, summary
from alter_demo.models.generation import greedy
from alter_demo.models.scoring import answer_scores

OFFICIAL = Path(__file__).parents[2] / "shared" / "fixtures" / "tofu_official"
UTILITY = {
    "full": 0.6226773637427152,
    "retain90": 0.613744995233942,
    "retain95": 0.6005765316813113,
    "retain99": 0.6207444755970777,
}
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="../shared/fixtures is absent")


def evaluate_command(capsys, *args):
    code = main(["evaluate", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_interval_of_a_mean():
    values = [0.0, 1.0] * 32
    low, high = interval(values)
    # normal approximation: 0.5 +- 1.96 x 0.5 / 8
    assert low == pytest.approx(0.3775, abs=0.03) and high == pytest.approx(0.6225, abs=0.03)
    assert interval(values) == [low, high]  # the same for the same values
    assert interval([0.3] * 20) == [0.3, 0.3]
    assert interval(values * 4) is None and interval([1.0]) is None


# -------------------------------------------------------------------------- figures from logs


@official
@pytest.mark.parametrize("model", UTILITY)
def test_model_utility_of_the_official_logs(model, capsys):
    code, out, _ = evaluate_command(capsys, "--logs", OFFICIAL / f"llama2-7b_{model}.json")
    assert code == 0
    assert json.loads(out)["model_utility"] == pytest.approx(UTILITY[model], abs=1e-9)


@official
def test_forget_quality_of_the_official_logs(capsys):
    full, retain = (OFFICIAL / f"llama2-7b_{m}.json" for m in ("full", "retain90"))
    _, out, _ = evaluate_command(capsys, "--logs", full, "--retain-logs", retain)
    assert json.loads(out)["forget_quality"] == pytest.approx(1.834066410994743e-21, rel=1e-9)
    _, out, _ = evaluate_command(capsys, "--logs", retain, "--retain-logs", retain)
    assert json.loads(out)["forget_quality"] == 1.0


def small_log() -> Log:
    rows = pd.DataFrame(
        {
            "question": ["a", "a", "c"],  # the same question twice is allowed
            "answer": ["x", "y", "z"],
            "avg_gt_loss": [0.5, 1.0, 2.0],
            "exact_memorization": [1.0, 0.5, 0.0],
            "extraction_strength": [1.0, 0.25, 0.0],
            "generated_text": ["x", "", "z z z z z z z z"],
            "rougeL_recall": [1.0, 0.0, 1.0],
            "rougeL_f1": [1.0, 0.0, 0.2],
            "avg_paraphrased_loss": [1.0, 1.5, 2.0],
            "average_perturb_loss": [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]],
            **{name: [0.1, 0.2, 0.3] for name in MIA},
        }
    )
    holdout = rows[["question", "answer", "avg_gt_loss", *MIA]].assign(mia_min_k=[0.4, 0.5, 0.15])
    return {"forget": rows, "retain": rows.drop(columns=list(MIA)), "holdout": holdout}


def test_a_written_log_is_read_back_unchanged(tmp_path, capsys):
    log, file = small_log(), tmp_path / "log.json"
    write_log(log, file)
    again = read_log(file)
    assert summary(again, again) == pytest.approx(summary(log, log))
    data = json.loads(file.read_text())
    loss = data["forget_Q_A_Prob"]["value_by_index"]["1"]
    assert loss == {"avg_loss": 1.0, "prob": math.exp(-1)}
    assert data["extraction_strength"]["agg_value"] == pytest.approx(1.25 / 3)
    ratio = data["forget_Truth_Ratio"]["value_by_index"]["2"]["score"]
    assert ratio == pytest.approx(1.0)
    code, out, _ = evaluate_command(capsys, "--logs", file, "--retain-logs", file)
    flat = json.loads(out)
    assert code == 0 and flat["forget_quality"] == 1.0 and flat["privleak"] == 0.0
    # of 9 pairs, 0.2 and 0.3 are not below 0.15
    assert flat["mia_min_k"] == pytest.approx(7 / 9)


def test_summary_by_hand():
    flat = summary({"retain": small_log()["retain"]})
    p = [math.exp(-x) for x in (0.5, 1.0, 2.0)]
    r = [math.exp(1.0 - 1.5), math.exp(1.5 - 2.0), 1.0]
    parts = [sum(p) / 3, 2 / 3, sum(1 - x for x in r) / 3]
    assert flat["model_utility"] == pytest.approx(3 / sum(1 / x for x in parts))


def broken(kind: str, log: dict) -> str:
    if kind == "cut":
        return json.dumps(log)[:-40]
    if kind == "unequal":
        del log["forget_Q_A_ROUGE"]["value_by_index"]["1"]
    if kind == "nan":
        log["forget_Q_A_Prob"]["value_by_index"]["1"]["avg_loss"] = float("nan")
    if kind == "text":
        log["forget_Q_A_Prob"]["value_by_index"]["1"]["avg_loss"] = "low"
    if kind == "shape":
        log = {"forget_Q_A_Prob": [1, 2]}
    if kind == "list":
        log = [1, 2]
    if kind == "strange":
        log = {"loss": 1}
    return json.dumps(log)


BROKEN = [
    ("cut", "not a complete JSON file"),
    ("unequal", "must have the same examples"),
    ("nan", "not a number"),
    ("text", "not a number"),
    ("shape", "not an evaluation log"),
    ("list", "not an evaluation log"),
    ("strange", "no examples"),
]


@pytest.mark.parametrize("kind, message", BROKEN)
def test_a_bad_log_is_a_one_line_error(kind, message, tmp_path, capsys):
    (tmp_path / "log.json").write_text(broken(kind, to_open_unlearning(small_log())))
    code, _, err = evaluate_command(capsys, "--logs", tmp_path / "log.json")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_retain_log_is_missing_or_has_other_examples(tmp_path, capsys):
    log = small_log()
    write_log(log, tmp_path / "a.json")
    write_log({group: rows.iloc[:2] for group, rows in log.items()}, tmp_path / "b.json")
    write_log({"retain": log["retain"]}, tmp_path / "c.json")
    messages = {"nowhere": "not found", "b": "the same questions", "c": "no forget part"}
    for name, message in messages.items():
        paths = tmp_path / "a.json", tmp_path / f"{name}.json"
        code, _, err = evaluate_command(capsys, "--logs", paths[0], "--retain-logs", paths[1])
        assert code == 2 and message in err


def test_open_unlearnings_own_logs(tmp_path, capsys):
    """No paraphrased answers, both groups of an MIA in one entry, and missing parts."""

    def entry(values):
        by_index = {str(i): value for i, value in enumerate(values)}
        return {"agg_value": 0.5, "value_by_index": by_index}

    losses = [{"avg_loss": x, "prob": math.exp(-x)} for x in (1.0, 2.0)]
    wrong = [{"avg_loss": [2.0, 2.0]}, {"avg_loss": [1.0, 3.0]}]
    groups = {"forget": entry([{"score": 0.1}]), "holdout": entry([{"score": 0.4}])}
    data = {
        "ra_Q_A_Prob": entry(losses),
        "ra_Q_A_PERT_Prob": entry(wrong),
        "mia_min_k": {"auc": 1.0, "agg_value": 1.0, **groups},
        "forget_Q_A_ROUGE": entry([]),
    }
    (tmp_path / "log.json").write_text(json.dumps(data))
    code, out, err = evaluate_command(capsys, "--logs", tmp_path / "log.json")
    flat = json.loads(out)
    assert code == 0, err
    assert flat["ra_Truth_Ratio"] == pytest.approx((1 - math.exp(1 - 2)) / 2)
    assert flat["mia_min_k"] == 1.0 and "model_utility" not in flat


# ------------------------------------------------------------------------------- measuring


def test_evaluate_groups_agrees_with_a_plain_forward_pass(taught, cache):
    lm = load_model(str(taught), dtype="float32")
    groups = {"forget": OWN_FORGET[:5], "general": OWN_RETAIN[:4], "holdout": OWN_RETAIN[4:8]}
    log = evaluate_groups(lm, lm.model, groups, tokens=8)
    assert "generated_text" not in log["holdout"] and list(log) == list(groups)
    for i, example in enumerate(groups["forget"]):
        logits, labels = answer_pass(lm, example)
        row = log["forget"].iloc[i]
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        assert row["avg_gt_loss"] == pytest.approx(loss, abs=1e-4)
        hits = (logits.argmax(-1) == labels)[:-1].tolist()
        assert row["exact_memorization"] == pytest.approx(sum(hits) / len(hits))
        tail = 0  # tokens at the end that all follow greedily
        while tail < len(hits) and hits[len(hits) - 1 - tail]:
            tail += 1
        assert row["extraction_strength"] == pytest.approx(tail / len(hits))
    assert log["forget"]["avg_gt_loss"].mean() < 1  # the model has learned these


def answer_pass(lm, example: Example):
    """Logits (K, V) and labels (K,) of an answer."""
    sample = render(lm.tokenizer, example)[0]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([sample.ids])).logits
    return logits[0, sample.start - 1 : -1], torch.tensor(sample.ids[sample.start :])


def test_plain_texts_are_left_out(tiny):
    lm = load_model(str(tiny), dtype="float32")
    questions, text = [Example("Who?", "Me."), Example("Where?", "Here.")], Example("", "A text.")
    for examples in ([text, *questions], [*questions, text]):
        log = evaluate_groups(lm, lm.model, {"forget": examples}, 4)
        assert log["forget"]["question"].tolist() == ["Who?", "Where?"]


def test_fluency_is_the_likelihood_under_the_base_model(tiny):
    lm = load_model(str(tiny))
    questions = ["What colour is the door?", "Who lives in house 3?"]
    answers = greedy(lm, questions, 8)
    perplexity = []
    for texts in (answers, ["zebra quartz 77 !!", ""]):
        log = {"forget": pd.DataFrame({"question": questions, "generated_text": texts})}
        add_fluency(lm, lm.model, log)
        figures = group_figures("forget", log["forget"][["avg_fluency_loss"]])
        perplexity.append(figures["perplexity"])
    scores = answer_scores(lm, questions, answers)
    loss = sum(-sum(s.log_p) / len(s.log_p) for s in scores) / 2
    assert perplexity[0] == pytest.approx(math.exp(loss), rel=1e-4)
    # an empty answer is scored too, by its end of turn
    assert perplexity[0] != perplexity[1] and 1 <= perplexity[1] < math.inf


@pytest.mark.parametrize("adapter", [False, True])
def test_answers_to_one_question_share_its_pass_and_score_the_same(tiny, adapter):
    lm = load_model(str(tiny), dtype="float32")
    if adapter:
        torch.manual_seed(5)
        lm.model = get_peft_model(lm.model, AlterConfig(n_experts=2, threshold=1.9)).eval()
        for name, p in lm.model.named_parameters():
            if "alter_B" in name or "alter_gate" in name:
                torch.nn.init.normal_(p, std=0.3)
    questions = ("Who?", "What colour is the door of house 12?")
    pairs = [(q, a) for q in questions for a in ("Red.", "It is a blue one.", "")]
    pairs = [*pairs[::2], ("", "A plain text without a question."), *pairs[1::2]]
    shapes = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    scores = answer_scores(lm, *map(list, zip(*pairs, strict=True)))
    handle.remove()
    assert [rows for rows, _ in shapes] == [2, 6, 1]  # two prompts, six answers, one text
    experts = set()
    for (question, answer), score in zip(pairs, scores, strict=True):
        logits, labels = answer_pass(lm, Example(question, answer))
        log_p = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        assert torch.tensor(score.log_p) == pytest.approx(log_p, abs=1e-4)
        assert score.hits == (logits.argmax(-1) == labels).tolist()
        if adapter:
            plan = lm.model.get_base_model().token_router.state.last_plan
            experts |= set(plan.weights[0, :, 1:].argmax(-1).tolist())
    assert not adapter or len(experts) == 2


def test_greedy_ignores_the_models_generation_config(tiny):
    lm = load_model(str(tiny), dtype="float32")
    answers = greedy(lm, ["Hello!", "And?"], 12)
    lm.model.generation_config.update(
        repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=2, min_p=0.9
    )
    assert greedy(lm, ["Hello!", "And?"], 12) == answers
