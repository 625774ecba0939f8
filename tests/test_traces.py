"""Token traces, the words made from them, the X-ray, and answers token by token."""

from dataclasses import replace

import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN, quick_config

from alter_demo import load_model, unlearn
from alter_demo.alter.entropy import tsallis_entropy
from alter_demo.data.schema import Example, ForgetSet
from alter_demo.errors import Interrupted, UserError
from alter_demo.inspection.traces import QS, TokenTrace
from alter_demo.inspection.words import expert_name, word_counts, words
from alter_demo.inspection.xray import xray_data, xray_html
from alter_demo.models.generation import stream
from alter_demo.models.loading import INTERRUPT

TEXT = "What colour has the door of house 3? Smørrebrød 🙂"
QUESTION = "What colour has the door of house 3?"


@pytest.fixture(scope="module")
def own_set(tmp_path_factory):
    """A forget set with two everyday prompts, whose answers go into a cache of its own."""
    general, general_held_out = [Example("Hello!", "")], [Example("How are you?", "")]
    retain, neighbours = OWN_RETAIN[::2], OWN_RETAIN[1::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("alter_demo.models.knowledge.BASE_ANSWER_TOKENS", 6)
        yield ForgetSet(
            "own", OWN_FORGET, retain, general, OWN_FORGET, neighbours, general_held_out
        )


@pytest.fixture(scope="module")
def run(tiny, own_set):
    """One run for all tests, which only read it."""
    config = quick_config(n_experts=2, threshold="auto", lr_b=0.05)
    return unlearn(str(tiny), own_set, config)


def test_traces_of_a_text(run, tiny):
    traces = run.trace_tokens(TEXT)
    assert {i for t in traces for i in range(t.start, t.end)} == set(range(len(TEXT)))
    # whole words, without the emoji and the first word, which nothing predicts
    assert [word for word, _, _ in words(traces)] == TEXT.replace("?", "").split()[1:-1]
    assert traces[0].log_prob is None
    assert all(t.log_prob < 0 and t.log_prob_after < 0 for t in traces[1:])
    config = run.router.config
    for t in traces:
        assert (t.route == "A") == (t.entropy > config.threshold)
        assert len(t.weights) == 1 + config.n_experts
        assert abs(sum(t.weights[1:]) - 1) < 1e-3 or not any(t.weights)
    ids = torch.tensor([run.lm.tokenizer(TEXT).input_ids])
    logits = load_model(str(tiny)).model(ids).logits[0].float()
    best = logits.softmax(-1)[4].max().item()
    assert traces[4].top[0][1] == pytest.approx(best, abs=1e-4)
    for q, entropy in zip(QS, traces[4].entropies, strict=True):
        assert entropy == pytest.approx(tsallis_entropy(logits[4], q).item(), abs=1e-3)
    with pytest.raises(UserError, match="text is empty"):
        run.trace_tokens("   ")
    with pytest.raises(UserError, match="at most 4096 tokens"):
        run.trace_tokens("word " * 5000)


def test_change_is_zero_exactly_where_no_expert_acts(run):
    traces = run.trace_tokens("colour door", question=QUESTION)
    assert any(t.special for t in traces)
    assert [word for word, _, _ in words(traces)] == ["colour", "door"]
    assert "house" in "".join(t.token for t in traces if t.in_question)
    acting = [any(t.weights) for t in traces]
    assert any(acting)
    first = acting.index(True)
    assert all(t.change == pytest.approx(0, abs=1e-6) for t in traces[:first])
    assert max(t.change for t in traces[first:]) > 1e-3
    for t in traces:
        if any(t.weights[1:]):
            assert t.weights[t.expert] == max(t.weights[1:])
        else:
            assert t.expert == 0
        token, p = t.top[0]
        # one token's part of the total variation
        assert 0.5 * abs(p - dict(t.top_after).get(token, 0)) <= t.change + 1e-4


def test_a_method_without_a_router_has_no_weights(tiny, own_set):
    run = unlearn(str(tiny), own_set, quick_config("lora"))
    traces = run.trace_tokens(TEXT)
    assert all(t.weights == [] and t.expert == 0 for t in traces)
    assert max(t.change for t in traces) > 0


def trace(token, entropy=0.0, expert=0, special=False):
    return TokenTrace(
        token, 1, special, 0, 0, entropy, [], "B", expert, [], None, None, [], [], 0.0
    )


def test_words_are_whole():
    pieces = ["<s>", "Hog", "warts", ",", " don", "'t", " \n", "(", "Ron", " We", "asley", "!)"]
    pieces += [" 9", "¾"]
    traces = [trace(p, entropy=float(i), special=p == "<s>") for i, p in enumerate(pieces)]
    whole = words(traces)
    assert [word for word, _, _ in whole] == ["Hogwarts", "don't", "Ron", "Weasley", "9¾"]
    # the predictions that the words come from
    assert whole[0][1] is traces[0] and whole[1][1] is traces[3]
    assert [t.token for t in whole[0][2]] == ["Hog", "warts"]


def test_words_count_for_the_expert_that_acts():
    idle = replace(trace("x"), weights=[0.0, 0.0])
    acting = replace(trace("x", expert=1), weights=[1.0, 0.7])
    names = [expert_name(t) for t in (idle, acting, trace("x"))]
    assert names == ["none", "B_f1", "B_r"]
    routed = [("the", 2.0, "B_f1"), ("the", 2.0, "B_f1"), ("Ron", 0.1, "B_f2")]
    routed += [("and", 0.1, "B_r"), ("or", 2.0, "none")]
    assert word_counts(routed, 1.0) == {
        "A": {"the": 2},
        "B_f2": {"Ron": 1},
        "B_r": {"and": 1},
        "none": {"or": 1},
    }
    assert word_counts(routed, 3.0)["B_f1"] == {"the": 2}


def test_the_xray_has_the_runs_own_order(run):
    traces = run.trace_tokens(TEXT)
    for q, place in ((1.5, 4), (1.3, 4), (3.0, len(QS))):
        data = xray_data(traces, replace(run.router.config, q=q, threshold=0.3))
        assert data["qs"][place] == data["q"] == q
        assert len(data["qs"]) == len(data["tokens"][0]["S"])
        entropy = round(traces[3].entropy, 4) if q != 1.5 else traces[3].entropies[4]
        assert data["tokens"][3]["S"][place] == entropy


def test_the_saved_xray_keeps_hostile_text_as_data(run):
    hostile = "</script><script>window.hacked=1</script> ${7*7}"
    html = xray_html(xray_data(run.trace_tokens(hostile), run.router.config), "<b>title</b>")
    assert html.count("</script>") == 1 and "<b>" not in html and "\\u003c" in html
    assert "default-src 'none'" in html


def test_streamed_answers_equal_generated_ones(run):
    lms = [run.lm, run.lm]
    *_, last = stream(lms, [lambda: run.side(False), lambda: run.side(True)], QUESTION, 12)
    assert last == [run.generate([QUESTION], adapted, 12)[0] for adapted in (False, True)]
    # equal models draw equal tokens from the same noise; another seed draws others
    same = [lambda: run.side(True), lambda: run.side(True)]
    drawn = {seed: list(stream(lms, same, QUESTION, 12, 1.0, seed))[-1] for seed in (0, 1)}
    assert drawn[0][0] == drawn[0][1] and drawn[0] != drawn[1]


def test_a_closed_tab_stops_the_model(run):
    INTERRUPT.set()
    try:
        with pytest.raises(Interrupted):
            run.generate(["What colour?"])
    finally:
        INTERRUPT.clear()
    assert len(run.generate(["What colour?"], max_new_tokens=4)) == 1
