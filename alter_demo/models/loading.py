"""Loading a model: a built-in name, a local folder, or a Hub id.

Remote code is never executed and pickled weights are never loaded.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import Interrupted, UserError
from .built_in import MODELS, built_in
from .memory import cpu_name, free_memory, require_memory

INTERRUPT = threading.Event()  # when set, every model of this process stops computing
HUB_ID = re.compile(r"^[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*$")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class LM:
    """A causal language model with its tokenizer and how it was loaded."""

    model: object  # transformers.PreTrainedModel
    tokenizer: object
    name: str
    device: str
    dtype: str
    adapter: str | None = None  # folder of the LoRA that is merged into the weights
    load_in_4bit: bool = False

    @property
    def hardware(self) -> str:
        """The processor or GPU and the dtype, for reports."""
        import platform

        import torch

        if self.device.startswith("cuda"):
            return f"{torch.cuda.get_device_name()} ({self.dtype})"
        cpu = cpu_name() or platform.processor()
        return f"{cpu}, {torch.get_num_threads()} threads ({self.dtype})"


def load_model(
    name: str = "smollm2-135m",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    load_in_4bit: bool = False,
) -> LM:
    """Load a model and its tokenizer.

    Args:
        name: a key of `MODELS`, a folder, or a Hub id.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bfloat16", "float16" or "float32".
        adapter: folder of a PEFT LoRA to merge into the weights.
        load_in_4bit: load NF4 weights; needs bitsandbytes.

    Raises:
        UserError: the name is unknown, the download fails, the weights are pickled or damaged,
            the device is missing, or memory or disk space is short.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    free_memory()
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    path = resolve(name)
    options = {"dtype": getattr(torch, dtype), "use_safetensors": True, "trust_remote_code": False}
    if load_in_4bit:
        options["quantization_config"] = four_bit_config(options["dtype"])
    with quiet(), model_errors(name):
        if name not in MODELS:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            require_memory(config, name, device, dtype, load_in_4bit)
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, padding_side="left"
        )
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        if adapter is not None:
            model = merge(model, Path(adapter))
        if not load_in_4bit:
            model = model.to(device)
        allow_4bit_gradients(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # the model's sampling options are not used, and save_pretrained refuses contradictory ones
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(
        **{key: getattr(model.generation_config, key) for key in special}
    )
    register_hooks(model)
    adapter = str(adapter) if adapter else None
    return LM(model.eval(), tokenizer, name, device, dtype, adapter, load_in_4bit)


def choose_device(device: str = "auto") -> str:
    """The device to use; "auto" prefers CUDA.

    Raises:
        UserError: the device is unknown or missing.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cuda:[1-9]\d*", device):  # Trainer uses the first GPU that it sees
        number = device.removeprefix("cuda:")
        raise UserError(
            f"`device` must be auto, cpu or cuda, got {device!r}. To use another GPU, set "
            f"CUDA_VISIBLE_DEVICES={number} and device cuda."
        )
    if device not in ("cpu", "cuda", "cuda:0"):
        raise UserError(f"`device` must be auto, cpu or cuda, got {device!r}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"PyTorch finds no GPU for device {device!r}. Use cpu, or install PyTorch with CUDA."
        )
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """The dtype to use; "auto" takes bfloat16 on a GPU and on CPUs where it is faster."""
    if dtype == "auto":
        fast = device.startswith("cuda") or bfloat16_is_faster()
        return "bfloat16" if fast else "float32"
    if dtype not in DTYPES:
        raise UserError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32, measured in 0.05 s.

    The CPU's flags do not tell: on an Intel Xeon, a training step in bfloat16 takes 1.8 times as
    long as in float32 without AMX, and 0.4 times as long with it.
    """
    import torch

    def seconds(dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=6)[1:])

    return seconds(torch.bfloat16) < seconds(torch.float32)


def resolve(name: str) -> str:
    """The folder or Hub id to pass to transformers. Creates a built-in model on first use.

    Raises:
        UserError: there is no such model, or the folder is not a safetensors model.
    """
    if name in MODELS:
        return str(built_in(name))
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # unlike Path.is_dir, it accepts any name
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise UserError(f"Folder {name} is not a transformers model: it has no config.json.")
        if not list(path.glob("*.safetensors")):
            raise UserError(pickled(f"Folder {name}"))
        return str(path)
    if HUB_ID.fullmatch(name):
        return name
    raise UserError(
        f"Model {name!r} not found. Choose {', '.join(MODELS)}, the folder of a transformers "
        "model, or a Hub id such as HuggingFaceH4/zephyr-7b-beta."
    )


def pickled(source: str) -> str:
    return f"{source} has no .safetensors weights, and pickled weights are not loaded."


def merge(model, adapter: Path):
    """The model with a LoRA merged into its weights."""
    from peft import PeftModel

    check_adapter(adapter)
    with model_errors(str(adapter)):
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def check_adapter(folder: Path) -> None:
    """Raise UserError unless `folder` contains a PEFT adapter with safetensors weights."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"Folder {folder} is not an adapter: it has no adapter_config.json.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(pickled(f"Adapter {folder}"))


def four_bit_config(compute_dtype):
    """The NF4 config of bitsandbytes. Raises UserError if bitsandbytes is not installed."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4-bit loading needs bitsandbytes. Run pip install bitsandbytes.")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
    )


def allow_4bit_gradients(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, which blocks gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def register_hooks(model) -> None:
    """Add the checks for length and interruption, and make the LM head faster."""
    import torch

    max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check = functools.partial(check_length, max_tokens)
    model.get_input_embeddings().register_forward_pre_hook(check)
    model.get_output_embeddings().register_forward_pre_hook(make_contiguous)
    module_lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in max(module_lists, key=len, default=[model]):
        layer.register_forward_pre_hook(raise_if_interrupted)


def check_length(max_tokens: int | None, module, args):
    """Before the embedding: past its last position a model crashes or returns nonsense."""
    if max_tokens and args and args[0].shape[-1] > max_tokens:
        raise UserError(
            f"A text must have at most {max_tokens} tokens for this model, got "
            f"{args[0].shape[-1]}. Shorten it."
        )


def raise_if_interrupted(module, args):
    """Before each layer: a closed tab must not keep the machine busy to the end of a batch."""
    if INTERRUPT.is_set():
        raise Interrupted


def make_contiguous(module, args):
    """Before the LM head: `logits_to_keep` gives it a strided slice.

    For that, torch copies the head's weight once per sample. A contiguous input halves the time
    of scoring, with the same numbers.
    """
    return (args[0].contiguous(), *args[1:])


@contextmanager
def quiet():
    """Turn off the messages and progress bars of transformers."""
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
    """Turn the exceptions of loading `name` into UserErrors."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    data_errors = (OSError, ValueError, KeyError, TypeError, RuntimeError, StrictDataclassError)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(
            f"Not enough memory for {name}. Use --load-in-4bit or a smaller model."
        ) from None
    except SafetensorError:
        raise UserError(
            f"The weights of {name} are damaged, or they are a Git LFS pointer."
        ) from None
    except data_errors as error:
        raise UserError(explain(name, error)) from None


def explain(name: str, error: Exception) -> str:
    """One sentence on why a model cannot be loaded."""
    text = str(error)
    if "safetensors" in text and name not in MODELS:
        return pickled(name)
    if "trust_remote_code" in text or "custom code" in text:
        return f"{name} needs code from its repository. Remote code is not executed."
    if HUB_ID.fullmatch(name) and not Path(name).is_dir():
        return (
            f"Cannot load {name} from the Hugging Face Hub. Check the name, the network and, for "
            "a gated model, your access (hf auth login)."
        )
    return f"Cannot load {name}: {text.splitlines()[0] if text else type(error).__name__}"
