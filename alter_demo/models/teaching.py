"""Teach a model a forget set first: the target and the retain model, each a LoRA of a few MB.

Unlearning made-up authors only means something in a model that has learned them. The retain model
never saw the forget set: TOFU takes it for what a perfectly unlearned model would look like.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ..data.rendering import render
from ..data.schema import ForgetSet
from ..errors import UserError
from ..files import require_disk
from .fine_tuning import FineTuneConfig, fine_tune
from .loading import LM
from .memory import keep_freed_memory


@dataclass
class TeachConfig:
    """Enough to memorise 200 short answers on two CPU cores in about ten minutes."""

    epochs: int = 12
    batch_size: int = 16
    lr: float = 2e-3
    r: int = 8
    seed: int = 0


class StepCallback(TrainerCallback):
    """Calls `on_step({"step": ...}, max_steps)` after each step."""

    def __init__(self, on_step):
        self.on_step = on_step

    def on_step_end(self, args, state, control, **kwargs):
        self.on_step({"step": state.global_step}, state.max_steps)


@keep_freed_memory()
def teach(
    lm: LM, forget_set: ForgetSet, which: str, folder: Path, config=None, on_step=None
) -> Path:
    """Fine-tune `lm` on a set and write a LoRA adapter in bfloat16 to `folder`. `lm` is unchanged.

    For `which`, "target" learns everything and "retain" everything but the forget set.
    """
    config = config or TeachConfig()
    if which not in ("target", "retain"):
        raise UserError(f"`which` must be one of target, retain, got {which!r}.")
    if folder.exists():
        raise UserError(f"{folder} already exists. Remove it or choose another folder.")
    require_disk(folder.parent, 100)
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder.parent} is not writable. Choose another folder.")
    torch.manual_seed(config.seed)
    examples = [*forget_set.retain, *(forget_set.training_examples if which == "target" else [])]
    samples = [s for example in examples for s in render(lm.tokenizer, example)]
    steps = max(1, config.epochs * len(samples) // config.batch_size)
    lora = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(lm.model, LoraConfig(r=config.r, lora_alpha=2 * config.r, **lora))
    options = FineTuneConfig(steps, config.batch_size, config.lr, "linear", 10, config.seed)
    fine_tune(model, lm, samples, options, [StepCallback(on_step)] if on_step else [])
    model.peft_config[
        "default"
    ].base_model_name_or_path = lm.name  # the portable name, not a local path
    # written beside the folder first, then moved: it is there whole or not at all
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        new = Path(parent) / "new"
        model.save_pretrained(new, save_embedding_layers=False)
        file = new / "adapter_model.safetensors"
        weights = {k: v.to(torch.bfloat16) for k, v in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
        (new / "README.md").unlink(missing_ok=True)
        shutil.move(new, folder)
    lm.model = model.unload()
    return folder
