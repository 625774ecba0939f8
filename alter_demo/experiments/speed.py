"""The cost of ALTER: a training step and a generated token, compared with LoRA and full training.

The methods take turns in one process, since timings on a shared machine drift, and medians are
reported. A process never returns its peak memory, so on a CPU each method's is measured in a
process of its own.
"""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MistralConfig

from ..alter import losses
from ..alter.config import AlterConfig
from ..alter.routing import RoutingPlan
from ..alter.tuner import routing_state
from ..errors import UserError
from ..models import loading
from ..models.memory import peak_mb, require_memory, reset_peak
from .results import add_result

BATCH, TOKENS, ANSWER, EXPERTS, RANK = 8, 96, 32, 3, 8
STORED = 2000  # entries in each half of the gate's bank
NEW_TOKENS = 24  # of a generated answer
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
    the same rank and layers. Full training is left out in 4 bits and for SHAPES. In the `ratio`
    returned, `generate_over_base` is the time per token where experts act on every token.
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
    settings = {"model": model, "batch": BATCH, "tokens": TOKENS, "answer": ANSWER, "rank": RANK}
    settings |= {"steps": steps, "dtype": lm.dtype, "load_in_4bit": load_in_4bit}
    return {
        "step_seconds": {m: round(s, 4) for m, s in seconds.items()},
        "peak_memory_mb": peaks if memory else {},
        "tokens_per_second": {k: round(v, 2) for k, v in speed.items()},
        "ratio": {k: round(v, 3) for k, v in ratio.items()},
        "settings": settings,
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
    return median_seconds(step_of, steps, device), peaks


def median_seconds(actions: dict[str, Callable], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each action; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(own) for name, own in seconds.items()}


def make_step(lm: loading.LM, method: str) -> Callable[[], None]:
    """A function that runs one training step of `method` on random tokens.

    As in `unlearn`, LoRA runs under autocast over bfloat16 weights: its own are in float32.
    """
    torch.manual_seed(0)
    common = {"r": RANK, "task_type": "CAUSAL_LM"}
    if method == "full":
        model = lm.model.train().requires_grad_(True)
    elif method == "lora":
        config = LoraConfig(lora_alpha=2 * RANK, target_modules="all-linear", **common)
        model = get_peft_model(lm.model, config).train()
    else:
        model = get_peft_model(lm.model, AlterConfig(n_experts=EXPERTS, **common)).train()
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
        loss = losses.nll(logits[half:], labels[half:]).mean()
        if half:
            loss = loss + losses.inverted_hinge_loss(logits[:half], labels[:half]).mean()
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


@torch.no_grad()
def generation_speed(lm: loading.LM, rounds: int) -> dict[str, float]:
    """Tokens per second of greedy generation (batch 1, KV cache): of the base model, where experts
    act on every token, and where they act on none."""
    ids = torch.randint(5, 1000, (1, 48), device=lm.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    inputs["generation_config"] = GenerationConfig(**length, do_sample=False, pad_token_id=0)
    sizes = {"bank_forget": STORED, "bank_retain": STORED}
    config = AlterConfig(n_experts=EXPERTS, gate="bank", task_type="CAUSAL_LM", **sizes)
    model = get_peft_model(lm.model, config).eval()
    router = model.get_base_model().token_router
    router.alter_gate_token_weights["default"].fill_(1.0)

    def generate(force, bias):
        router.state.force = force
        router.alter_gate["default"][:, -1] = torch.tensor(bias)
        model.generate(**inputs)

    active, idle = [0.0, 9, 8, 7], [9.0, 0, 0, 0]  # biases of the gate
    routes = {"base": ("off", idle), "alter": (None, active), "alter_idle": (None, idle)}
    actions = {name: partial(generate, *route) for name, route in routes.items()}
    median_seconds(actions, 1, lm.device)  # warm up
    seconds = median_seconds(actions, rounds, lm.device)
    return {name: NEW_TOKENS / own for name, own in seconds.items()}


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
    print(json.dumps(peak_mb(options[0])))
