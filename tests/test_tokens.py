"""Token records, and the words that they make."""

from dataclasses import replace

import pytest
import torch
from conftest import quick

from alter_demo import UnlearnConfig, load_model, unlearn
from alter_demo.answers import stream
from alter_demo.entropy import tsallis_entropy
from alter_demo.errors import Interrupted, UserError
from alter_demo.models import INTERRUPT
from alter_demo.tokens import QS, TokenRecord, expert_name, word_counts, words
from alter_demo.xray import xray_data, xray_html

TEXT = "What colour has the door of house 3? Smørrebrød 🙂"


@pytest.fixture
def run(tiny, made):
    config = UnlearnConfig(n_experts=2, threshold="auto")
    return unlearn(str(tiny), made, config, quick(lr_b=0.05), folder=None, evaluate=False)


def test_records_of_a_text(run, tiny):
    records = run.tokens(TEXT)
    assert {i for r in records for i in range(r.start, r.end)} == set(range(len(TEXT)))
    assert [w for w, _, _ in words(records)] == TEXT.replace("?", "").split()[
        1:-1
    ]  # whole, bytes and all; nothing predicts the first
    assert records[0].log_prob is None and all(r.log_prob < 0 and r.log_prob_after < 0 for r in records[1:])
    threshold = run.router.config.threshold
    assert all((r.route == "A") == (r.entropy > threshold) for r in records)
    assert all(len(r.weights) == 1 + run.router.config.n_experts for r in records)
    assert all(abs(sum(r.weights[1:]) - 1) < 1e-3 or not any(r.weights) for r in records)
    logits = load_model(str(tiny)).model(torch.tensor([run.lm.tokenizer(TEXT).input_ids])).logits[0].float()
    best = logits.softmax(-1)[4].topk(1)
    assert records[4].top[0][1] == pytest.approx(best.values.item(), abs=1e-4)
    for q, mine in zip(QS, records[4].entropies, strict=True):
        assert mine == pytest.approx(tsallis_entropy(logits[4], q).item(), abs=1e-3)
    with pytest.raises(UserError, match="no text"):
        run.tokens("   ")
    with pytest.raises(UserError, match="4096 is the most"):
        run.tokens("word " * 5000)


def test_change_is_zero_exactly_where_nothing_acts(run):
    records = run.tokens("colour door", question="What colour has the door of house 3?")
    assert any(r.special for r in records) and [w for w, _, _ in words(records)] == ["colour", "door"]
    assert "house" in "".join(r.token for r in records if r.asked)
    acting = [any(r.weights) for r in records]
    assert any(acting)
    first = acting.index(True)
    assert all(r.change == pytest.approx(0, abs=1e-6) for r in records[:first])
    assert max(r.change for r in records[first:]) > 1e-3
    for r in records:
        assert r.expert == 0 if not any(r.weights[1:]) else r.weights[r.expert] == max(r.weights[1:])
        ours = 0.5 * abs(dict(r.top)[r.top[0][0]] - dict(r.top_after).get(r.top[0][0], 0))
        assert ours <= r.change + 1e-4  # one token's part of the distance


def test_a_method_without_a_router_has_no_weights(tiny, made):
    run = unlearn(str(tiny), made, UnlearnConfig(method="lora"), quick("lora"), folder=None, evaluate=False)
    records = run.tokens(TEXT)
    assert all(r.weights == [] and r.expert == 0 for r in records) and max(r.change for r in records) > 0


def record(token, entropy=0.0, expert=0, special=False):
    return TokenRecord(token, 1, special, 0, 0, entropy, [], "B", expert, [], None, None, [], [], 0.0)


def test_words_are_whole():
    pieces = ["<s>", "Hog", "warts", ",", " don", "'t", " \n", "(", "Ron", " We", "asley", "!)", " 9", "¾"]
    records = [record(p, entropy=float(i), special=p == "<s>") for i, p in enumerate(pieces)]
    found = words(records)
    assert [w for w, _, _ in found] == ["Hogwarts", "don't", "Ron", "Weasley", "9¾"]
    assert found[0][1] is records[0] and found[1][1] is records[3]  # the predictions that they came from
    assert [r.token for r in found[0][2]] == ["Hog", "warts"]


def test_words_go_the_way_that_acts():
    idle, acting = replace(record("x"), weights=[0.0, 0.0]), replace(record("x", expert=1), weights=[1.0, 0.7])
    assert [expert_name(r) for r in (idle, acting, record("x"))] == ["none", "B_f1", "B_r"]
    found = [("the", 2.0, "B_f1"), ("the", 2.0, "B_f1"), ("Ron", 0.1, "B_f2"), ("and", 0.1, "B_r"), ("or", 2.0, "none")]
    assert word_counts(found, 1.0) == {"A": {"the": 2}, "B_f2": {"Ron": 1}, "B_r": {"and": 1}, "none": {"or": 1}}
    assert word_counts(found, 3.0)["B_f1"] == {"the": 2}


def test_the_xray_has_the_runs_own_order(run):
    records = run.tokens(TEXT)
    for q, place in ((1.5, 4), (1.3, 4), (3.0, len(QS))):
        data = xray_data(records, replace(run.router.config, q=q, threshold=0.3))
        assert data["qs"][place] == data["q"] == q and len(data["qs"]) == len(data["tokens"][0]["S"])
        assert data["tokens"][3]["S"][place] == round(records[3].entropy if q != 1.5 else records[3].entropies[4], 4)


def test_answers_stream_as_they_are_given_whole(run):
    lm = run.lm
    question = "What colour has the door of house 3?"
    sides = [lambda: run.side(False), lambda: run.side(True)]
    *_, last = stream([lm, lm], sides, question, 12)
    assert last == [run.answer([question], adapted, 12)[0] for adapted in (False, True)]
    # sampled with the same noise, two sides that think the same say the same; another seed says something else
    twice = [lambda: run.side(True), lambda: run.side(True)]
    said = {seed: list(stream([lm, lm], twice, question, 12, 1.0, seed))[-1] for seed in (0, 1)}
    assert said[0][0] == said[0][1] and said[0] != said[1]


def test_a_closed_tab_stops_the_model_in_the_midst(run):
    INTERRUPT.set()
    try:
        with pytest.raises(Interrupted):
            run.answer(["What colour?"])
    finally:
        INTERRUPT.clear()
    assert len(run.answer(["What colour?"], max_new_tokens=4)) == 1


def test_the_saved_xray_holds_hostile_text_as_data(run):
    hostile = "</script><script>window.hacked=1</script> ${7*7}"
    html = xray_html(xray_data(run.tokens(hostile), run.router.config), "<b>title</b>")
    assert html.count("</script>") == 1 and "<b>" not in html and "\\u003c" in html
    assert "default-src 'none'" in html
