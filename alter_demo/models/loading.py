"""Loading a model. Remote code is never executed, and pickled weights are never loaded."""

import functools
import importlib.util
import os
import re
import threading
import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import Interrupted, UserError
from .built_in import MODELS, built_in

INTERRUPT = threading.Event()  # when set, every model of this process stops computing
HUB_ID = re.compile(r"^[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*$")
DTYPES = ("bfloat16", "float16", "float32")
PICKLED = "{} has no .safetensors weights, and pickled weights are not loaded."


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
        from .memory import hardware

        return f"{hardware(self.device)} ({self.dtype})"


def load_model(
    name: str = "smollm2-135m", device="auto", dtype="auto", adapter=None, load_in_4bit=False
) -> LM:
    """Load a model and its tokenizer.

    Args:
        name: a key of `MODELS`, a folder, or a Hub id.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bfloat16", "float16" or "float32".
        adapter: folder of a PEFT LoRA to merge into the weights.
        load_in_4bit: load NF4 weights; needs bitsandbytes.

    Raises:
        UserError: the model cannot be found, downloaded or read, or does not fit on the device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from .memory import free_memory, require_memory

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
        side = {"padding_side": "left"}
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **side)
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        if adapter is not None:
            from peft import PeftModel

            check_adapter(Path(adapter))
            with model_errors(str(adapter)):
                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        if not load_in_4bit:
            model = model.to(device)
        allow_4bit_gradients(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # the model's sampling options are not used, and save_pretrained refuses contradictory ones
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {key: getattr(model.generation_config, key) for key in keys}
    model.generation_config = GenerationConfig(**special)
    register_hooks(model)
    adapter = str(adapter) if adapter else None
    return LM(model.eval(), tokenizer, name, device, dtype, adapter, load_in_4bit)


def choose_device(device: str = "auto") -> str:
    """The device to use; "auto" prefers CUDA."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda", "cuda:0"):
        message = f"`device` must be auto, cpu or cuda, got {device!r}."
        if re.fullmatch(r"cuda:[1-9]\d*", device):  # Trainer uses the first GPU that it sees
            message += (
                f" To use another GPU, set CUDA_VISIBLE_DEVICES={device[5:]} and device cuda."
            )
        raise UserError(message)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"PyTorch finds no GPU for device {device!r}. Use cpu, or install PyTorch with CUDA."
        )
    return device


def choose_dtype(dtype: str, device: str) -> str:
    """The dtype to use; "auto" takes bfloat16 on a GPU and on CPUs where it is faster."""
    if dtype == "auto":
        return "bfloat16" if device.startswith("cuda") or bfloat16_is_faster() else "float32"
    if dtype not in DTYPES:
        raise UserError(f"`dtype` must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return dtype


@functools.cache
def bfloat16_is_faster() -> bool:
    """Whether this CPU multiplies faster in bfloat16 than in float32, measured in 0.05 s.

    Its flags do not tell: on a Xeon, a training step takes 1.8 times as long, with AMX 0.4 times.
    """
    import torch

    def seconds(dtype) -> float:
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=6)[1:])

    return seconds(torch.bfloat16) < seconds(torch.float32)


def resolve(name: str) -> str:
    """The folder or Hub id to pass to transformers. Creates a built-in model on first use."""
    if name in MODELS:
        return str(built_in(name))
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):  # unlike Path.is_dir, it accepts any name
        if not Path(folder, "config.json").is_file():
            raise UserError(f"Folder {name} is not a transformers model: it has no config.json.")
        if not list(Path(folder).glob("*.safetensors")):
            raise UserError(PICKLED.format(f"Folder {name}"))
        return str(Path(folder))
    if HUB_ID.fullmatch(name):
        return name
    raise UserError(
        f"Model {name!r} not found. Choose {', '.join(MODELS)}, the folder of a transformers "
        "model, or a Hub id such as HuggingFaceH4/zephyr-7b-beta."
    )


def check_adapter(folder: Path) -> None:
    """Raise UserError unless `folder` contains a PEFT adapter with safetensors weights."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"Folder {folder} is not an adapter: it has no adapter_config.json.")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(PICKLED.format(f"Adapter {folder}"))


def four_bit_config(compute_dtype):
    """The NF4 config of bitsandbytes. Raises UserError if bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4-bit loading needs bitsandbytes. Run pip install bitsandbytes.")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def allow_4bit_gradients(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU, which blocks gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def register_hooks(model) -> None:
    """Add the checks for length and interruption, and make the LM head faster."""
    from torch.nn import ModuleList

    max_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check = functools.partial(check_length, max_tokens)
    model.get_input_embeddings().register_forward_pre_hook(check)
    model.get_output_embeddings().register_forward_pre_hook(make_contiguous)
    module_lists = (m for m in model.modules() if isinstance(m, ModuleList))
    for layer in max(module_lists, key=len, default=[model]):
        layer.register_forward_pre_hook(raise_if_interrupted)


def check_length(max_tokens: int | None, module, args):
    """Before the embedding: past its last position a model crashes or returns nonsense."""
    n = args[0].shape[-1] if args else 0
    if max_tokens and n > max_tokens:
        raise UserError(
            f"A text must have at most {max_tokens} tokens for this model, got {n}. Shorten it."
        )


def raise_if_interrupted(module, args):
    """Before each layer: a closed tab must not keep the machine busy to the end of a batch."""
    if INTERRUPT.is_set():
        raise Interrupted


def make_contiguous(module, args):
    """Before the LM head: halves the time of scoring, with the same numbers."""
    # for the strided slice of `logits_to_keep`, torch copies the head's weight once per sample
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
        return
    except (torch.OutOfMemoryError, MemoryError):
        message = f"Not enough memory for {name}. Use --load-in-4bit or a smaller model."
    except SafetensorError:
        message = f"The weights of {name} are damaged, or they are a Git LFS pointer."
    except data_errors as error:
        text = str(error) or type(error).__name__
        message = f"Cannot load {name}: {text.splitlines()[0]}"
        if "safetensors" in text and name not in MODELS:
            message = PICKLED.format(name)
        elif "trust_remote_code" in text or "custom code" in text:
            message = f"{name} needs code from its repository. Remote code is not executed."
        elif HUB_ID.fullmatch(name) and not Path(name).is_dir():
            message = (
                f"Cannot load {name} from the Hugging Face Hub. Check the name, the network and, "
                "for a gated model, your access (hf auth login)."
            )
    raise UserError(message)
