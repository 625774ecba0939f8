"""On a GPU: check ALTER against the CPU, measure its cost, and print a short table.

    python tests/gpu.py --results bench.json    # checks, then a 7B and an 8B shape, bf16 and 4-bit
    python tests/gpu.py --results bench.json --unlearn    # and unlearning with the built-in model

The suite needs no GPU and does not call this.
"""

import argparse
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from alter_demo.alter.entropy import tsallis_entropy
from alter_demo.alter.experts import ExpertDelta
from alter_demo.alter.routing import RoutingPlan
from alter_demo.alter.tuner import AlterConfig, routing_state
from alter_demo.experiments.speed import SHAPES, bench, load, make_step, store

SHALLOW = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, in float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def expert_delta(
    n: int = 768, width: int = 4096, rank: int = 8, experts: int = 4
) -> dict[str, float]:
    """Forward and gradients of `ExpertDelta` in float32 and bfloat16, beside float64 on the CPU."""
    torch.manual_seed(0)
    drawn = [
        torch.randn(n, width),
        torch.randn(rank, width) / width**0.5,
        torch.randn(experts, width, rank),
    ]
    weights, learn = (
        torch.rand(n, experts).softmax(-1),
        [torch.rand(n, 1) > 0.5, torch.rand(n, experts) > 0.5],
    )
    out_gradient = torch.randn(n, width)

    def run(device, dtype):
        x, a, b = (t.to(device, dtype, copy=True).requires_grad_() for t in drawn)
        y = ExpertDelta.apply(x, a, b, weights.to(device, dtype), *(m.to(device) for m in learn))
        y.backward(out_gradient.to(device, dtype))
        return y, x.grad, a.grad, b.grad

    right = run("cpu", torch.float64)
    return {
        f"ExpertDelta, {str(dtype)[6:]}": max(map(error, run("cuda", dtype), right))
        for dtype in (torch.float32, torch.bfloat16)
    }


def whole_model() -> dict[str, float]:
    """Logits, S_q and the gradients of A and B of a small Llama with ALTER, float32 on both."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, num_key_value_heads=4, **SHALLOW)
    model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, AlterConfig(n_experts=3, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "alter_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids, high = torch.randint(5, 999, (4, 48)), torch.rand(4, 48) > 0.7
    weights = torch.rand(4, 48, 4).softmax(-1)
    domain = torch.tensor([1, 2, 3, 0])

    def run(device):
        own = adapted.to(device)
        own.zero_grad()
        plan = RoutingPlan(weights, high, torch.zeros(4, 48), weights)
        parts = (plan.weights, plan.high_entropy, plan.entropy, plan.gate)
        plan = RoutingPlan(*(part.to(device) for part in parts))
        routing_state(own).plan = plan.isolate_gradients(domain.to(device))
        logits = own(input_ids=ids.to(device)).logits
        logits.log_softmax(-1)[..., 7].mean().backward()
        gradients = {
            kind: torch.cat(
                [p.grad.flatten().cpu().clone() for n, p in own.named_parameters() if kind in n]
            )
            for kind in ("alter_A", "alter_B")
        }
        return {
            "logits": logits.detach().cpu(),
            "S_q": tsallis_entropy(logits.detach(), 1.5).cpu(),
            **gradients,
        }

    right, found = run("cpu"), run("cuda")
    return {f"small Llama, {name}": error(found[name], right[name]) for name in right}


def four_bit_learns() -> dict[str, float]:
    """Two steps over NF4 weights: B, which starts at zero, is finite and not zero afterwards."""
    SHAPES["shallow"] = LlamaConfig(vocab_size=1000, num_key_value_heads=4, **SHALLOW)
    lm = load("shallow", "cuda", "bfloat16", load_in_4bit=True)
    step = make_step(lm, "alter")
    step(), step()
    moved = sum(float(p.detach().norm()) for n, p in lm.model.named_parameters() if "alter_B" in n)
    assert 0 < moved < float("inf"), f"after two steps over 4-bit weights the norm of B is {moved}"
    return {}


def unlearn_built_in() -> dict[str, str]:
    """The default run on Harry Potter, whole: seconds, and what is left and kept."""
    from alter_demo import unlearn

    started = time.perf_counter()
    run = unlearn("smollm2-135m", "harry-potter")
    m, shown = run.evaluate(), {}
    whole = time.perf_counter() - started
    for group in ("forget_held_out", "neighbours", "general"):
        before, after = (m[side][group]["probability"] for side in ("before", "after"))
        shown[f"{group.replace('_', ' ')}: probability"] = f"{before:.4f} -> {after:.4f}"
    held_out = (
        m["after"]["forget_held_out"]["probability"] / m["before"]["forget_held_out"]["probability"]
    )
    assert held_out < 0.05, f"{held_out:.0%} of the probability is left on the held-out questions"
    seconds = f"{m['seconds']['unlearn']} s, with measuring {whole:.0f} s"
    return {
        "unlearning Harry Potter": f"{m['steps']} steps in {seconds}, {m['peak_memory_mb']} MB"
    } | shown


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--results", type=Path, required=True)
    options.add_argument("--models", nargs="*", default=[*SHAPES])
    options.add_argument("--unlearn", action="store_true")
    args = options.parse_args()
    rows: dict[str, str] = {}
    limits = {"bfloat16": 2e-2}  # of the arithmetic; float32 lies far below a thousandth
    for name, off in (expert_delta() | whole_model() | four_bit_learns()).items():
        rows[name] = f"off by {off:.1e}"
        assert off < limits.get(name.split(", ")[1], 1e-3), (name, off)
    for model in args.models:
        for load_in_4bit in (False, True):
            started = time.perf_counter()
            found = bench(model, 10, "cuda", "bfloat16", load_in_4bit=load_in_4bit)
            store(found, args.results)
            step, peak, ratio = found["step_seconds"], found["peak_memory_mb"], found["ratio"]
            seconds = time.perf_counter() - started
            rows[f"{model}, {'4-bit' if load_in_4bit else 'bf16'}"] = (
                f"step {step['alter']} s, LoRA {step['lora']} s ({ratio['alter_over_lora']}); "
                f"{peak['alter']} MB, {peak['lora']} MB; a token takes "
                f"{ratio['generate_over_base']} of the base model's time where experts act, "
                f"{ratio['generate_over_base_elsewhere']} elsewhere ({seconds:.0f} s)"
            )
            print(list(rows.items())[-1], flush=True)
    if args.unlearn:
        rows |= unlearn_built_in()
    width = max(map(len, rows))
    print(torch.cuda.get_device_name(), torch.__version__)
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
