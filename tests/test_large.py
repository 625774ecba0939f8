"""Large models: the real configurations of Zephyr-7B and Llama-3-8B, without their weights or one layer deep."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from alter_demo import models
from alter_demo.adapter import AlterConfig
from alter_demo.bench import SHAPES, pack
from alter_demo.cli import main
from alter_demo.errors import UserError
from alter_demo.report import commands_of, table_of

# billions of weights; GB of them in bfloat16, and in 4 bits
SIZES = {"zephyr-7b": (7.2, 13.5, 4.1), "llama-3-8b": (8.0, 15.0, 5.6)}


@pytest.mark.parametrize("name", SIZES)
def test_memory_is_told_before_anything_is_loaded(name, monkeypatch):
    billions, whole, packed = SIZES[name]
    config = SHAPES[name]
    free = SimpleNamespace(available=8 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(UserError) as told:
        models.need_memory(config, name, "cpu", "bfloat16", False)
    assert f"{billions:.2g} billion weights, which need {whole} GB" in str(told.value)
    assert f"8.0 GB are free on the CPU: try --load-in-4bit ({packed} GB)" in str(told.value)
    models.need_memory(config, name, "cpu", "bfloat16", True)
    free.available = 2 * 2**30
    with pytest.raises(UserError, match="try a smaller model"):
        models.need_memory(config, name, "cpu", "bfloat16", True)


@pytest.mark.parametrize("name", SIZES)
def test_alter_fits_every_layer(name):
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(SHAPES[name]),
            AlterConfig(r=8, n_experts=5, threshold=1.2, feature_layer=27, task_type="CAUSAL_LM"),
        )
    d, kv, m = 4096, 1024, 14336
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)]  # q, k, v, o, gate, up, down
    by_hand = 32 * sum(8 * i + 6 * 8 * o for i, o in shapes)  # A; B_r and five B_f
    trainable = [p for n, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == by_hand


@pytest.fixture
def shallow(request, tiny, tmp_path):
    """Folder of two layers of the configuration, narrower, with the tiny tokenizer's words."""
    shape = deepcopy(SHAPES[request.param])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    own = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 896}
    for name, value in (own | {"head_dim": 8}).items():
        setattr(shape, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("loaded", [[], ["--load-in-4bit"]], ids=["bf16", "4-bit"])
@pytest.mark.parametrize("shallow", SIZES, indirect=True)
def test_multiple_choice_before_and_after(shallow, loaded, cache, few, tmp_path):
    path = tmp_path / "school.json"
    options = ["wmdp", "--forget", "school", "--model", str(shallow), "--dtype", "bfloat16", "--seeds", "0"]
    options += ["--limit", "2", "--methods", "alter_selective", "--results", str(path), *loaded]
    assert main([*options, "--set", "max_steps=2", "batch_size=2", "probe_every=1"]) == 0
    runs = {r["method"]: r for r in json.loads(path.read_text())["runs"]}
    assert {"target", "blind", "alter_selective"} == runs.keys()
    assert runs["alter_selective"]["steps"] == 2 and "forget_acc" in runs["alter_selective"]["metrics"]
    assert runs["target"]["config"]["loaded"] == {"dtype": "bfloat16"} | ({"load_in_4bit": True} if loaded else {})


@pytest.mark.parametrize("shallow", SIZES, indirect=True)
def test_gradients_pass_through_4_bit_weights(shallow):
    """As through the same weights unpacked, also after a look at the model (bitsandbytes repacks for inference)."""
    import bitsandbytes as bnb

    ids, grads = torch.randint(3, 500, (2, 9)), []
    for unpack in (False, True):
        model = models.load_model(str(shallow), dtype="float32", load_in_4bit=True).model
        packed = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(packed) == 14 and not any(m.support_avx512bf16_for_cpu for m in packed)
        for name, module in list(model.named_modules()):
            if unpack and isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain = torch.nn.Linear(*weight.T.shape, bias=False)
                plain.weight = torch.nn.Parameter(weight.float())
                model.set_submodule(name, plain)
        torch.manual_seed(0)
        model = get_peft_model(model, AlterConfig(n_experts=2, threshold=1.2, feature_layer=1, task_type="CAUSAL_LM"))
        with torch.no_grad():
            model.eval()(ids)
        model.train()(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    packed, plain = grads
    assert packed.keys() == plain.keys() and any(g.abs().max() > 1e-6 for g in plain.values())
    for name, g in plain.items():
        assert torch.allclose(packed[name], g, rtol=1e-3, atol=1e-6 + 1e-3 * g.abs().max().item()), name


@pytest.mark.parametrize("loaded", [[], ["--load-in-4bit"]], ids=["float32", "4-bit"])
def test_bench_of_a_shape_filled_at_random(loaded, tmp_path, monkeypatch):
    """The same path with a small shape; on a GPU tests/gpu.py takes the real ones."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = LlamaConfig(vocab_size=1200, num_key_value_heads=2, **small)
    monkeypatch.setitem(SHAPES, "llama-3-8b", shape)
    results = tmp_path / "bench.json"
    options = ["bench", "--model", "llama-3-8b", "--dtype", "float32", "--steps", "1", *loaded]
    monkeypatch.setattr("alter_demo.bench.peak_memory", lambda model, method, *more: {"alter": 70, "lora": 80}[method])
    for _ in range(2):  # the second takes the first one's place
        assert main([*options, "--results", str(results)]) == 0
    stored = json.loads(results.read_text())
    (run,) = stored["runs"]
    assert run["metrics"]["peak_memory_mb_alter"] == 70 and "step_seconds_full" not in run["metrics"]
    assert run["metrics"]["step_seconds_alter"] > 0 and run["metrics"]["tokens_per_second_alter"] > 0
    assert run["config"]["load_in_4bit"] == bool(loaded)
    asked = " ".join(["python -m alter_demo", *options[:5], *loaded, "--steps 1"])
    assert commands_of(stored, "bench") == [f"{asked} --results assets/results/bench.json"]
    table = table_of(stored).splitlines()
    assert table[2].startswith(f"| llama-3-8b, {'4-bit' if loaded else 'float32'} | ") and "| 70 | 80 |  |" in table[2]


def test_linear_layers_are_packed_as_transformers_does(tmp_path):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=models.four_bit(torch.float32)
    )
    pack(model, torch.float32)
    pairs = zip(model.named_parameters(), own.named_parameters(), strict=True)
    for (name, ours), (same, theirs) in pairs:
        assert name == same and torch.equal(ours, theirs), name
        if "proj" in name:
            state, right = ours.quant_state, theirs.quant_state
            assert torch.equal(state.absmax, right.absmax) and state.quant_type == right.quant_type == "nf4", name
            assert (state.blocksize, state.dtype, state.shape) == (right.blocksize, right.dtype, right.shape), name
