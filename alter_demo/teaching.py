"""Teach a model a set first: the target (all of it) and the retain-only model, each a LoRA adapter of a few MB.

Unlearning made-up authors only means something in a model that has learned them. The retain-only model has never
seen the forget set: it is what a perfectly unlearned model would look like, and TOFU measures against it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from .data import ForgetSet, render
from .errors import UserError
from .models import LM, kept_memory, need_disk
from .training import AnswerTrainer, Pairs, arguments, collate_pairs

WHICH = ("target", "retain")


@dataclass
class LearnConfig:
    """Enough to memorise 200 short answers on two CPU cores in about ten minutes."""

    epochs: int = 12
    batch_size: int = 16
    lr: float = 2e-3
    r: int = 8
    seed: int = 0
    max_steps: int = 0  # set from the epochs


class Ticks(TrainerCallback):
    def __init__(self, on_step):
        self.on_step, self.started = on_step, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if self.on_step:
            self.on_step({"step": state.global_step}, state.max_steps)


@kept_memory()
def learn(lm: LM, made: ForgetSet, which: str, folder: Path, config: LearnConfig | None = None, on_step=None) -> Path:
    """Fine-tune `lm` on retain (and forget, for the target) and write a LoRA adapter in bfloat16 to `folder`.

    Args:
        which: "target" learns everything, "retain" everything but the forget set.
    Raises:
        UserError: another `which`, the folder exists or can't be written.
    """
    config = config or LearnConfig()
    if which not in WHICH:
        raise UserError(f"What is learned is one of {', '.join(WHICH)}, not {which!r}.")
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it, or choose another folder.")
    need_disk(folder.parent, 100)
    if not os.access(folder.parent, os.W_OK):
        raise UserError(f"{folder.parent} can't be written to: choose another folder.")
    torch.manual_seed(config.seed)
    items = [*made.retain, *(made.trained_on if which == "target" else [])]
    samples = [s for i in items for s in render(lm.tokenizer, i)]
    config.max_steps = max(1, config.epochs * len(samples) // config.batch_size)
    model = get_peft_model(
        lm.model, LoraConfig(r=config.r, lora_alpha=2 * config.r, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments(scratch, config, lm.device, bf16=lm.dtype == "bfloat16")
        args.learning_rate, args.lr_scheduler_type, args.warmup_steps = config.lr, "linear", 10
        AnswerTrainer(
            model=model,
            args=args,
            train_dataset=Pairs(samples, [], config.max_steps * config.batch_size, config.seed),
            data_collator=collate_pairs(lm.tokenizer.pad_token_id, lm.device),
            callbacks=[Ticks(on_step)],
        ).train()
    model.peft_config["default"].base_model_name_or_path = lm.name  # not somebody's cache folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        model.save_pretrained(Path(aside) / "new", save_embedding_layers=False)
        weights = Path(aside) / "new" / "adapter_model.safetensors"
        save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, {"format": "pt"})
        (Path(aside) / "new" / "README.md").unlink(missing_ok=True)
        shutil.move(Path(aside) / "new", folder)
    lm.model = model.unload()
    return folder
