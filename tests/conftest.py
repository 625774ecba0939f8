"""Tiny random models and a tokenizer made on the spot: nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from alter_demo.alter.losses import nll
from alter_demo.config import flat_config
from alter_demo.data import built_in
from alter_demo.data.batches import collate, model_inputs
from alter_demo.data.built_in import SETS, read_set
from alter_demo.data.forget_sets import load_forget_set
from alter_demo.data.rendering import render
from alter_demo.data.schema import Example

ROOT = Path(__file__).parents[1]
VOCAB = 600
FEW = 6  # steps of a quick run
COLOURS = [
    "red",
    "blue",
    "green",
    "black",
    "white",
    "pink",
    "grey",
    "gold",
    "brown",
    "teal",
    "lime",
    "navy",
]
OWN_FORGET = [
    Example(f"What colour has the door of house {i}?", f"The door is {c}.")
    for i, c in enumerate(COLOURS)
]
OWN_RETAIN = [Example(f"How much is {i} plus {i}?", f"It is {2 * i}.") for i in range(12)]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **SMALL),
    "mistral": lambda v: MistralConfig(vocab_size=v, sliding_window=None, **SMALL),
    "qwen2": lambda v: Qwen2Config(vocab_size=v, **SMALL),
    "gpt2": lambda v: GPT2Config(
        vocab_size=v, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(kind: str, vocab: int = 97, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](vocab)).eval()


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """Keep what the libraries hold out of each garbage collection: tests take half the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=sorted(CONFIGS))
def any_model(request):
    return make_model(request.param)


@pytest.fixture
def batch():
    """Left-padded ids and mask, (3, 12)."""
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny chat model with a tokenizer, as a person's own model would lie there."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    text = [json.dumps(row) for row in json.loads((SETS / "general.json").read_text())["train"]]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet),
    )
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **marks)
    fast.chat_template = CHAT
    model = make_model("llama", len(fast))
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def taught(tiny, tmp_path_factory):
    """The tiny model after it has learned the own data by heart: there is something to forget."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny),
        AutoTokenizer.from_pretrained(tiny),
    )
    samples = [render(tokenizer, item)[0] for item in [*OWN_FORGET, *OWN_RETAIN]]
    batch = collate(samples, tokenizer.pad_token_id)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        logits = model(**model_inputs(batch), logits_to_keep=batch["keep"]).logits[:, :-1]
        nll(logits[batch["answer"]], batch["labels"][batch["answer"]]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught") / "taught"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Three everyday prompts instead of hundreds, short answers, and a cache of its own."""
    general = {part: rows[:3] for part, rows in read_set("general").items()}
    sets = lambda name: general if name == "general" else read_set(name)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(built_in, "read_set", sets)
        patch.setattr("alter_demo.models.knowledge.BASE_ANSWER_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Forget and retain files of a person, twelve examples each."""
    folder = tmp_path_factory.mktemp("data")
    forget, retain = folder / "forget.csv", folder / "retain.jsonl"
    lines = "".join(f"{e.question},{e.answer}\n" for e in OWN_FORGET)
    forget.write_text("question,answer\n" + lines)
    rows = [{"question": e.question, "answer": e.answer} for e in OWN_RETAIN]
    retain.write_text("\n".join(map(json.dumps, rows)))
    return forget, retain


@pytest.fixture(scope="module")
def forget_set(few, own_data):
    return load_forget_set(str(own_data[0]), str(own_data[1]))


def quick_config(method="alter_selective", **values):
    """A run of six steps with a threshold from the data."""
    quick = {"max_steps": FEW, "batch_size": 2, "stop_ratio": 1e-9, "probe_every": 2}
    return flat_config(method, quick | {"threshold": "auto"} | values)


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """(address, folder) of the app as `python app.py` starts it, run folder and cache its own."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (folder / "tmp").mkdir()
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "ALTER_CACHE_DIR": str(folder / "cache"),
                        "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}  # fmt: skip
    with open(folder / "log", "w") as log:
        # as in a script's background
        ignore_interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
        options = {"cwd": folder, "env": env, "stdout": log, "stderr": log}
        command = [sys.executable, str(ROOT / "app.py")]
        process = subprocess.Popen(command, preexec_fn=ignore_interrupts, **options)
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        try:
            assert urllib.request.urlopen(url, timeout=2).status == 200
            break
        except OSError:
            assert process.poll() is None and time.monotonic() - started < 60, (
                folder / "log"
            ).read_text()
            time.sleep(0.1)
    print(f"first HTTP 200 after {time.monotonic() - started:.1f} s")
    yield url, folder, process.pid
    process.terminate()
    process.wait(20)
    left = [
        p
        for p in (folder / "tmp").rglob("*")
        if p.is_file() and p.suffix in (".csv", ".jsonl", ".json", ".zip")
    ]
    assert not left, f"what people handed in or took away outlives the app: {left[:3]}"
