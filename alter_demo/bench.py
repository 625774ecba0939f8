"""What ALTER costs: a training step and a generated token, beside PEFT's LoRA and full fine-tuning.

The three are alternated in one process, since timings on a shared machine drift; medians are reported. Peak memory
is measured in a process of its own for each, since a process never gives its peak back.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from . import losses
from .adapter import AlterConfig
from .models import LM, load_model, peak_mb
from .routing import Plan
from .training import router_state

METHODS = ("alter", "lora", "full")
BATCH, TOKENS, ANSWER, EXPERTS, RANK = 8, 96, 32, 3, 8


def bench(model: str = "smollm2-135m", steps: int = 5, device: str = "auto", dtype: str = "auto", memory=True) -> dict:
    """Returns step_seconds and peak_memory_mb for each of METHODS, ratio, tokens_per_second, hardware, settings.

    A step is forward, backward and AdamW on a batch of 8 x 96 tokens, 32 of them answers, same rank and layers for
    both adapters. `generate_over_base` is the time of a generated token of the adapted model, experts acting on
    every token (the dearest case), over the bare model's.
    """
    lm = load_model(model, device, dtype)
    seconds: dict[str, list[float]] = {m: [] for m in METHODS}
    steppers = {m: make_step(load_model(model, device, dtype), m) for m in METHODS}
    for i in range(steps + 1):  # the first round warms up
        for method in METHODS:
            started = time.perf_counter()
            steppers[method]()
            sync(lm)
            if i:
                seconds[method].append(time.perf_counter() - started)
    del steppers
    gc.collect()
    generation = generation_speed(load_model(model, device, dtype), steps)
    median = {m: statistics.median(s) for m, s in seconds.items()}
    return {
        "step_seconds": {m: round(s, 4) for m, s in median.items()},
        "peak_memory_mb": {m: peak_memory(model, m, device, dtype) for m in METHODS} if memory else {},
        "tokens_per_second": {k: round(v, 2) for k, v in generation.items()},
        "ratio": {
            "alter_over_lora": round(median["alter"] / median["lora"], 3),
            "alter_over_full": round(median["alter"] / median["full"], 3),
            "generate_over_base": round(generation["base"] / generation["alter"], 3),
            "generate_over_base_elsewhere": round(generation["base"] / generation["alter_idle"], 3),
        },
        "settings": {"model": model, "batch": BATCH, "tokens": TOKENS, "answer": ANSWER, "rank": RANK, "steps": steps},
        "hardware": lm.hardware,
    }


def make_step(lm: LM, method: str):
    """A function that does one training step of `method` on random tokens."""
    torch.manual_seed(0)
    if method == "full":
        model = lm.model.train().requires_grad_(True)
    else:
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        config = lora if method == "lora" else AlterConfig(r=RANK, n_experts=EXPERTS, task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    vocab = lm.model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocab - 1, (BATCH, TOKENS), device=lm.device)
    labels = ids[:, -ANSWER:].reshape(-1)
    domain = torch.tensor([1, 1, 2, 3, 0, 0, 0, 0], device=lm.device)
    weights = torch.softmax(torch.randn(BATCH, TOKENS, 1 + EXPERTS, device=lm.device), -1)
    high = torch.rand(BATCH, TOKENS, device=lm.device) > 0.75
    plan = Plan(weights, high, torch.zeros(BATCH, TOKENS, device=lm.device), weights).isolated(domain)

    def step():
        if method == "alter":
            router_state(model).plan = plan
        logits = model(input_ids=ids, logits_to_keep=ANSWER + 1, use_cache=False).logits[:, :-1]
        logits = logits.reshape(-1, logits.shape[-1])
        if method == "alter":
            half = len(labels) // 2
            loss = losses.inverted_hinge_loss(logits[:half], labels[:half]).mean()
            loss = loss + losses.nll(logits[half:], labels[half:]).mean()
        else:
            loss = losses.nll(logits, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sync(lm: LM) -> None:
    if lm.device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def generation_speed(lm: LM, rounds: int, new_tokens: int = 24) -> dict[str, float]:
    """Tokens a second of greedy generation (batch 1, KV cache): bare, adapted where experts act, adapted elsewhere."""
    ids = torch.randint(5, 1000, (1, 48), device=lm.device)
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    model = get_peft_model(lm.model, AlterConfig(n_experts=EXPERTS, task_type="CAUSAL_LM")).eval()
    router = model.get_base_model().token_router
    gate = router.alter_gate["default"]
    seconds = {"base": [], "alter": [], "alter_idle": []}
    for i in range(rounds + 1):
        for kind in seconds:
            router.state.force = "off" if kind == "base" else None
            gate[:, -1] = torch.tensor([0.0, 9, 8, 7] if kind == "alter" else [9.0, 0, 0, 0])
            started = time.perf_counter()
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
            sync(lm)
            if i:
                seconds[kind].append(time.perf_counter() - started)
    return {k: new_tokens / statistics.median(s) for k, s in seconds.items()}


def peak_memory(model: str, method: str, device: str, dtype: str) -> int:
    """Peak memory in MB of a process that does three steps: GPU memory on a GPU, resident memory on a CPU."""
    code = f"from alter_demo.bench import peak; peak({model!r}, {method!r}, {device!r}, {dtype!r})"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def peak(model: str, method: str, device: str, dtype: str) -> None:
    lm = load_model(model, device, dtype)
    step = make_step(lm, method)
    for _ in range(3):
        step()
    print(peak_mb(lm.device))
