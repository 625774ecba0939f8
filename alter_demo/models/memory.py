"""Memory: how much a model needs, how much was used, and giving it back."""

import ctypes
import gc
import platform
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM

from ..errors import UserError


def require_memory(config, name: str, device: str, dtype: str, load_in_4bit: bool) -> None:
    """Raise UserError if the weights of a transformers `config` need more memory than is free."""
    if getattr(config, "quantization_config", None):  # packed already, in one of many ways
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    table_count = sum({id(t.weight): t.weight.numel() for t in tables}.values())
    width = getattr(torch, dtype).itemsize
    # NF4 takes half a byte per weight and a float32 per 64 weights; the tables are not quantized
    packed = (count - table_count) * (0.5 + 4 / 64) + table_count * width
    needed = packed if load_in_4bit else count * width
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        other = "" if load_in_4bit else f"--load-in-4bit ({packed / 2**30:.1f} GB) or "
        raise UserError(
            f"{name} has {count / 1e9:.2g} billion weights, which need {needed / 2**30:.1f} GB of "
            f"memory, and {free / 2**30:.1f} GB are free on the {'GPU' if on_gpu else 'CPU'}. "
            f"Use {other}a smaller model."
        )


@contextmanager
def keep_freed_memory():
    """Keep freed blocks in this process, which saves a fifth of the time of training on a CPU.

    glibc returns large blocks to the kernel, which clears them again for the next step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # not glibc
        yield
        return
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    set_option(m_mmap_max, 0)
    set_option(m_trim_threshold, -1)
    try:
        yield
    finally:
        set_option(m_mmap_max, 65536)  # the defaults
        set_option(m_trim_threshold, 128 * 1024)
        trim(0)


def free_memory() -> None:
    """Free the GPU's cached blocks and unused objects: adapted models contain reference cycles."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    """Reset what `peak_mb` reports."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # if not allowed, the peak since the process started is reported
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb(device: str) -> int | None:
    """Peak memory in MB of the GPU or of this process; None if the system does not report it."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() // 2**20
    with suppress(OSError):
        # ru_maxrss would start at the peak of the parent process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE)[1]) // 2**10


def hardware(device: str) -> str:
    """The name of the GPU, or of the processor and its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    name = None
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return f"{name[1].strip() if name else platform.processor()}, {torch.get_num_threads()} threads"


@contextmanager
def memory_errors():
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            "The GPU ran out of memory. Use a smaller batch size, --gradient-checkpointing or "
            "--load-in-4bit."
        ) from None
