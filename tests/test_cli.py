"""The command line: what it prints, its exit codes, and one sentence for every error."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from alter_demo import load_model, load_run
from alter_demo.cli.main import main
from alter_demo.config import PARTS
from alter_demo.errors import UserError


def command(*args):
    return main([str(a) for a in args])


def test_unlearn_compare_inspect(tiny, few, own_data, tmp_path, capsys):
    options = ["--threshold", "auto", "--max-steps", 2, "--batch-size", 2, "--limit", 3]
    files = ["--forget", own_data[0], "--retain", own_data[1], "--runs", tmp_path]
    base = ["unlearn", "--model", tiny, *files, *options, "--name", "mine"]
    assert command(*base) == 0
    assert "forget_held_out" in capsys.readouterr().out
    question = "What colour has the door of house 3?"
    assert command("compare", tmp_path / "mine", question, "[bold]a\x1b[31m") == 0
    out = capsys.readouterr().out
    assert "[bold]a" in out and "\x1b" not in out
    assert command("inspect", "Hello world", "--run", tmp_path / "mine") == 0
    assert "B_f1" in capsys.readouterr().out
    assert command("inspect", "Hello world", "--run", tmp_path / "mine", "--json") == 0
    traces = json.loads(capsys.readouterr().out)
    assert {"token", "entropy", "route", "weights", "top"} <= set(traces[0])
    assert command(*base) == 2
    assert "already exists" in capsys.readouterr().err


OWN = ["unlearn", "--model", "TINY", "--forget", "OWN"]
BAD = [
    (["unlearn", "--model", "nothing"], "nothing"),
    (["unlearn", "--model", "a/../b"], "a/../b"),
    (["unlearn", "--model", "TINY", "--forget", "harry"], "'harry'"),
    (["unlearn", "--model", "TINY", "--forget", "nowhere.csv"], "nowhere.csv"),
    ([*OWN, "--r", "0"], "`r` must be in [1, 256], got 0"),
    ([*OWN, "--max-steps", "0"], "`max_steps` must be in [1, 10000], got 0"),
    ([*OWN, "--n-experts", "9"], "`n_experts` must be in [1, 8], got 9"),
    ([*OWN, "--general-prompts", "0"], "something to keep"),
    ([*OWN, "--threshold", "1.99"], "`threshold` must be in (0, "),
    ([*OWN, "--threshold", "1.2", "--q", "2"], "`threshold` must be in (0, "),
    ([*OWN, "--q", "0"], "`q` must be"),
    ([*OWN, "--method", "best"], "`method` must be one of"),
    ([*OWN, "--device", "tpu"], "tpu"),
    ([*OWN, "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES=1"),
    ([*OWN, "--seed", "-1"], "`seed` must be in"),
    ([*OWN, "--dtype", "int3"], "int3"),
    ([*OWN, "--name", "../x"], "A run's name"),
    (["unlearn", "--model", "TINY", "--forget", "imaginary-authors"], "Teach it first"),
    (["compare", "nowhere", "hi"], "is not a run"),
    (["inspect", "hi", "--run", "nowhere"], "is not a run"),
    (["teach", "--model", "TINY", "--which", "all", "--out", "new"], "target, retain"),
    (["teach", "--model", "TINY", "--epochs", "0", "--out", "new"], "`epochs` must be in"),
    (["bench", "--steps", "0"], "`steps` must be at least 1, got 0"),
]


@pytest.mark.parametrize("args, sentence", BAD, ids=[" ".join(a[-3:]) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_an_exit_code(
    args, sentence, tiny, few, own_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = [{"TINY": tiny, "OWN": own_data[0]}.get(a, a) for a in args]
    assert command(*args) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("alter_demo: ") and sentence in error
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == []


def test_every_option_of_the_config_is_an_option_of_unlearn(capsys):
    with pytest.raises(SystemExit):
        command("unlearn", "--help")
    out = " ".join(capsys.readouterr().out.split())
    for cls in PARTS.values():
        for field in cls.__dataclass_fields__.values():
            flag = field.metadata["flag"] or field.name.replace("_", "-")
            text = field.metadata["help"].partition(" (default")[0]
            assert f"--{flag}" in out and text in out, field.name


def test_the_help_is_there_before_torch_is():
    code = (
        "import sys; from alter_demo.cli.main import main\n"
        "try: main(['unlearn', '--help'])\n"
        "except SystemExit: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_cuda_asked_for_and_absent(tiny, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("bench", "--model", tiny, "--device", "cuda") == 2
    assert "no GPU" in capsys.readouterr().err


def test_no_room_and_no_memory(tiny, few, own_data, tmp_path, capsys, monkeypatch):
    base = ["unlearn", "--model", tiny, "--forget", own_data[0], "--runs", tmp_path]
    base += ["--threshold", "auto", "--max-steps", "1"]
    with monkeypatch.context() as m:
        disk = type("Usage", (), {"free": 2**20})
        m.setattr("alter_demo.files.shutil.disk_usage", lambda _: disk)
        assert command(*base) == 2
        assert "MB" in capsys.readouterr().err

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys.modules["alter_demo.unlearn"], "frozen_pass", out_of_memory)
    assert command(*base) == 2
    assert "smaller batch" in capsys.readouterr().err
    assert [p for p in os.listdir(tmp_path) if p.startswith((".new", "tiny"))] == []


def test_first_use_without_network(cache, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert command("bench") == 2
    assert "network" in capsys.readouterr().err
    assert [p for p in cache.iterdir() if p.name != "answers"] == []


def test_pickled_weights_and_strange_folders(tmp_path, tiny):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"[Pp]ickle"):
        load_model(str(tmp_path / "p"))
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "r" / "adapter").mkdir(parents=True)
    (tmp_path / "r" / "metrics.json").write_text('{"model": "x"}')
    (tmp_path / "r" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "r" / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"[Pp]ickle"):
        load_run(tmp_path / "r")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("file, content, sentence", [
    ("model.safetensors", POINTER, "damaged.*git-lfs|git-lfs.*damaged|Git LFS"),
    ("model.safetensors", b"", "damaged"),
    ("config.json", b'{"model_type": "llama", "hidden_size": "big"}', "load"),
    ("config.json", b"[1]", "load"),
])  # fmt: skip
def test_a_damaged_model_is_one_sentence(tiny, tmp_path, file, content, sentence):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["~nobody-of-this-name", "x" * 300, "a\0b"])
def test_a_strange_model_name_is_one_sentence(name):
    with pytest.raises(UserError, match=r"[Mm]odel"):
        load_model(name)
