"""The cost of ALTER: a training step and a generated token, compared with LoRA and full training.

The methods take turns in one process, since timings on a shared machine drift, and medians are
reported. A process never returns its peak memory, so on a CPU each method's is measured in a
process of its own.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig

from ..alter.config import AlterConfig
from ..alter.losses import inverted_hinge_loss, nll
from ..alter.routing import RoutingPlan
from ..alter.tuner import routing_state
from ..errors import UserError
from ..models import loading
from ..models.memory import peak_mb, require_memory, reset_peak
from .results import add_result

BATCH, TOKENS, ANSWER, EXPERTS, RANK = 8, 96, 32, 3, 8
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
WIDE |= {"num_attention_heads": 32, "num_key_value_heads": 8}
# models whose weights are on the Hub only; random weights do for time and memory
SHAPES = {
    "zephyr-7b": MistralConfig(vocab_size=32000, sliding_window=4096, **WIDE),
    "llama-3-8b": LlamaConfig(vocab_size=128256, rope_theta=500000.0, **WIDE),
}


def bench(
    model="smollm2-135m", steps=5, device="auto", dtype="auto", memory=True, load_in_4bit=False
) -> dict:
    """Measure a training step of each method, and generation with and without ALTER.

    A step is forward, backward and AdamW on 8 x 96 tokens, 32 of them answers. Both adapters have
    the same rank and layers. Full training is left out in 4 bits and for SHAPES.

    Args:
        model: as `load_model` takes it, or one of SHAPES.
        steps: timed steps per method.
        memory: measure the peak memory too.
    Returns:
        step_seconds, peak_memory_mb, tokens_per_second, ratio, settings and hardware. In `ratio`,
        `generate_over_base` is the time per token where experts act on every token.
    """
    device = loading.choose_device(device)
    options = (device, loading.choose_dtype(dtype, device), load_in_4bit)
    methods = ["alter", "lora"] + ([] if model in SHAPES or load_in_4bit else ["full"])
    seconds, peaks = time_steps(model, methods, steps, *options)
    gc.collect()
    lm = load(model, *options)
    speed = generation_speed(lm, steps)
    if memory and not peaks:
        peaks = {m: peak_memory(model, m, *options) for m in methods}
    ratio = {f"alter_over_{m}": seconds["alter"] / seconds[m] for m in methods[1:]}
    ratio["generate_over_base"] = speed["base"] / speed["alter"]
    ratio["generate_over_base_elsewhere"] = speed["base"] / speed["alter_idle"]
    sizes = {"batch": BATCH, "tokens": TOKENS, "answer": ANSWER, "rank": RANK, "steps": steps}
    loaded = {"dtype": lm.dtype, "load_in_4bit": load_in_4bit}
    return {
        "step_seconds": {m: round(s, 4) for m, s in seconds.items()},
        "peak_memory_mb": peaks if memory else {},
        "tokens_per_second": {k: round(v, 2) for k, v in speed.items()},
        "ratio": {k: round(v, 3) for k, v in ratio.items()},
        "settings": {"model": model} | sizes | loaded,
        "hardware": lm.hardware,
    }


def store(result: dict, path: Path, command: str = "") -> dict:
    """Add the result of `bench` to a results file, in place of one on the same hardware."""
    settings, hardware = result["settings"], result["hardware"]
    parts = ("step_seconds", "peak_memory_mb", "tokens_per_second", "ratio")
    metrics = {f"{part}_{k}": v for part in parts for k, v in result[part].items()}
    key = json.dumps([settings, hardware], sort_keys=True)
    entry = {"id": key, "method": "bench", "seed": 0, "command": command, "metrics": metrics}
    return add_result(path, entry | {"config": settings, "hardware": hardware}, "bench")


def load(model: str, device: str, dtype: str, load_in_4bit: bool = False) -> loading.LM:
    """`load_model`, or one of SHAPES with random weights."""
    if model not in SHAPES:
        return loading.load_model(model, device, dtype, load_in_4bit=load_in_4bit)
    shape, torch_dtype = SHAPES[model], getattr(torch, dtype)
    # the weights are packed only after they are drawn
    require_memory(shape, model, device, dtype, load_in_4bit=False)
    with loading.model_errors(model), torch.device(device):
        random_model = AutoModelForCausalLM.from_config(shape, dtype=torch_dtype).eval()
        if load_in_4bit:
            pack(random_model, torch_dtype)
    random_model.get_output_embeddings().register_forward_pre_hook(loading.make_contiguous)
    random_model.requires_grad_(False)
    return loading.LM(random_model, None, model, device, dtype, load_in_4bit=load_in_4bit)


def pack(model, dtype) -> None:
    """Put NF4 weights into all linear layers but the LM head, as transformers does on loading."""
    loading.four_bit_config(dtype)  # raises UserError if bitsandbytes is missing
    import bitsandbytes

    head = model.get_output_embeddings()
    options = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
    weight_options = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            sizes, device = (module.in_features, module.out_features), module.weight.device
            packed = bitsandbytes.nn.Linear4bit(*sizes, bias=False, **options)
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, **weight_options)
            model.set_submodule(name, packed.to(device))
    loading.allow_4bit_gradients(model)
    model.is_loaded_in_4bit = True  # PEFT reads it


def time_steps(model: str, methods, steps: int, *options) -> tuple[dict, dict]:
    """Median seconds of a step of each method; on a GPU also its peak memory in MB."""
    device, peaks, step_of = options[0], {}, {}
    on_gpu = device.startswith("cuda")
    for method in methods:
        gc.collect()  # nothing may be freed while the peak is measured
        before = torch.cuda.memory_allocated() if on_gpu else 0
        step_of[method] = make_step(load(model, *options), method)
        gc.collect()
        reset_peak(device)
        for _ in range(3 if on_gpu else 1):  # warm up
            step_of[method]()
        if on_gpu:
            peaks[method] = peak_mb(device) - before // 2**20
    rows = [{m: time_once(step, device) for m, step in step_of.items()} for _ in range(steps)]
    return pd.DataFrame(rows).median().to_dict(), peaks


def make_step(lm: loading.LM, method: str) -> Callable[[], None]:
    """A function that runs one training step of `method` on random tokens.

    The precision is that of `unlearn`: over bfloat16 weights LoRA runs under autocast, without
    which its products are in float32.
    """
    torch.manual_seed(0)
    if method == "full":
        model = lm.model.train().requires_grad_(True)
    else:
        config = AlterConfig(r=RANK, n_experts=EXPERTS, task_type="CAUSAL_LM")
        if method == "lora":
            scale = {"lora_alpha": 2 * RANK, "target_modules": "all-linear"}
            config = LoraConfig(r=RANK, **scale, task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    vocab_size = lm.model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocab_size - 1, (BATCH, TOKENS), device=lm.device)
    labels = ids[:, -ANSWER:].reshape(-1)
    plan = random_plan(lm.device)
    mixed = lm.dtype == "bfloat16" and method != "alter"

    def step():
        if method == "alter":
            routing_state(model).plan = plan
        with torch.autocast(torch.device(lm.device).type, torch.bfloat16, enabled=mixed):
            logits = model(input_ids=ids, logits_to_keep=ANSWER + 1, use_cache=False).logits
        logits = logits[:, :-1].reshape(-1, logits.shape[-1])
        half = len(labels) // 2 if method == "alter" else 0
        loss = nll(logits[half:], labels[half:]).mean()
        if half:
            loss = loss + inverted_hinge_loss(logits[:half], labels[:half]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def random_plan(device: str) -> RoutingPlan:
    """Four forget and four retain samples with a quarter of uncertain tokens."""
    sub_domains = torch.tensor([1, 1, 2, 3, 0, 0, 0, 0], device=device)
    weights = torch.softmax(torch.randn(BATCH, TOKENS, 1 + EXPERTS, device=device), -1)
    high_entropy = torch.rand(BATCH, TOKENS, device=device) > 0.75
    entropy = torch.zeros(BATCH, TOKENS, device=device)
    return RoutingPlan(weights, high_entropy, entropy, weights).isolate_gradients(sub_domains)


def time_once(action: Callable, device: str) -> float:
    started = time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def generation_speed(lm: loading.LM, rounds: int, new_tokens: int = 24) -> dict[str, float]:
    """Tokens per second of greedy generation (batch 1, KV cache).

    "base": the base model; "alter": experts act on every token; "alter_idle": on none.
    """
    ids = torch.randint(5, 1000, (1, 48), device=lm.device)
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    config = GenerationConfig(**lengths, do_sample=False, pad_token_id=0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = get_peft_model(lm.model, AlterConfig(n_experts=EXPERTS, task_type="CAUSAL_LM")).eval()
    router, rows = model.get_base_model().token_router, []
    bias = router.alter_gate["default"][:, -1]
    for _ in range(rounds + 1):
        rows.append({})
        for kind in ("base", "alter", "alter_idle"):
            router.state.force = "off" if kind == "base" else None
            bias[:] = torch.tensor([0.0, 9, 8, 7] if kind == "alter" else [9.0, 0, 0, 0])
            generate = partial(model.generate, **inputs, generation_config=config)
            rows[-1][kind] = time_once(generate, lm.device)
    return (new_tokens / pd.DataFrame(rows[1:]).median()).to_dict()  # the first one warms up


def peak_memory(*arguments) -> int:
    """Peak memory in MB of a new process that runs `print_peak(*arguments)`."""
    code = f"from {__name__} import print_peak; print_peak{arguments!r}"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["the process was killed"])[-1]
        raise UserError(f"The memory of {arguments[0]} could not be measured: {reason}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def print_peak(model: str, method: str, *options) -> None:
    step = make_step(load(model, *options), method)
    for _ in range(3):
        step()
    print(peak_mb(options[0]))
