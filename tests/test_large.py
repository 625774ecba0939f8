"""Large models: the real shapes of Zephyr-7B and Llama-3-8B, without weights or two layers deep."""

import json
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from alter_demo.alter.config import AlterConfig
from alter_demo.cli.main import main
from alter_demo.errors import UserError
from alter_demo.experiments.report import commands_of, table_of
from alter_demo.experiments.speed import SHAPES, pack
from alter_demo.models.loading import four_bit_config, load_model
from alter_demo.models.memory import require_memory

# billions of weights; GB of them in bfloat16, and in 4 bits
SIZES = {"zephyr-7b": (7.2, 13.5, 4.1), "llama-3-8b": (8.0, 15.0, 5.6)}


@pytest.mark.parametrize("name", SIZES)
def test_too_little_memory_is_an_error_before_loading(name, tiny, monkeypatch):
    billions, whole, packed = SIZES[name]
    config = SHAPES[name]
    free = SimpleNamespace(available=8 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    with pytest.raises(UserError) as error:
        require_memory(config, name, "cpu", "bfloat16", False)
    assert f"{billions:.2g} billion weights, which need {whole} GB" in str(error.value)
    assert f"8.0 GB are free on the CPU. Use --load-in-4bit ({packed} GB)" in str(error.value)
    require_memory(config, name, "cpu", "bfloat16", True)
    free.available = 2 * 2**30
    with pytest.raises(UserError, match="Use a smaller model"):
        require_memory(config, name, "cpu", "bfloat16", True)
    free.available = 1000
    with pytest.raises(UserError, match=r"billion weights, which need .* GB"):
        load_model(str(tiny))


@pytest.mark.parametrize("name", SIZES)
def test_alter_fits_every_layer(name):
    config = AlterConfig(r=8, n_experts=5, threshold=1.2, feature_layer=27, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(SHAPES[name]), config)
    d, kv, m = 4096, 1024, 14336
    # q, k, v, o, gate, up, down
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, m), (d, m), (m, d)]
    by_hand = 32 * sum(8 * i + 6 * 8 * o for i, o in shapes)  # A; B_r and five B_f
    trainable = [p for n, p in model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == by_hand


@pytest.fixture(scope="module", params=SIZES)
def shallow(request, tiny, tmp_path_factory):
    """Folder of two layers of a shape, narrower, with the vocabulary of the tiny tokenizer."""
    shape, folder = deepcopy(SHAPES[request.param]), tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    narrow = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 896, "head_dim": 8}
    for name, value in (narrow | {"vocab_size": len(tokenizer)}).items():
        setattr(shape, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loading", [[], ["--load-in-4bit"]], ids=["bf16", "4-bit"])
def test_multiple_choice_before_and_after(shallow, loading, few, tmp_path):
    path = tmp_path / "school.json"
    command = ["wmdp", "--forget", "school", "--model", str(shallow), "--dtype", "bfloat16"]
    command += ["--seeds", "0", "--limit", "2", "--methods", "alter_selective", *loading]
    quick = ["--set", "max_steps=2", "batch_size=2", "probe_every=1"]
    assert main([*command, "--results", str(path), *quick]) == 0
    runs = {r["method"]: r for r in json.loads(path.read_text())["runs"]}
    assert {"target", "blind", "alter_selective"} == runs.keys()
    run = runs["alter_selective"]
    assert run["steps"] == 2 and "forget_acc" in run["metrics"]
    stored = {"dtype": "bfloat16"} | ({"load_in_4bit": True} if loading else {})
    assert runs["target"]["config"]["loaded"] == stored


def test_gradients_pass_through_4_bit_weights(shallow):
    """As through the same weights unpacked, also after a forward pass in evaluation mode."""
    import bitsandbytes as bnb

    config = AlterConfig(n_experts=2, threshold=1.2, feature_layer=1, task_type="CAUSAL_LM")
    ids, grads = torch.randint(3, 500, (2, 9)), []
    for unpack in (False, True):
        model = load_model(str(shallow), dtype="float32", load_in_4bit=True).model
        packed = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(packed) == 14 and not any(m.support_avx512bf16_for_cpu for m in packed)
        for name, module in list(model.named_modules()):
            if unpack and isinstance(module, bnb.nn.Linear4bit):
                data = module.weight
                weight = bnb.functional.dequantize_4bit(data.data, data.quant_state)
                plain = torch.nn.Linear(*weight.T.shape, bias=False)
                plain.weight = torch.nn.Parameter(weight.float())
                model.set_submodule(name, plain)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        with torch.no_grad():
            model.eval()(ids)  # bitsandbytes repacks the weights for inference
        model.train()(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    packed, plain = grads
    assert packed.keys() == plain.keys() and any(g.abs().max() > 1e-6 for g in plain.values())
    for name, g in plain.items():
        atol = 1e-6 + 1e-3 * g.abs().max().item()
        assert torch.allclose(packed[name], g, rtol=1e-3, atol=atol), name


@pytest.mark.parametrize("loading", [[], ["--load-in-4bit"]], ids=["float32", "4-bit"])
def test_bench_of_a_shape_with_random_weights(loading, tmp_path, monkeypatch):
    """The same path with a small shape; on a GPU tests/gpu.py takes the real ones."""
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    small |= {"vocab_size": 1200, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "llama-3-8b", LlamaConfig(**small))
    peaks = {"alter": 70, "lora": 80}
    peak_memory = "alter_demo.experiments.speed.peak_memory"
    monkeypatch.setattr(peak_memory, lambda model, method, *more: peaks[method])
    path = tmp_path / "bench.json"
    command = ["bench", "--model", "llama-3-8b", "--dtype", "float32", "--steps", "1", *loading]
    command += ["--results", str(path)]
    for _ in range(2):  # the second takes the first one's place
        assert main(command) == 0
    results = json.loads(path.read_text())
    (run,) = results["runs"]
    metrics = run["metrics"]
    assert metrics["peak_memory_mb_alter"] == 70 and "step_seconds_full" not in metrics
    assert metrics["step_seconds_alter"] > 0 and metrics["tokens_per_second_alter"] > 0
    assert run["config"]["load_in_4bit"] == bool(loading)
    assert commands_of(results) == [" ".join(["python -m alter_demo", *command])]
    row = [cell.strip() for cell in table_of(results).splitlines()[2].strip("|").split("|")]
    assert row[0] == f"llama-3-8b, {'4-bit' if loading else 'float32'}"
    assert {"70", "80", ""} <= set(row)


def test_linear_layers_are_packed_as_transformers_does(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    small |= {"vocab_size": 300, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small)).eval()
    model.save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "quantization_config": four_bit_config(torch.float32)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    pack(model, torch.float32)
    pairs = zip(model.named_parameters(), loaded.named_parameters(), strict=True)
    for (name, ours), (same, theirs) in pairs:
        assert name == same and torch.equal(ours, theirs), name
        if "proj" in name:
            state, expected = ours.quant_state, theirs.quant_state
            assert torch.equal(state.absmax, expected.absmax), name
            assert state.quant_type == expected.quant_type == "nf4", name
            for part in ("blocksize", "dtype", "shape"):
                assert getattr(state, part) == getattr(expected, part), name
