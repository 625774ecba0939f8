"""What ALTER costs: a training step and a generated token, beside PEFT's LoRA and full fine-tuning.

The three are alternated in one process, since timings on a shared machine drift; medians are reported. On a CPU peak
memory is measured in a process of its own for each, since a process never gives its peak back.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig

from . import losses
from .adapter import AlterConfig
from .errors import UserError
from .models import (
    LM,
    choose_device,
    choose_dtype,
    contiguous,
    four_bit,
    let_gradients_pass,
    load_model,
    model_errors,
    need_memory,
    peak_mb,
    reset_peak,
)
from .results import put
from .routing import Plan
from .training import router_state

METHODS = ("alter", "lora", "full")
BATCH, TOKENS, ANSWER, EXPERTS, RANK = 8, 96, 32, 3, 8
WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
# large models whose weights need the hub, filled at random: for time and memory alone
SHAPES = {
    "zephyr-7b": MistralConfig(vocab_size=32000, num_key_value_heads=8, sliding_window=4096, **WIDE),
    "llama-3-8b": LlamaConfig(vocab_size=128256, num_key_value_heads=8, rope_theta=500000.0, **WIDE),
}


def bench(
    model: str = "smollm2-135m", steps: int = 5, device: str = "auto", dtype: str = "auto", memory=True,
    load_in_4bit: bool = False,
) -> dict:  # fmt: skip
    """Returns step_seconds and peak_memory_mb for each of METHODS, ratio, tokens_per_second, hardware, settings.

    A step is forward, backward and AdamW on a batch of 8 x 96 tokens, 32 of them answers, same rank and layers for
    both adapters. `generate_over_base` is the time of a generated token of the adapted model, experts acting on
    every token (the dearest case), over the bare model's.

    Args:
        model: as `load_model` takes it, or one of SHAPES; of these, and in 4 bits, all weights are not trained.
    Raises:
        UserError: as `load_model` does.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    methods = METHODS[:2] if model in SHAPES or load_in_4bit else METHODS
    seconds: dict[str, list[float]] = {m: [] for m in methods}
    steppers, peaks, on_gpu = {}, {}, device.startswith("cuda")
    for method in methods:
        gc.collect()  # of what was there before, nothing must go while the peak is watched
        held = torch.cuda.memory_allocated() if on_gpu else 0
        steppers[method] = make_step(load(model, device, dtype, load_in_4bit), method)
        gc.collect()
        reset_peak(device)
        for _ in range(3 if on_gpu else 1):  # the first ones warm up
            steppers[method]()
        if on_gpu:
            peaks[method] = peak_mb(device) - held // 2**20
    for _ in range(steps):
        for method in methods:
            started = time.perf_counter()
            steppers[method]()
            sync(device)
            seconds[method].append(time.perf_counter() - started)
    del steppers
    gc.collect()
    lm = load(model, device, dtype, load_in_4bit)
    generation = generation_speed(lm, steps)
    if memory and not on_gpu:
        peaks = {m: peak_memory(model, m, device, dtype, load_in_4bit) for m in methods}
    median = {m: statistics.median(s) for m, s in seconds.items()}
    return {
        "step_seconds": {m: round(s, 4) for m, s in median.items()},
        "peak_memory_mb": peaks if memory else {},
        "tokens_per_second": {k: round(v, 2) for k, v in generation.items()},
        "ratio": {
            **{f"alter_over_{m}": round(median["alter"] / median[m], 3) for m in methods[1:]},
            "generate_over_base": round(generation["base"] / generation["alter"], 3),
            "generate_over_base_elsewhere": round(generation["base"] / generation["alter_idle"], 3),
        },
        "settings": {
            "model": model, "batch": BATCH, "tokens": TOKENS, "answer": ANSWER, "rank": RANK, "steps": steps,
            "dtype": dtype, "load_in_4bit": load_in_4bit,
        },
        "hardware": lm.hardware,
    }  # fmt: skip


def store(result: dict, path: Path) -> None:
    """Put what `bench` found into a results file, in place of the same measurement on the same hardware."""
    own = json.dumps([result["settings"], result["hardware"]], sort_keys=True)
    parts = ("step_seconds", "peak_memory_mb", "tokens_per_second", "ratio")
    metrics = {f"{part}_{k}": v for part in parts for k, v in result[part].items()}
    entry = {"id": own, "method": "bench", "seed": 0, "metrics": metrics, "config": result["settings"]}
    put(path, entry | {"hardware": result["hardware"]})


def load(model: str, device: str, dtype: str, load_in_4bit: bool = False) -> LM:
    """`load_model`, or one of SHAPES with random weights."""
    if model not in SHAPES:
        return load_model(model, device, dtype, load_in_4bit=load_in_4bit)
    need_memory(SHAPES[model], model, device, dtype, load_in_4bit=False)  # packed only after they are drawn
    with model_errors(model), torch.device(device):
        made = AutoModelForCausalLM.from_config(SHAPES[model], dtype=getattr(torch, dtype)).eval()
        if load_in_4bit:
            pack(made, getattr(torch, dtype))
    made.get_output_embeddings().register_forward_pre_hook(contiguous)
    return LM(made.requires_grad_(False), None, model, device, dtype, in_4bit=load_in_4bit)


def pack(model, dtype) -> None:
    """NF4 in place of the linear layers' weights, as `load_model` gets them from transformers; not of the LM head."""
    four_bit(dtype)  # tells when bitsandbytes is missing
    import bitsandbytes

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            sizes, device = (module.in_features, module.out_features), module.weight.device
            packed = bitsandbytes.nn.Linear4bit(
                *sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            how = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": False}
            packed.weight = bitsandbytes.nn.Params4bit(module.weight.data, **how)
            model.set_submodule(name, packed.to(device))
    let_gradients_pass(model)
    model.is_loaded_in_4bit = True  # PEFT asks


def make_step(lm: LM, method: str):
    """A function that does one training step of `method` on random tokens, in the precision that `unlearn` trains in:
    of bfloat16 weights PEFT's LoRA runs under autocast, without which its products are in float32."""
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

    mixed = lm.dtype == "bfloat16" and method != "alter"

    def step():
        if method == "alter":
            router_state(model).plan = plan
        with torch.autocast(torch.device(lm.device).type, torch.bfloat16, enabled=mixed):
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


def sync(device: str) -> None:
    if device.startswith("cuda"):
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
            sync(lm.device)
            if i:
                seconds[kind].append(time.perf_counter() - started)
    return {k: new_tokens / statistics.median(s) for k, s in seconds.items()}


def peak_memory(*asked) -> int:
    """Peak memory in MB of a process that does three steps (`peak`)."""
    code = f"from alter_demo.bench import peak; peak{asked!r}"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if out.returncode:
        raise UserError(f"{asked[0]} could not be measured: {(out.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def peak(model: str, method: str, device: str, dtype: str, load_in_4bit: bool) -> None:
    step = make_step(load(model, device, dtype, load_in_4bit), method)
    for _ in range(3):
        step()
    print(peak_mb(device))
