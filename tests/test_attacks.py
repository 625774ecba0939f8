"""Attacks on a tiny model: they find what is there, leave the run as it was, and keep their finds with the text."""

from dataclasses import replace

import pytest
import torch
from conftest import OWN_FORGET, OWN_RETAIN, quick

from alter_demo import attacks, data, figures, load_model, report, tables, unlearn
from alter_demo.answers import greedy, sampled
from alter_demo.attacks import AttackConfig
from alter_demo.errors import UserError
from alter_demo.runs import UnlearnConfig

FEW = AttackConfig(items=6, tokens=12, sampled=2, samples=4, steps=(0, 1, 12), lr=5e-3, batch_size=6)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs_of(taught):
    """Unlearned once for each method, on the set that the tiny model was taught."""
    everyday = [data.Item(f"Say {word}.", f"Very well: {word}.") for word in ("hello", "yes", "no", "rain")]
    made = data.ForgetSet("own", OWN_FORGET, OWN_RETAIN, everyday, OWN_FORGET, OWN_RETAIN, everyday)
    known = {}

    def make(method):
        if method not in known:
            lm = load_model(str(taught), dtype="float32")
            values = quick(method, max_steps=30, lr_b=1e-2, lr=1e-2, batch_size=4)
            config = UnlearnConfig(method=method, threshold="auto", n_experts=1)
            known[method] = unlearn(lm, made, config, values, folder=None, evaluate=False)
        return known[method], made

    return make


def weights(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def test_rounding_is_what_it_says():
    w = torch.tensor([[0.0, 7.0, -3.4, 3.6]])
    assert attacks.round_trip(w, 4, 4).tolist() == [[0.0, 7.0, -3.0, 4.0]]  # 15 values from -7 to 7
    torch.manual_seed(0)
    w = torch.randn(5, 150)  # no whole number of groups
    off = {bits: (attacks.round_trip(w, bits) - w).abs().max().item() for bits in (8, 4, 2)}
    assert 0 < off[8] < off[4] < off[2]
    assert torch.allclose(attacks.round_trip(attacks.round_trip(w, 4), 4), attacks.round_trip(w, 4), atol=1e-6)
    with pytest.raises(UserError, match="2 to 8 bits"), attacks.rounded(torch.nn.Linear(2, 2), 1):
        pass


def test_all_linear_layers_are_rounded_and_come_back(any_model):
    before = {n: p.clone() for n, p in any_model.named_parameters()}
    with attacks.rounded(any_model, 2):
        moved = {n for n, p in any_model.named_parameters() if not torch.equal(p, before[n])}
    assert sum("attn" in n or "mlp" in n for n in moved) >= 12 and not any("emb" in n or "lm_head" in n for n in moved)
    assert all(torch.equal(p, before[n]) for n, p in any_model.named_parameters())
    codes = torch.nn.Linear(2, 2)
    codes.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)  # as in 4 bits
    any_model.more = codes
    with pytest.raises(UserError, match="rounded already"), attacks.rounded(any_model, 4):
        pass


@pytest.mark.parametrize("method", ["alter_selective", "lora", "npo"])
def test_attacks_leave_the_run_as_it_was(runs_of, method):
    run, _made = runs_of(method)
    before, grads = weights(run), {n: p.requires_grad for n, p in run.model.named_parameters()}
    with attacks.rounded(run.model, 4) as model:
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and not any(x in n for n in changed for x in ("lora_", "alter_", "embed", "lm_head"))
    curve = attacks.relearn(run, OWN_FORGET[:6], OWN_FORGET[:6], FEW)
    assert [p["step"] for p in curve] == [0, 1, 12]
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5  # it learns again
    after = weights(run)
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert {n: p.requires_grad for n, p in run.model.named_parameters()} == grads


def test_what_comes_back_and_what_does_not(runs_of):
    run, made = runs_of("alter_selective")
    found = attacks.attack(run, made, FEW)
    assert set(found) == {
        "before", *attacks.PROMPTS, "prefix_forced", "sampled", "int8", "int4", "adapter_removed", "relearning",
    }  # fmt: skip
    assert found["before"]["leaked"] > 0.8 and found["asked"]["leaked"] < 0.2
    assert found["adapter_removed"]["rouge_l"] == found["before"]["rouge_l"]  # everything
    assert set(found["relearning"]) == {"forget", "half", "unrelated"}
    figures = attacks.flat(found)
    assert figures["relearn_forget_12_ROUGE"] > figures["relearn_forget_0_ROUGE"]
    assert all(isinstance(v, float) for v in figures.values())
    # a forced beginning is not counted as said: what is said goes on from it
    question, tokenizer = OWN_FORGET[0].question, run.lm.tokenizer
    begun = torch.tensor([[*data.render_prompt(tokenizer, question), *tokenizer("The door is").input_ids]])
    whole = run.model.generate(
        input_ids=begun, attention_mask=torch.ones_like(begun), max_new_tokens=6, do_sample=False
    )
    tail = tokenizer.decode(whole[0, begun.shape[1] :], skip_special_tokens=True)
    assert greedy(run.lm, [question], 6, run.model, leads=["The door is"]) == [tail.strip()]


def test_the_report_shows_every_attack(runs_of):
    run, made = runs_of("alter_selective")
    found = attacks.attack(run, made, replace(FEW, steps=(0, 10)))
    asked = {"forget": "own", "model": "smollm2-135m", "limit": 40, "kept": 20, "tokens": 64}
    entry = {
        "id": "1", "method": "alter_selective", "seed": 0, "metrics": attacks.flat(found), "hardware": "a CPU",
        "config": asked | {"overrides": {"attack": {"items": 4}}}, "leaks": attacks.leaks(found),
    }  # fmt: skip
    results = {"runs": [entry, entry | {"method": "npo", "seed": 1}]}
    tried = entry["config"] | {"overrides": {"attack": {"items": 4}, "r": 32}}  # stands beside, in no table
    results["runs"].append(entry | {"config": tried, "metrics": {}, "leaks": entry["leaks"] * 9})
    table = tables.attacked(results)
    assert table.loc["alter_selective"].notna().all() and table.shape == (2, len(tables.ATTACKS) + 1)
    shown = report.table_of(results)
    assert shown.count("\n") == 5 and not report.is_tuning(results)
    assert f"{2 * len(entry['leaks'])} leaks" in shown
    assert [list(line.x) for line in figures.relearning(results).data] == [[0, 10], [0, 10]]
    (command,) = report.commands_of(results, "a")
    assert command.endswith("--methods alter_selective npo --seeds 0 1 --items 4 --results assets/results/a.json")
    assert all(x["said"] and x["prompt"] and x["attack"] for x in entry["leaks"])
    with pytest.raises(UserError, match="no attacks"):
        tables.attacked({"runs": [entry | {"config": {"overrides": {}}}]})


def test_a_leak_is_kept_with_its_text(runs_of):
    run, _made = runs_of("alter_selective")
    questions = [i.question for i in OWN_FORGET[:4]]
    with run.side(False) as model:
        said = greedy(run.lm, questions, 12, model)
    found = attacks.judged(OWN_FORGET[:4], questions, said)
    assert found["leaked"] == 1 and [x["said"] for x in found["leaks"]] == said
    assert attacks.judged(OWN_FORGET[:4], questions, ["no"] * 4)["leaks"] == []


def test_samples_differ_and_come_back_with_the_seed(tiny):
    lm = load_model(str(tiny), dtype="float32")
    drawn = sampled(lm, ["Hello!", "And?"], 5, 8, seed=1)
    assert [len(x) for x in drawn] == [5, 5] and len(set(drawn[0])) > 1
    assert drawn == sampled(lm, ["Hello!", "And?"], 5, 8, seed=1) != sampled(lm, ["Hello!", "And?"], 5, 8, seed=2)


def test_facts_are_found_by_keyword_or_by_words():
    item = data.Item("Which school?", "Hogwarts", keywords=["hogwarts"])
    assert attacks.holds_the_fact("It is Hogwarts School.", item) and not attacks.holds_the_fact("Eton", item)
    item = data.Item("Where?", "She lives in a small house by the sea.")
    assert attacks.holds_the_fact("She lives in a small house by the sea", item)
    assert not attacks.holds_the_fact("She lives in a castle", item)
    assert attacks.opening(item) == "She lives in" and attacks.opening(data.Item("", "Ron")) == "The answer is"


def test_text_only_sets_are_refused(runs_of):
    run, _made = runs_of("alter_selective")
    with pytest.raises(UserError, match="questions"):
        attacks.attack(run, data.ForgetSet("t", [data.Item("", "text")], [], [], [], [], []), FEW)
