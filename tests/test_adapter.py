"""What the adapter promises, on tiny random Llama, Mistral, Qwen2 and GPT-2 (Conv1D) models."""

import copy

import pytest
import torch
from conftest import SMALL, VOCAB, make_model
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

from alter_demo.alter.experts import AlterLinear, ExpertDelta
from alter_demo.alter.routing import RoutingPlan
from alter_demo.alter.tuner import AlterConfig, routing_state
from alter_demo.errors import UserError
from alter_demo.models.generation import generated
from alter_demo.models.loading import LM

GENERATE = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def adapted(model, gate="bank", trained=True, **kwargs):
    # S_q of a random model is about 1.79 everywhere: a threshold amid gives both routes
    options = {"bank_dim": 8, "bank_forget": 5, "bank_retain": 7, "answer_marker": [7, 8]}
    config = AlterConfig(n_experts=3, threshold=1.7957, gate=gate, **options, **kwargs)
    model = get_peft_model(model, config).eval()
    if trained:
        torch.manual_seed(5)
        for name, p in model.named_parameters():
            if "alter_B" in name or "alter_gate" in name:
                torch.nn.init.normal_(p, std=0.3)
            if "token_weights" in name:
                p.abs_().add_(3)
    return model


@pytest.mark.parametrize("gate", ["bank", "softmax"])
def test_adapted_equals_base_before_training(any_model, batch, gate):
    base = any_model(**batch).logits
    model = adapted(any_model, gate, trained=False)
    routing_state(model).force = 1  # even with an expert forced on every token
    # GPT-2's Conv1D is an addmm, whose last bit once in a while depends on where its memory lies
    last_bit = 1e-6 if any_model.config.model_type == "gpt2" else 0
    assert torch.allclose(model(**batch).logits, base, rtol=0, atol=last_bit)


@pytest.mark.parametrize("gate", ["bank", "softmax"])
def test_generation_cached_equals_uncached_and_batched_equals_single(any_model, batch, gate):
    model = adapted(any_model, gate)
    plans = model(**batch).logits, routing_state(model).last_plan
    assert (
        plans[1].weights[..., 1:].any()
        and plans[1].high_entropy.any()
        and not plans[1].high_entropy.all()
    )
    cached = model.generate(**batch, **GENERATE)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **GENERATE))
    for i, ids in enumerate(batch["input_ids"]):
        own = ids[batch["attention_mask"][i].bool()][None]
        single = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **GENERATE)
        assert torch.equal(single[0, own.shape[1] :], cached[i, 12:])


@torch.no_grad()
@pytest.mark.parametrize("gate", ["bank", "softmax"])
def test_a_loop_that_lets_the_model_make_its_cache(any_model, gate):
    model, ids = adapted(any_model, gate), torch.arange(3, 15)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    out = model(input_ids=ids[:, :4])
    steps = [out.logits]
    for t in range(4, 12):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values)
        steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


def test_beams_move_both_caches(any_model, batch):
    model = adapted(any_model)
    beams = GENERATE | {"num_beams": 3}
    assert torch.equal(
        model.generate(**batch, **beams), model.generate(**batch, use_cache=False, **beams)
    )


def test_frozen_answer_is_reused_until_an_expert_acts(batch):
    model = adapted(make_model("llama"))
    router, calls = model.get_base_model().token_router, []
    body = model.get_base_model().model
    body.register_forward_hook(lambda *_: calls.append(1))
    router.config.gate_threshold = 50.0  # shut: one pass a token, and the base model's own answer
    ours = model.generate(**batch, **GENERATE)
    assert len(calls) == 12
    with model.disable_adapter():
        assert torch.equal(ours, model.generate(**batch, **GENERATE))
    router.config.gate_threshold = -1e4
    router.alter_gate_forget["default"].zero_()
    router.alter_gate_retain["default"].zero_()
    router.alter_gate["default"].zero_()[0, -1] = -50.0  # not r, in both windows
    calls.clear()
    model.generate(**batch, **GENERATE)
    assert len(calls) == 24


def test_a_sliding_window_that_nothing_leaves_costs_no_second_pass(tiny):
    """Zephyr's config has one; `generate` would make a cache of it that can't be taken back."""
    config = MistralConfig(**SMALL, vocab_size=VOCAB, sliding_window=64)
    base, calls = AutoModelForCausalLM.from_config(config).eval(), []
    model = adapted(base)
    gate = model.get_base_model().token_router.alter_gate["default"]
    gate.zero_()
    gate[0, -1] = 50.0  # r everywhere
    base.model.register_forward_hook(lambda *_: calls.append(1))
    lm = LM(base, AutoTokenizer.from_pretrained(tiny), "m", "cpu", "float32")
    generated(lm, [[3, 4, 5]], model, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(calls) == 6


@pytest.mark.parametrize("gate", ["bank", "softmax"])
def test_save_and_load_give_the_same_logits(any_model, batch, gate, tmp_path):
    fresh = copy.deepcopy(any_model)
    model = adapted(any_model, gate)
    ours = model(**batch).logits
    model.save_pretrained(tmp_path / "a")
    for name in ("default", "other"):
        again = PeftModel.from_pretrained(
            copy.deepcopy(fresh), tmp_path / "a", adapter_name=name
        ).eval()
        assert torch.equal(again(**batch).logits, ours)
    inside = copy.deepcopy(fresh)
    inside.load_adapter(str(tmp_path / "a"))
    assert torch.equal(inside.eval()(**batch).logits, ours)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, ours)
    assert torch.equal(model.unload()(**batch).logits, fresh(**batch).logits)


def test_auto_class_and_a_second_adapter(batch, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    model = adapted(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    ours = model(**batch).logits
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a").eval()(**batch).logits, ours
    )
    model.add_adapter("second", AlterConfig(n_experts=2, threshold=1.79))
    model.set_adapter("second")
    with model.disable_adapter():
        base = model(**batch).logits
    assert torch.equal(model(**batch).logits, base)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, ours)
    model.delete_adapter("second")
    assert torch.equal(model(**batch).logits, ours)


def test_cannot_be_merged():
    model = adapted(make_model("llama"))
    with pytest.raises(NotImplementedError, match="per token"):
        model.merge_and_unload()


def test_expert_delta_is_the_formula_and_its_gradients_are_autograds():
    torch.manual_seed(0)
    x, a, b, w = torch.randn(6, 5), torch.randn(2, 5), torch.randn(3, 4, 2), torch.rand(6, 3)
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    plain = torch.einsum("ne,eor,nr->no", w.double(), leaves[2], leaves[0] @ leaves[1].T)
    grads = torch.autograd.grad(plain.square().sum(), leaves)
    ours = ExpertDelta.apply(*leaves, w.double(), None, None)
    assert torch.allclose(ours, plain)
    for g, h in zip(torch.autograd.grad(ours.square().sum(), leaves), grads, strict=True):
        assert torch.allclose(g, h)


def gradients(labels, high, trained=True):
    """Gradients of A (r, in) and B (4, out, r) of every layer for these labels and this mask."""
    model = adapted(make_model("llama"), trained=trained).train()
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (len(labels), 8))
    weights = (
        torch.rand(len(labels), 8, 4) + 0.1
    )  # every expert acts everywhere: only isolation can keep one out
    plan = RoutingPlan(weights, high, torch.zeros(len(labels), 8), weights).isolate_gradients(
        torch.tensor(labels)
    )
    routing_state(model).plan = plan
    model(input_ids=ids).logits.logsumexp(-1).mean().backward()
    layers = [m for m in model.modules() if isinstance(m, AlterLinear)]
    return [(m.alter_A["default"].grad, m.alter_B["default"].grad) for m in layers]


def zero(tensors):
    return all(t is None or not t.any() for t in tensors)


def test_experts_learn_only_from_their_own_sub_domain():
    for label, owner in ((1, 1), (2, 2), (3, 3), (0, 0)):
        grads = gradients([label, label], torch.zeros(2, 8, dtype=torch.bool))
        for expert in range(4):
            part = [b[expert] for _, b in grads]
            assert zero(part) == (expert != owner), (label, expert)
            if expert == owner:
                assert all(p.any() for p in part[:-1])


def test_a_learns_only_from_uncertain_positions():
    assert zero([a for a, _ in gradients([1, 0], torch.zeros(2, 8, dtype=torch.bool))])
    some = gradients([1, 0], torch.ones(2, 8, dtype=torch.bool))
    assert not zero([a for a, _ in some])


def test_forgetting_experts_ignore_uncertain_positions_but_b_r_does_not():
    grads = gradients([1, 2, 0], torch.ones(3, 8, dtype=torch.bool))
    assert zero([b[1:] for _, b in grads])
    assert not zero([b[0] for _, b in grads])


def test_weight_gradients_are_those_of_the_allowed_positions_alone():
    # one layer in isolation: masking equals leaving the other positions out of the weight gradient
    torch.manual_seed(0)
    x, a, b, w = torch.randn(6, 5), torch.randn(2, 5), torch.randn(3, 4, 2), torch.rand(6, 3)
    on = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    a1, b1 = a.clone().requires_grad_(), b.clone().requires_grad_()
    dy = torch.randn(6, 4)
    y = ExpertDelta.apply(x, a1, b1, w, on[:, None], on[:, None].expand(-1, 3))
    y.backward(dy)
    a2, b2 = a.clone().requires_grad_(), b.clone().requires_grad_()
    ExpertDelta.apply(x[on], a2, b2, w[on], None, None).backward(dy[on])
    assert torch.allclose(a1.grad, a2.grad, atol=1e-6) and torch.allclose(
        b1.grad, b2.grad, atol=1e-6
    )


def test_input_gradient_flows_through_masked_positions():
    x = torch.randn(4, 5, requires_grad=True)
    nothing = torch.zeros(4, 1).bool()
    y = ExpertDelta.apply(
        x, torch.randn(2, 5), torch.randn(3, 4, 2), torch.rand(4, 3), nothing, nothing.expand(-1, 3)
    )
    y.sum().backward()
    assert x.grad.any(-1).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_still_trains_the_adapter(reentrant):
    def run(checkpointing):
        model = adapted(make_model("llama")).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        torch.manual_seed(2)
        ids = torch.randint(3, 97, (2, 8))
        w = torch.rand(2, 8, 4)
        high = torch.rand(2, 8) > 0.5
        routing_state(model).plan = RoutingPlan(w, high, torch.zeros(2, 8), w).isolate_gradients(
            torch.tensor([1, 0])
        )
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if "alter_A" in n or "alter_B" in n}

    plain, checkpointed = run(False), run(True)
    assert all(
        g is not None and torch.allclose(g, plain[n], atol=1e-6) for n, g in checkpointed.items()
    )
    assert sum(bool(g.any()) for g in checkpointed.values()) > 30


def test_bfloat16_base_keeps_float32_adapters(batch):
    model = adapted(make_model("llama").bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if "alter_" in n} == {torch.float32}
    assert model(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "bad", [{"r": 0}, {"r": 999}, {"n_experts": 0}, {"n_experts": 9}, {"gate": "soft"}]
)
def test_bad_config(bad):
    with pytest.raises(UserError):
        AlterConfig(**bad)
    with pytest.raises(UserError, match="threshold"):
        AlterConfig(q=2.0, threshold=1.2)


def test_only_the_experts_are_trainable():
    model = get_peft_model(make_model("llama"), AlterConfig(n_experts=2))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names and all(".alter_A." in n or ".alter_B." in n for n in names)
