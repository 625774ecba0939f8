"""Attacks on a tiny model: they find what is there, leave the run as it was, and keep the texts."""

import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN, quick_config

from alter_demo import load_model, unlearn
from alter_demo.data.rendering import render_prompt
from alter_demo.data.schema import Example, ForgetSet
from alter_demo.errors import UserError
from alter_demo.experiments import attacks
from alter_demo.experiments.attacks import AttackConfig
from alter_demo.models.generation import greedy, sampled

FEW = AttackConfig(
    items=6, tokens=12, sampled=2, samples=4, steps=(0, 1, 12), lr=5e-3, batch_size=6
)
OPENING = "The door is"


@pytest.fixture(scope="module")
def forget_set():
    """What the tiny model was taught."""
    words = ("hello", "yes", "no", "rain")
    everyday = [Example(f"Say {word}.", f"Very well: {word}.") for word in words]
    return ForgetSet("own", OWN_FORGET, OWN_RETAIN, everyday, OWN_FORGET, OWN_RETAIN, everyday)


@pytest.fixture(scope="module")
def run_of(taught, few, forget_set):
    """A function that unlearns with a method, once for all tests."""
    runs = {}

    def run(method):
        if method not in runs:
            values = {"max_steps": 30, "lr_b": 1e-2, "lr": 1e-2, "batch_size": 4, "n_experts": 1}
            lm = load_model(str(taught), dtype="float32")
            runs[method] = unlearn(lm, forget_set, quick_config(method, **values))
        return runs[method]

    return run


@pytest.fixture(scope="module")
def found(run_of, forget_set):
    """What all attacks together find in a run of alter_selective."""
    return attacks.attack(run_of("alter_selective"), forget_set, FEW)


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def test_rounding_is_to_the_nearest_value():
    w = torch.tensor([[0.0, 7.0, -3.4, 3.6]])
    rounded = attacks.fake_quantize(w, 4, 4)
    assert rounded.tolist() == [[0.0, 7.0, -3.0, 4.0]]  # 15 values from -7 to 7
    torch.manual_seed(0)
    w = torch.randn(5, 150)  # no whole number of groups
    errors = {b: (attacks.fake_quantize(w, b) - w).abs().max().item() for b in (8, 4, 2)}
    assert 0 < errors[8] < errors[4] < errors[2]
    once = attacks.fake_quantize(w, 4)
    assert torch.allclose(attacks.fake_quantize(once, 4), once, atol=1e-6)
    with pytest.raises(UserError, match=r"\[2, 8\]"):
        attacks.rounded_weights(torch.nn.Linear(2, 2), 1).__enter__()


def test_all_linear_layers_are_rounded_and_restored(any_model):
    before = {n: p.clone() for n, p in any_model.named_parameters()}
    with attacks.rounded_weights(any_model, 2):
        changed = {n for n, p in any_model.named_parameters() if not torch.equal(p, before[n])}
    assert sum("attn" in n or "mlp" in n for n in changed) >= 12
    assert not any("emb" in n or "lm_head" in n for n in changed)
    assert all(torch.equal(p, before[n]) for n, p in any_model.named_parameters())
    packed = torch.nn.Linear(2, 2)
    codes = torch.zeros(2, 2, dtype=torch.uint8)  # as in 4 bits
    packed.weight = torch.nn.Parameter(codes, requires_grad=False)
    any_model.packed = packed
    with pytest.raises(UserError, match="quantized already"):
        attacks.rounded_weights(any_model, 4).__enter__()


@pytest.mark.parametrize("method", ["alter_selective", "lora", "npo"])
def test_attacks_leave_the_run_as_it_was(run_of, method):
    run = run_of(method)
    before, grads = weights(run), {n: p.requires_grad for n, p in run.model.named_parameters()}
    with attacks.rounded_weights(run.model, 4) as model:
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    kept = ("lora_", "alter_", "embed", "lm_head")
    assert changed and not any(x in n for n in changed for x in kept)
    curve = attacks.relearn(run, OWN_FORGET[:6], OWN_FORGET[:6], FEW)
    assert [point["step"] for point in curve] == [0, 1, 12]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5  # it learns again
    after = weights(run)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert {n: p.requires_grad for n, p in run.model.named_parameters()} == grads


def test_what_comes_back_and_what_does_not(run_of, found):
    run, prompts = run_of("alter_selective"), set(attacks.PROMPTS)
    others = {"before", "prefix_forced", "sampled", "int8", "int4", "adapter_removed"}
    assert set(found) == prompts | others | {"relearning"}
    assert found["before"]["leaked"] > 0.8 and found["asked"]["leaked"] < 0.2
    assert found["adapter_removed"]["rouge_l"] == found["before"]["rouge_l"]  # everything
    assert set(found["relearning"]) == {"forget", "half", "unrelated"}
    # a forced opening is no part of the answer, which continues it
    question, tokenizer = OWN_FORGET[0].question, run.lm.tokenizer
    ids = [*render_prompt(tokenizer, question), *tokenizer(OPENING).input_ids]
    ids = torch.tensor([ids])
    generation = {"max_new_tokens": 6, "do_sample": False}
    whole = run.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **generation)
    tail = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    answers = greedy(run.lm, [question], 6, run.model, answer_prefixes=[OPENING])
    assert answers == [tail.strip()]


def test_a_leak_is_kept_with_its_text(run_of, found):
    run, questions = run_of("alter_selective"), [e.question for e in OWN_FORGET[:4]]
    answers = run.generate(questions, adapted=False, max_new_tokens=12)
    scores = attacks.score_answers(OWN_FORGET[:4], questions, answers)
    assert scores["leaked"] == 1 and [leak["said"] for leak in scores["leaks"]] == answers
    assert attacks.score_answers(OWN_FORGET[:4], questions, ["no"] * 4)["leaks"] == []
    entries = attacks.flatten(found | {"asked": scores})  # as a results file has them
    figures, leaks = entries["metrics"], entries["leaks"]
    assert leaks[:4] == [{"attack": "asked"} | leak for leak in scores["leaks"]]
    assert all(leak["said"] and leak["prompt"] for leak in leaks)
    assert figures["relearn_forget_12_ROUGE"] > figures["relearn_forget_0_ROUGE"]
    assert all(isinstance(v, float) for v in figures.values())
    assert {f"{name}_ROUGE" for name in found if name != "relearning"} < figures.keys()
    assert {"sampled_items_leaked", "int4_Prob", "relearn_half_1_loss"} < figures.keys()


def test_samples_differ_and_return_with_the_seed(run_of):
    lm = run_of("alter_selective").lm
    draw = lambda seed: sampled(lm, ["Hello!", "And?"], 5, 8, seed=seed)  # noqa: E731
    drawn = draw(1)
    assert [len(x) for x in drawn] == [5, 5] and len(set(drawn[0])) > 1
    assert drawn == draw(1) != draw(2)


def test_facts_are_found_by_keyword_or_by_words():
    example = Example("Which school?", "Hogwarts", keywords=["hogwarts"])
    assert attacks.contains_fact("It is Hogwarts School.", example)
    assert not attacks.contains_fact("Eton", example)
    example = Example("Where?", "She lives in a small house by the sea.")
    assert attacks.contains_fact("She lives in a small house by the sea", example)
    assert not attacks.contains_fact("She lives in a castle", example)
    assert attacks.answer_opening(example) == "She lives in"
    assert attacks.answer_opening(Example("", "Ron")) == "The answer is"


def test_plain_texts_have_no_questions_to_ask(run_of):
    texts = ForgetSet("t", [Example("", "text")], [], [], [], [], [])
    with pytest.raises(UserError, match="two questions"):
        attacks.attack(run_of("alter_selective"), texts, FEW)
