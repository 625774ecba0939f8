"""The gate with a bank: when it opens and closes, what the fit stores, and the `gate` command."""

import json

import numpy as np
import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN, quick_config
from safetensors.torch import load_file

from alter_demo.alter import bank_fit
from alter_demo.alter.bank import (
    FLOOR,
    SHUT,
    Bank,
    FrozenTokens,
    GateScores,
    decide,
    gate_scores,
    plan_tokens,
    window_means,
)
from alter_demo.alter.config import AlterConfig
from alter_demo.alter.frozen import frozen_pass, gate_states
from alter_demo.alter.routing import affine
from alter_demo.callbacks import CallbackList
from alter_demo.cli.main import main
from alter_demo.data.built_in import text_forms
from alter_demo.data.rendering import render
from alter_demo.data.schema import Example
from alter_demo.errors import UserError
from alter_demo.experiments.figures import gate_roc
from alter_demo.experiments.gate import open_rates, prepare_gate, read_prompts, score_prompts
from alter_demo.experiments.read_bank import Reading, read_bank, share_read
from alter_demo.experiments.tables import gate_rates
from alter_demo.models.loading import load_model
from alter_demo.run import load_run
from alter_demo.unlearn import unlearn

M, END, OTHER = 90, 91, 5  # the marker's last token, the end of turn, any other token
CONFIG = AlterConfig(gate="bank", answer_marker=[89, M], end_tokens=[END], gate_threshold=0.0)


def scores_of(slow, fast=None):
    slow = torch.tensor([slow], dtype=torch.float)
    fast = slow if fast is None else torch.tensor([fast], dtype=torch.float)
    zero = torch.zeros_like(slow)
    return GateScores(slow, fast, zero, zero.long(), zero, zero.long(), zero)


def opened(ids, slow, fast=None):
    ids = torch.tensor([ids])
    return decide(scores_of(slow, fast), ids, torch.ones_like(ids), CONFIG)[0][0].tolist()


def test_running_text_opens_and_closes_with_its_windows():
    slow, fast = [-1, 1, 1, 1, -1, -1, -1], [1, -1, 1, -1, 1, 1, -1]
    assert opened([OTHER] * 7, slow, fast) == [0, 0, 1, 0, 0, 0, 0]
    assert opened([OTHER] * 7, [-1, 1, -1, -1, -1, -1, -1], fast[::-1]) == [0, 1, 1, 0, 0, 0, 0]


def test_an_answer_stays_as_the_question_decided_and_may_only_open():
    ids = [OTHER, OTHER, 89, M, OTHER, OTHER]
    assert opened(ids, [1, -1, -1, -1, -1, -1]) == [1, 0, 0, 1, 1, 1]
    assert opened(ids, [-1, -1, -1, -1, 1, -1]) == [0, 0, 0, 0, 1, 1]
    assert opened(ids, [-1] * 6) == [0] * 6


def test_the_end_of_an_answer_starts_a_new_turn():
    turn = [OTHER, END, 89, M, OTHER, END]
    first_only = [1, -1, -1, -1, -1, -1] + [-1] * 6
    assert opened(turn * 2, first_only) == [1, 0, 0, 1, 1, 0] + [0] * 6
    # END closes the question too, and must not forget what the question opened
    assert opened(turn * 2, [-1] * 6 + [1] + [-1] * 5) == [0] * 6 + [1, 0, 0, 1, 1, 0]


def random_bank(dim=8, hidden=16):
    torch.manual_seed(0)
    entries = [torch.nn.functional.normalize(torch.randn(n, dim), dim=-1) for n in (6, 9)]
    return Bank(torch.rand(100), torch.randn(dim, hidden + 1) / 4, *entries)


@pytest.mark.parametrize("cuts", [[7], [1, 2, 3], [4, 5, 30]])
def test_pieces_and_left_padding_decide_as_the_whole_text(cuts):
    bank, gate = random_bank(), torch.randn(3, 9) / 3
    ids = torch.randint(1, 80, (2, 40))
    ids[:, 10:12] = torch.tensor([89, M])
    ids[:, 25], ids[:, 31:33] = END, torch.tensor([89, M])
    hidden, entropy = torch.randn(2, 40, 16), torch.rand(2, 40)
    config = AlterConfig(gate="bank", answer_marker=[89, M], end_tokens=[END], n_experts=2)
    config.gate_threshold = 0.3
    mask = torch.ones_like(ids)
    whole, _ = plan_tokens(config, gate, bank, FrozenTokens(hidden, entropy, mask, ids))
    assert whole.scores.opened.any() and not whole.scores.opened.all()
    carry, parts = None, []
    for a, b in zip([0, *cuts], [*cuts, 40], strict=True):
        piece = FrozenTokens(*(x[:, a:b] for x in (hidden, entropy, mask, ids)))
        plan, carry = plan_tokens(config, gate, bank, piece, carry=carry)
        parts.append(plan.scores)
    for name in ("score", "fast", "topic", "forget_similarity", "retain_similarity"):
        joined = torch.cat([getattr(p, name) for p in parts], 1)
        assert torch.allclose(joined, getattr(whole.scores, name), atol=1e-5)
    assert torch.equal(torch.cat([p.opened for p in parts], 1), whole.scores.opened)

    def left(x, value=0):
        return torch.cat([torch.full_like(x[:, :6], value), x], 1)

    # the padding token is the end of turn, as in many tokenizers
    padded = FrozenTokens(left(hidden), left(entropy), left(mask), left(ids, END))
    plan, _ = plan_tokens(config, gate, bank, padded)
    assert torch.allclose(plan.scores.score[:, 6:], whole.scores.score, atol=1e-5)
    assert torch.equal(plan.scores.opened[:, 6:], whole.scores.opened)


def test_the_gate_stays_shut_until_it_has_read_enough():
    bank, gate = random_bank(), torch.zeros(3, 9)
    bank.token_weights[:] = 1.0
    ids = torch.full((1, 6), 7)
    tokens = FrozenTokens(torch.randn(1, 6, 16), torch.rand(1, 6), torch.ones_like(ids), ids)
    means, evidence, _ = window_means(bank.token_weights, tokens)
    contexts = affine(means, bank.projection)
    score = gate_scores(bank, contexts, evidence, gate, min_evidence=2.5).score[0]
    assert (score[:2] == SHUT).all() and (score[2:] > SHUT).all()  # 1, 1.93, 2.79


def test_token_weights_know_nothing_of_the_forget_set(tiny):
    lm = load_model(str(tiny))
    retain = [render(lm.tokenizer, e)[0] for e in OWN_RETAIN]
    weights = bank_fit.token_weights(retain, 600)
    common = set.intersection(*(set(s.ids) for s in retain))
    assert common and all(weights[i] == 0 for i in common)
    used = {i for s in retain for i in s.ids}
    unseen = weights[[i for i in range(600) if i not in used]]
    assert (unseen == unseen[0]).all() and unseen[0] == weights.max()


@pytest.fixture(scope="module")
def fitted(tiny, forget_set):
    lm = load_model(str(tiny))
    return lm, *prepare_gate(lm, forget_set, {}, CallbackList())


def test_what_was_stored_opens_the_gate_and_little_else_does(fitted):
    lm, gate, _ = fitted
    report = gate.report["router"]
    assert report["forget_open_at_answer"] == 1.0
    assert report["stored"] == [len(gate.bank.forget), len(gate.bank.retain)]
    rows = [{"prompt": e.question, "group": "stored"} for e in OWN_FORGET]
    scores = score_prompts(lm, gate, rows)
    assert open_rates(scores)["stored"]["open"] == 1.0
    kept = score_prompts(lm, gate, [{"prompt": e.question, "group": "kept"} for e in OWN_RETAIN])
    assert open_rates(kept)["kept"]["open"] < 0.5  # random states tell little apart
    assert min(s["forget_similarity"] for s in scores) > 0.8
    assert max(s["forget_index"] for s in scores) < len(gate.bank.forget)


def test_rewordings_are_stored_and_not_trained_on(tiny, forget_set):
    lm = load_model(str(tiny))
    plain = prepare_gate(lm, forget_set, {}, CallbackList())[0]
    example = forget_set.forget[0]
    example.rewordings.append("Which paint was used on the entrance of house 0?")
    try:
        more = prepare_gate(lm, forget_set, {}, CallbackList())[0]
    finally:
        example.rewordings.clear()
    assert len(more.bank.forget) == len(plain.bank.forget) + 2  # at two thirds and at the end
    assert len(more.forget) == len(plain.forget)


def test_the_adapter_of_version_0_1_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"version 0\.1"):
        AlterConfig(gate="two_level")


def test_traces_say_why(tiny, forget_set):
    run = unlearn(load_model(str(tiny)), forget_set, quick_config())
    traces = run.trace_tokens("The door is red.", OWN_FORGET[0].question)
    scores = [t.gate["score"] for t in traces]
    threshold = run.router.config.gate_threshold
    assert max(scores) > threshold and traces[-1].gate["forget_index"] >= 0
    assert all(any(t.weights) for t in traces[-4:])  # inside the answer
    names = {"topic", "retain_index", "retain_similarity", "forget_similarity"}
    assert names <= set(traces[0].gate)
    published = unlearn(load_model(str(tiny)), forget_set, quick_config("alter"))
    assert published.trace_tokens("The door is red.")[0].gate is None


def test_the_adapter_keeps_the_bank_in_half_precision_and_decides_the_same(
    tiny, forget_set, tmp_path
):
    run = unlearn(load_model(str(tiny)), forget_set, quick_config())
    path = run.save(tmp_path / "run")
    stored = load_file(path / "adapter" / "adapter_model.safetensors")
    parts = {k: v for k, v in stored.items() if ".alter_gate_" in k}
    assert len(parts) == 4 and {v.dtype for v in parts.values()} == {torch.float16}
    text = "The door is red.", OWN_FORGET[0].question
    gates = [[t.gate for t in r.trace_tokens(*text)] for r in (run, load_run(path))]
    assert gates[0] == gates[1]


@pytest.mark.parametrize(
    "line, message",
    [("", "no prompts"), ("[1]", "line 1"), ('{"prompt": " "}', "line 1"),
     ('{"prompt": "a", "expected": "maybe"}', "open or shut")],
)  # fmt: skip
def test_prompt_files_are_checked(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=message):
        read_prompts(path)
    with pytest.raises(UserError, match="Cannot read"):
        read_prompts(tmp_path / "none.jsonl")


def test_the_gate_command(tiny, own_data, few, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": OWN_FORGET[0].question, "expected": "open", "group": "mine"},
        {"prompt": "Tell me a joke [bold]"},
    ]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = ["--forget", str(own_data[0]), "--retain", str(own_data[1])]
    base = ["gate", "--model", str(tiny), *files, "--prompts", str(prompts)]
    assert main([*base, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rates"]["stored"]["open"] == 1.0
    assert [p["prompt"] for p in result["prompts"]] == [r["prompt"] for r in rows]
    assert result["prompts"][0]["open"] is True and result["prompts"][0]["group"] == "mine"
    assert result["rates"]["mine"]["prompts"] == 1 and "" not in result["rates"]
    stored = ["--results", str(tmp_path / "gate.json"), "--feature-layer", "0"]
    assert main([*base, "--roc", str(tmp_path / "roc.html"), *stored]) == 0
    runs = json.loads((tmp_path / "gate.json").read_text())["runs"]
    assert runs[0]["config"]["feature_layer"] == 0 and runs[0]["metrics"]["stored"] == 1.0
    table = gate_rates({"runs": runs})
    assert table.loc[("stored", "open"), str(own_data[0])].startswith(
        f"100.0% of {len(OWN_FORGET)} "
    )
    assert "[bold]" in capsys.readouterr().out
    assert "AUC" in (tmp_path / "roc.html").read_text()
    with pytest.raises(UserError, match="ROC"):
        gate_roc([{"expected": "open", "score": 1.0}])


def test_what_is_left_out_is_measured_and_not_stored(tiny, forget_set, fitted):
    lm = load_model(str(tiny))
    gate, prompts = prepare_gate(lm, forget_set, {}, CallbackList(), 2)
    left = [p["prompt"] for p in prompts if p["expected"] == "open"]
    assert left == [e.question for e in forget_set.forget][1::2]
    assert [p["prompt"] for p in prompts if p["expected"] == "shut"] == [
        e.question for e in forget_set.retain
    ][1::2]
    assert len(gate.bank.forget) == len(fitted[1].bank.forget) // 2
    with pytest.raises(UserError, match="at least 2 and at most"):
        prepare_gate(lm, forget_set, {}, CallbackList(), 100)


def test_every_retain_question_is_stored_trained_on_or_not(tiny, forget_set):
    lm = load_model(str(tiny))
    values = {"retain": 0, "general": 2}
    gate = prepare_gate(lm, forget_set, values, CallbackList())[0]
    assert gate.report["samples"]["retain"] == 0
    assert len(gate.bank.retain) == 2 * (2 + len(forget_set.retain))


def test_the_lowest_stored_prompt_opens_the_gate_of_a_small_set():
    forget, retain = np.array([0.1, 0.4, 0.4, 0.4]), np.array([SHUT, 0.3, 0.35])
    assert bank_fit.choose_threshold(forget, retain) < 0.1
    assert bank_fit.choose_threshold(forget, np.array([SHUT])) == -FLOOR


def test_forms_of_one_text_are_one_group(tiny):
    lm = load_model(str(tiny))
    text = Example("", " ".join(f"word{i}" for i in range(12)))
    samples = [s for form in text_forms(text) for s in render(lm.tokenizer, form)]
    other = render(lm.tokenizer, OWN_RETAIN[0])
    groups = bank_fit.sample_groups([*samples, *other])
    assert len(samples) == 3 and len(set(groups[:3])) == 1 and groups[3] != groups[0]


def test_autocast_does_not_change_the_decision():
    bank, gate = random_bank(), torch.randn(3, 9)
    config = AlterConfig(gate="bank", answer_marker=[89, M], end_tokens=[END], n_experts=2)
    ids = torch.randint(1, 80, (2, 30))
    tokens = FrozenTokens(torch.randn(2, 30, 16), torch.rand(2, 30), torch.ones_like(ids), ids)
    plain = plan_tokens(config, gate, bank, tokens)[0].scores.score
    with torch.autocast("cpu", torch.bfloat16):
        mixed = plan_tokens(config, gate, bank, tokens)[0].scores.score
    assert torch.equal(plain, mixed)


def test_few_entries_get_few_components():
    """With as many components as rows, all rows would be equally far from each other."""
    x = torch.randn(20, 64)
    projection = bank_fit.whitening(x, 128)
    assert projection.shape == (128, 65)
    kept = projection.abs().sum(1) > 0
    assert kept.sum() == 20 // bank_fit.PER_COMPONENT
    z = affine(x, projection)
    assert torch.allclose(z[:, kept].mean(0), torch.zeros(5), atol=1e-4)
    assert torch.allclose(z[:, kept].var(0, correction=0), torch.ones(5), atol=1e-2)


def test_the_low_pass_gives_the_states_of_the_whole_pass(tiny):
    lm = load_model(str(tiny))
    samples = [render(lm.tokenizer, e)[0] for e in [*OWN_FORGET, *OWN_RETAIN]]
    layers = lm.model.config.num_hidden_layers
    for layer in (0, 1, layers):
        whole = frozen_pass(lm, samples, AlterConfig(feature_layer=layer, gate="bank"))
        low = gate_states(lm, samples, layer)
        pairs = zip(whole, low, strict=True)
        assert all(torch.equal(outputs.hidden, states) for outputs, states in pairs)
    hooks = [dict(m._forward_pre_hooks) for m in lm.model.modules()]
    gate_states(lm, samples, 1)
    assert hooks == [dict(m._forward_pre_hooks) for m in lm.model.modules()]


def test_the_bank_is_read_back_from_a_run(tiny, forget_set, own_data, tmp_path, capsys):
    run = unlearn(load_model(str(tiny)), forget_set, quick_config())
    path = run.save(tmp_path / "run")
    questions, readings = read_bank(run, forget_set, 3, CallbackList())
    assert questions[0] == OWN_FORGET[0].question and len(questions) == len(readings) >= 3
    reading = readings[0]
    assert len(reading.words) == 10 and 0 < reading.cosine <= 1.001
    assert share_read(["Who is Harry Potter?"], [Reading(["Harr", "x"], "", 0)], "words") == 0.5
    files = ["--forget", str(own_data[0])]
    assert main(["bank", str(path), "--number", "1", *files]) == 0
    assert "Of the names" in capsys.readouterr().out
    published = unlearn(load_model(str(tiny)), forget_set, quick_config("alter"))
    with pytest.raises(UserError, match="alter_selective"):
        read_bank(published, forget_set, 1, CallbackList())
