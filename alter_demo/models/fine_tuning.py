"""Fine-tuning on answers with transformers' Trainer: the one training loop of this package."""

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..data.batches import ShuffledCycle, collate_groups, model_inputs
from ..data.rendering import Sample
from .loading import LM


@dataclass
class FineTuneConfig:
    max_steps: int
    batch_size: int
    lr: float
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    seed: int = 0


class AnswerTrainer(Trainer):
    """Cross-entropy on answer tokens; only the answer positions go through the LM head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # it prints a dict into everything

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        out = model(**model_inputs(batch), logits_to_keep=batch["keep"], use_cache=False)
        logits, on = out.logits[:, :-1], batch["answer"]
        losses = cross_entropy(logits[on].float(), batch["labels"][on], reduction="none")
        return (losses.mean(), {"logits": logits}) if return_outputs else losses.mean()

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # shuffled already


def fine_tune(model, lm: LM, samples: list[Sample], config: FineTuneConfig, callbacks=()) -> None:
    """Train the trainable weights of `model` on the answers of `samples`, drawn with the seed."""
    mixed = lm.dtype == "bfloat16"  # trains under autocast
    cycle = ShuffledCycle(samples, random.Random(config.seed))
    groups = [[cycle.draw()] for _ in range(config.max_steps * config.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(folder, config, lm.device, bf16=mixed, learning_rate=config.lr)
        args.lr_scheduler_type, args.warmup_steps = config.lr_scheduler, config.warmup_steps
        collator = collate_groups(lm.tokenizer.pad_token_id)
        trainer = AnswerTrainer(model, args, collator, groups, callbacks=list(callbacks))
        trainer.train()
    if mixed:  # takes autocast off the model's forward again
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)


def training_arguments(folder: Path | str, config, device: str, **options) -> TrainingArguments:
    """TrainingArguments of a config, with everything off that would write or report by itself."""
    options |= {"per_device_train_batch_size": config.batch_size, "max_steps": config.max_steps}
    options |= {"lr_scheduler_type": "constant", "max_grad_norm": 1.0, "seed": config.seed}
    options |= {"report_to": "none", "logging_strategy": "no", "save_strategy": "no"}
    options |= {"remove_unused_columns": False, "dataloader_pin_memory": False}
    options["gradient_checkpointing"] = getattr(config, "gradient_checkpointing", False)
    on_cpu = not device.startswith("cuda")
    args = TrainingArguments(str(folder), use_cpu=on_cpu, disable_tqdm=True, **options)
    if args.n_gpu > 1:  # Trainer would split each batch, which the losses and the router need whole
        args._n_gpu = 1
    return args
