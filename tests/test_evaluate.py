"""Logs, figures, and the official numbers that nobody here computed."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN
from peft import get_peft_model

from alter_demo import evaluate as evaluation
from alter_demo import load_model, metrics
from alter_demo.adapter import AlterConfig
from alter_demo.answers import answer_scores, greedy
from alter_demo.cli import main
from alter_demo.data import Item, render
from alter_demo.errors import UserError

OFFICIAL = Path(__file__).parents[2] / "shared" / "fixtures" / "tofu_official"
UTILITY = {
    "full": 0.6226773637427152,
    "retain90": 0.613744995233942,
    "retain95": 0.6005765316813113,
    "retain99": 0.6207444755970777,
}


def run(capsys, *args):
    code = main(["evaluate", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("model", UTILITY)
def test_model_utility_of_the_official_logs(model, capsys):
    if not OFFICIAL.is_dir():
        pytest.skip("../shared/fixtures is absent")
    code, out, _ = run(capsys, "--logs", OFFICIAL / f"llama2-7b_{model}.json")
    assert code == 0 and json.loads(out)["model_utility"] == pytest.approx(UTILITY[model], abs=1e-9)


def test_forget_quality_of_the_official_logs(capsys):
    if not OFFICIAL.is_dir():
        pytest.skip("../shared/fixtures is absent")
    logs = [OFFICIAL / f"llama2-7b_{m}.json" for m in ("full", "retain90")]
    _, out, _ = run(capsys, "--logs", logs[0], "--retain-logs", logs[1])
    assert json.loads(out)["forget_quality"] == pytest.approx(1.834066410994743e-21, rel=1e-9)
    _, out, _ = run(capsys, "--logs", logs[1], "--retain-logs", logs[1])
    assert json.loads(out)["forget_quality"] == 1.0


def test_fluency_is_the_likelihood_under_the_untouched_model(tiny):
    lm = load_model(str(tiny))
    asked = ["What colour is the door?", "Who lives in house 3?"]
    own = greedy(lm, asked, 8)
    log = {"forget": pd.DataFrame({"question": asked, "generated_text": own})}
    odd = {"forget": pd.DataFrame({"question": asked, "generated_text": ["zebra quartz 77 !!", ""]})}
    for one in (log, odd):
        evaluation.add_fluency(lm, lm.model, one)
    mine, other = (
        evaluation.group_figures("forget", x["forget"][["avg_fluency_loss"]])["perplexity"] for x in (log, odd)
    )
    scores = answer_scores(lm, asked, own)
    assert mine == pytest.approx(math.exp(sum(-sum(s.log_p) / len(s.log_p) for s in scores) / 2), rel=1e-4)
    assert mine != other and 1 <= other < math.inf  # an empty answer is scored too, by its end


@pytest.mark.parametrize("adapter", [False, True])
def test_answers_to_one_question_share_its_pass_and_score_the_same(tiny, adapter):
    lm = load_model(str(tiny), dtype="float32")
    if adapter:
        torch.manual_seed(5)
        lm.model = get_peft_model(lm.model, AlterConfig(n_experts=2, threshold=1.9)).eval()
        for name, p in lm.model.named_parameters():
            if "alter_B" in name or "alter_gate" in name:
                torch.nn.init.normal_(p, std=0.3)
    pairs = [
        (q, a) for q in ("Who?", "What colour is the door of house 12?") for a in ("Red.", "It is a blue one.", "")
    ]
    pairs = [*pairs[::2], ("", "A plain text without a question."), *pairs[1::2]]
    passes = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = answer_scores(lm, *map(list, zip(*pairs, strict=True)))
    handle.remove()
    assert [rows for rows, _ in passes] == [2, 6, 1]  # two prompts, six answers, one text
    routes = set()
    for (question, answer), score in zip(pairs, scores, strict=True):
        sample = render(lm.tokenizer, Item(question, answer))[0]
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([sample.ids])).logits[0, sample.start - 1 : -1]
        labels = torch.tensor(sample.ids[sample.start :])
        assert torch.tensor(score.log_p) == pytest.approx(
            logits.log_softmax(-1).gather(1, labels[:, None])[:, 0], abs=1e-4
        )
        assert score.hits == (logits.argmax(-1) == labels).tolist()
        if adapter:
            routes |= set(lm.model.get_base_model().token_router.state.last_plan.weights[0, :, 1:].argmax(-1).tolist())
    assert not adapter or len(routes) == 2


def small_log() -> evaluation.Log:
    rows = pd.DataFrame(
        {
            "question": ["a", "a", "c"],  # one question may stand twice
            "answer": ["x", "y", "z"],
            "avg_gt_loss": [0.5, 1.0, 2.0],
            "exact_memorization": [1.0, 0.5, 0.0],
            "extraction_strength": [1.0, 0.25, 0.0],
            "generated_text": ["x", "", "z z z z z z z z"],
            "rougeL_recall": [1.0, 0.0, 1.0],
            "rougeL_f1": [1.0, 0.0, 0.2],
            "avg_paraphrased_loss": [1.0, 1.5, 2.0],
            "average_perturb_loss": [[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]],
            **{name: [0.1, 0.2, 0.3] for name in evaluation.MIA},
        }
    )
    holdout = rows[["question", "answer", "avg_gt_loss", *evaluation.MIA]].assign(mia_min_k=[0.4, 0.5, 0.15])
    return {"forget": rows, "retain": rows.drop(columns=list(evaluation.MIA)), "holdout": holdout}


def test_a_log_of_ours_is_read_back_whole(tmp_path, capsys):
    log = small_log()
    evaluation.write_log(log, tmp_path / "log.json")
    again = evaluation.read_log(tmp_path / "log.json")
    assert evaluation.summary(again, again) == pytest.approx(evaluation.summary(log, log))
    field = json.loads((tmp_path / "log.json").read_text())
    assert field["forget_Q_A_Prob"]["value_by_index"]["1"] == {"avg_loss": 1.0, "prob": math.exp(-1)}
    assert field["extraction_strength"]["agg_value"] == pytest.approx(1.25 / 3)
    assert field["forget_Truth_Ratio"]["value_by_index"]["2"]["score"] == pytest.approx(1.0)
    code, out, _ = run(capsys, "--logs", tmp_path / "log.json", "--retain-logs", tmp_path / "log.json")
    flat = json.loads(out)
    assert code == 0 and flat["forget_quality"] == 1.0 and flat["privleak"] == 0.0
    # 9 pairs; 0.2 and 0.3 are not below 0.15: 7 of 9
    assert flat["mia_min_k"] == pytest.approx(7 / 9)


def test_summary_by_hand():
    flat = evaluation.summary({"retain": small_log()["retain"]})
    p = [math.exp(-x) for x in (0.5, 1.0, 2.0)]
    r = [math.exp(1.0 - 1.5), math.exp(1.5 - 2.0), 1.0]
    parts = [sum(p) / 3, 2 / 3, sum(1 - x for x in r) / 3]
    assert flat["model_utility"] == pytest.approx(3 / sum(1 / x for x in parts))
    assert metrics.normalised_probability(0.3, [0.1, 0.2]) == pytest.approx(0.5)


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
    ("cut", "cut short"),
    ("unequal", "unequal items"),
    ("nan", "not a number"),
    ("text", "not a number"),
    ("shape", "not an evaluation log"),
    ("list", "not an evaluation log"),
    ("strange", "no items"),
]


@pytest.mark.parametrize("kind, sentence", BROKEN)
def test_a_bad_log_is_one_sentence(kind, sentence, tmp_path, capsys):
    (tmp_path / "log.json").write_text(broken(kind, evaluation.to_field(small_log())))
    code, _, err = run(capsys, "--logs", tmp_path / "log.json")
    assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1


def test_retain_log_missing_or_of_other_items(tmp_path, capsys):
    log = small_log()
    evaluation.write_log(log, tmp_path / "a.json")
    evaluation.write_log({k: v.iloc[:2] for k, v in log.items()}, tmp_path / "b.json")
    evaluation.write_log({"retain": log["retain"]}, tmp_path / "c.json")
    for other, sentence in (("nowhere", "no log"), ("b", "same questions"), ("c", "no forget part")):
        code, _, err = run(capsys, "--logs", tmp_path / "a.json", "--retain-logs", tmp_path / f"{other}.json")
        assert code == 2 and sentence in err


def test_evaluate_agrees_with_a_pass_by_hand(taught, cache):
    lm = load_model(str(taught), dtype="float32")
    groups = {"forget": OWN_FORGET[:5], "general": OWN_RETAIN[:4], "holdout": OWN_RETAIN[4:8]}
    log = evaluation.evaluate(lm, lm.model, groups, tokens=8)
    assert "generated_text" not in log["holdout"] and list(log) == list(groups)
    from alter_demo.data import render

    for i, item in enumerate(groups["forget"]):
        import torch

        sample = render(lm.tokenizer, item)[0]
        logits = lm.model(torch.tensor([sample.ids])).logits[0, sample.start - 1 : -1]
        labels = torch.tensor(sample.ids[sample.start :])
        row = log["forget"].iloc[i]
        assert row["avg_gt_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)
        hits = (logits.argmax(-1) == labels)[:-1].tolist()
        assert row["exact_memorization"] == pytest.approx(sum(hits) / len(hits))
        tail = 0  # tokens at the end that all follow from those before
        while tail < len(hits) and hits[len(hits) - 1 - tail]:
            tail += 1
        assert row["extraction_strength"] == pytest.approx(tail / len(hits))
    # what was taught by heart tells itself from what was not
    assert log["forget"]["avg_gt_loss"].mean() < 1


def test_extraction_strength_and_mia_by_hand():
    assert metrics.extraction_strength([True, False, True, True]) == 0.5
    assert metrics.extraction_strength([True] * 3) == 1 and metrics.extraction_strength([False] * 3) == 0
    assert metrics.extraction_strength([True, True, False]) == 0 and metrics.exact_memorization([]) == 0
    assert metrics.min_k([-1, -2, -3, -4, -5]) == 4.5  # the two lowest of five
    assert metrics.auc([1, 2], [3, 4]) == 1 and metrics.auc([1, 4], [2, 3]) == 0.5
    assert metrics.privleak(0.9, 0.5) == pytest.approx(-80) and metrics.privleak(0.5, 0.5) == 0
    assert metrics.asg({"bleu": 0.2, "rouge": 0.4}, {"bleu": 0.1, "rouge": 0.1}) == pytest.approx(20)
    with pytest.raises(UserError):
        metrics.asg({"bleu": 0.2}, {"rouge": 0.1})
    assert metrics.bleu(["the cat sat on the mat"], ["The cat sat on the mat"]) == pytest.approx(1)
    assert metrics.bleu([""], ["a b"]) == 0 and metrics.rouge("", "a b") == (0, 0)


def test_open_unlearnings_own_logs(tmp_path, capsys):
    """Real authors without a paraphrase, MIA with both sides in one entry, and parts left out."""

    def entry(values):
        return {"agg_value": 0.5, "value_by_index": {str(i): v for i, v in enumerate(values)}}

    loss = entry([{"avg_loss": 1.0, "prob": math.exp(-1)}, {"avg_loss": 2.0, "prob": math.exp(-2)}])
    wrong = entry([{"avg_loss": [2.0, 2.0]}, {"avg_loss": [1.0, 3.0]}])
    mia = {"auc": 1.0, "agg_value": 1.0, "forget": entry([{"score": 0.1}]), "holdout": entry([{"score": 0.4}])}
    field = {"ra_Q_A_Prob": loss, "ra_Q_A_PERT_Prob": wrong, "mia_min_k": mia, "forget_Q_A_ROUGE": entry([])}
    (tmp_path / "log.json").write_text(json.dumps(field))
    code, out, err = run(capsys, "--logs", tmp_path / "log.json")
    flat = json.loads(out)
    assert code == 0, err
    assert flat["ra_Truth_Ratio"] == pytest.approx((1 - math.exp(1 - 2)) / 2)
    assert flat["mia_min_k"] == 1.0 and "model_utility" not in flat


def test_a_diverged_model_is_one_sentence():
    with pytest.raises(UserError, match="diverged"):
        metrics.auc([float("nan")], [1.0])
    assert metrics.truth_ratio(-2000.0, [-1.0]) > 1e300  # and no overflow


def test_greedy_is_greedy_whatever_the_model_brings_along(tiny):
    lm = load_model(str(tiny), dtype="float32")
    plain = greedy(lm, ["Hello!", "And?"], 12)
    lm.model.generation_config.update(repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=2, min_p=0.9)
    assert greedy(lm, ["Hello!", "And?"], 12) == plain


def test_texts_among_questions_are_not_asked(tiny):
    lm, questions = load_model(str(tiny), dtype="float32"), [Item("Who?", "Me."), Item("Where?", "Here.")]
    for items in ([Item("", "A text."), *questions], [*questions, Item("", "A text.")]):
        assert evaluation.evaluate(lm, lm.model, {"forget": items}, 4)["forget"]["question"].tolist() == [
            "Who?",
            "Where?",
        ]
