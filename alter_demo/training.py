"""The two phases on transformers.Trainer.

Phase I looks at every sample once through the frozen model (entropy, features, next-token distributions), finds the
sub-domains and fits the router. Phase II trains A, B_r and the B_fd, each only where it may learn.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import losses
from .data import Sample, collate
from .entropy import tsallis_entropy
from .errors import Diverged, UserError
from .methods import INSTEAD, WEIGHTS, Method, Step, get_method
from .models import LM
from .routing import Plan

TOP = 64  # the frozen model's likeliest tokens kept per position for distillation
HALF = torch.finfo(torch.float16).max  # in which states are kept, and some models' go beyond


@dataclass
class TrainConfig:
    """How phase II learns. A method's own values stand in `methods.METHODS`, see `train_config`."""

    max_steps: int = field(default=120, metadata={"help": "steps at most, 1 to 10000"})
    batch_size: int = field(default=4, metadata={"help": "forget samples a step, and as many retain samples"})
    lr_b: float = field(default=1e-3, metadata={"help": "learning rate of the experts"})
    lr_a: float = field(default=1e-5, metadata={"help": "learning rate of A"})
    lr: float = field(default=1e-5, metadata={"help": "learning rate of everything else: all weights, or a LoRA"})
    beta: float = field(default=1.0, metadata={"help": "weight of forgetting"})
    gamma: float = field(default=1.0, metadata={"help": "weight of retention"})
    structure: float = field(default=0.01, metadata={"help": "lambda, weight of the structure term"})
    refusal: float = field(default=0.0, metadata={"help": "weight of what is said instead, 0: not taught"})
    forgetting: str = field(default="ihl", metadata={"help": "ALTER's loss on a forget token: ihl or unlikelihood"})
    sharpness: float = field(default=0.1, metadata={"help": "beta of NPO, SimNPO and DPO"})
    steering: float = field(default=2.0, metadata={"help": "c of RMU, length of the vector steered to (rmu takes 100)"})
    eta: float = field(default=5.0, metadata={"help": "eta of ELM, strength of erasing (elm takes its authors' 1000)"})
    forget_end: bool = field(default=False, metadata={"help": "unlearn the end of turn too (published)"})
    retention: str = field(default="distill", metadata={"help": "distill (to the frozen model) or nll (published)"})
    probe_every: int = field(default=6, metadata={"help": "steps between two looks at the forget probe"})
    stop_ratio: float = field(default=0.001, metadata={"help": "stop when the probe's probability fell to this share"})
    stop_truth: float = field(
        default=0.0, metadata={"help": "or when right answers are so much likelier than wrong; 0: as if never learned"}
    )
    save_steps: int = field(default=0, metadata={"help": "a checkpoint every so many steps, 0: none"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, more time"})
    seed: int = field(default=0, metadata={"help": "random seed"})

    def __post_init__(self):
        if not 1 <= self.max_steps <= 10_000:
            raise UserError(f"The number of steps must lie between 1 and 10000, and {self.max_steps} does not.")
        if not 1 <= self.batch_size <= 256:
            raise UserError(f"The batch size must lie between 1 and 256, and {self.batch_size} does not.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"The seed must lie between 0 and {2**32 - 1}, and {self.seed} does not.")
        if self.retention not in ("distill", "nll"):
            raise UserError(f"retention is distill or nll, not {self.retention!r}.")
        if self.forgetting not in losses.FORGETTING:
            raise UserError(f"forgetting is {' or '.join(losses.FORGETTING)}, not {self.forgetting!r}.")
        if self.sharpness <= 0 or self.probe_every < 1:
            raise UserError("sharpness must be above 0 and probe_every at least 1.")
        if not 0 < self.lr <= 1:
            raise UserError(f"The learning rate must lie between 0 and 1, and {self.lr:g} does not.")
        if not 0 < self.stop_ratio < 1:
            raise UserError(f"stop_ratio is a share between 0 and 1, and {self.stop_ratio} is not.")


def train_config(method: str, of_texts: bool = False, **values) -> TrainConfig:
    """A method's defaults (`of_texts`: for a set of plain texts, see `ForgetSet.of_texts`), with `values` that are not
    None in their place. Raises UserError for an unknown method."""
    own = get_method(method)
    defaults = own.train | (own.texts if of_texts else {})
    return TrainConfig(**defaults | {k: v for k, v in values.items() if v is not None})


# ------------------------------------------------------------------------------------------------------ phase I


@dataclass
class Record:
    """What the frozen model says about one sample of T tokens, K of which are its answer."""

    hidden: torch.Tensor  # (T, D) state that the router reads
    entropy: torch.Tensor  # (T,) S_q
    top_ids: torch.Tensor  # (K, TOP) likeliest next tokens at the answer positions
    top_log_p: torch.Tensor  # (K, TOP)
    log_p: torch.Tensor  # (K,) of the answer's own tokens
    answer_hidden: torch.Tensor | None = None  # (K, D) `hidden` at the answer positions, where a method steers states
    plan: Plan | None = None  # (1, T, ...) once the router is fitted
    saved: float = 0.0  # seconds that it took once, where an earlier run had looked already


@torch.no_grad()
def phase_one(
    lm: LM, samples: list[Sample], config, batch_tokens: int = 4096, tick=None, first: int = 0, seen=None
) -> list[Record]:
    """Frozen pass over `samples`; sets `sample.index`. Batches hold `batch_tokens` tokens at most.

    Args:
        config: AlterConfig, for q and the feature layer.
        tick: called with the number of samples done, for a progress bar.
        first: index of the first sample, where these join others.
        seen: a dict that keeps the records for the next run on the same samples and frozen model (the grid's). Other
            samples are looked at anew: in other batches the last bits differ, and a run must come back alone.
    """
    key = (*((tuple(s.ids), s.start) for s in samples), config.q, config.feature_layer, batch_tokens)
    for number, sample in enumerate(samples, first):
        sample.index = number
    if seen and key in seen:
        return [replace(record) for record in seen[key]]
    started = time.perf_counter()
    records: list[Record | None] = [None] * len(samples)
    for batch in length_batches([len(s.ids) for s in samples], batch_tokens):
        b = collate([samples[i] for i in batch], lm.tokenizer.pad_token_id, lm.device)
        out = lm.model(**inputs(b), output_hidden_states=True, use_cache=False)
        entropy = tsallis_entropy(out.logits, config.q).cpu()
        hidden = out.hidden_states[config.feature_layer].clamp(-HALF, HALF).to(torch.float16).cpu()
        for row, i in enumerate(batch):
            t, k = len(samples[i].ids), len(samples[i].ids) - samples[i].start
            log_p = out.logits[row, -k - 1 : -1].float().log_softmax(-1)
            top = log_p.topk(min(TOP, log_p.shape[-1]), -1)
            own = log_p.gather(-1, b["labels"][row, b["answer"][row]][:, None])[:, 0]
            kept = (entropy[row, -t:], top.indices.cpu(), top.values.cpu(), own.cpu())
            records[i] = Record(hidden[row, -t:].clone(), *kept)
        if tick:
            tick(sum(r is not None for r in records), len(records))
    if seen is not None:
        spent = (time.perf_counter() - started) / len(samples)
        seen.clear()  # one seed's: the grid runs all methods of a seed before the next
        seen[key] = [replace(record, saved=spent) for record in records]
    return records


def not_looked(samples: list[Sample]) -> list[Record]:
    """Records for a method that takes nothing from the frozen model (`Method.looks`): zeros of the right shapes."""
    records = []
    for number, sample in enumerate(samples):
        sample.index, t, k = number, len(sample.ids), len(sample.ids) - sample.start
        nothing = torch.zeros(k, 0, dtype=torch.long), torch.zeros(k, 0), torch.zeros(k)
        records.append(Record(torch.zeros(t, 0), torch.zeros(t), *nothing))
    return records


def length_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length, each group at most `batch_tokens` tokens with padding (one item at least)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def inputs(batch: dict) -> dict:
    return {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}


# ----------------------------------------------------------------------------------------------------- phase II


class Deck:
    """Draws without replacement, shuffled anew when it is used up."""

    def __init__(self, samples: list[Sample], rng: random.Random):
        self.samples, self.rng, self.left = samples, rng, []

    def draw(self) -> Sample:
        if not self.left:
            self.left = self.rng.sample(self.samples, len(self.samples))
        return self.left.pop()


class Pairs(Dataset):
    """A forget sample with a retain sample and a refusal, `length` of them, drawn with the seed.

    The sub-domains take turns, whatever their sizes: each expert learns only from its own, so a small one would
    otherwise lag behind when training stops. `paired`: the refusal is the one to the same question, else any of the
    same sub-domain.
    """

    def __init__(self, forget: list[Sample], retain: list[Sample], length: int, seed: int, refusals=(), paired=False):
        rng = random.Random(seed)
        domains = sorted({s.label for s in forget})
        decks = {d: Deck([s for s in forget if s.label == d], rng) for d in domains}
        keep = Deck(retain, rng) if retain else None
        draws = (decks[domains[i % len(domains)]].draw() for i in range(length))
        self.pairs = [[sample, *([keep.draw()] if keep else [])] for sample in draws]
        if paired:
            own = {id(f): r for f, r in zip(forget, refusals, strict=True)}
            for pair in self.pairs:
                pair.append(own[id(pair[0])])
        elif refusals:
            decks = {d: Deck([s for s in refusals if s.label == d], rng) for d in domains}
            for pair in self.pairs:
                pair.append(decks[pair[0].label].draw())

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        return self.pairs[i]


class AnswerTrainer(Trainer):
    """Cross-entropy on answer tokens; only the answer positions go through the LM head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # it prints a dict into everything

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs(batch), logits_to_keep=batch["keep"], use_cache=False).logits[:, :-1]
        loss = losses.nll(logits[batch["answer"]], batch["labels"][batch["answer"]]).mean()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # `Pairs` is shuffled already


class UnlearnTrainer(AnswerTrainer):
    """Any method of `METHODS`. With ALTER's adapter, `records[i].plan` routes sample i: no frozen pass any more."""

    def __init__(
        self, *args, records: list[Record], config: TrainConfig, method: Method, alter, layer=None, isolated=True,
        masked=True, **kwargs,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.records, self.config, self.method, self.alter, self.layer = records, config, method, alter, layer
        self.isolated, self.masked = isolated, masked
        self.parts: dict[str, float] = {}

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            rates = [("alter_A", self.config.lr_a), ("alter_B", self.config.lr_b), ("", self.config.lr)]
            groups: dict[float, list] = {}
            for name, p in trained:
                groups.setdefault(next(lr for key, lr in rates if key in name), []).append(p)
            decay = 0.01 if self.method.trains in ("full", "mlp") else 0.0
            self.optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr} for lr, p in groups.items()], weight_decay=decay, fused=True
            )
        return self.optimizer

    def compute_loss(self, model, batch, return_outputs=False, num_items_in_batch=None):
        records = [self.records[i] for i in batch["index"]]
        if self.method.trains == "alter":
            # stays set until the next step: gradient checkpointing runs the layers again during the backward pass
            router_state(model).plan = padded_plan(records, batch, self.alter, self.isolated, self.masked)
        steered = self.layer is not None
        out = model(**inputs(batch), logits_to_keep=batch["keep"], use_cache=False, output_hidden_states=steered)
        answer, k = batch["answer"], batch["answer"].shape[1]
        logits = out.logits[:, :-1][answer]
        step = self.step(batch, records, logits)
        if steered:
            step.hidden = out.hidden_states[self.layer][:, -k - 1 : -1][answer].float()
            frozen = torch.cat([r.answer_hidden for r in records])
            step.frozen_hidden = frozen.to(logits.device, torch.float32)
        parts = {name: part(step, self.config) for name, part in self.method.parts.items()}
        self.parts = {name: value.item() for name, value in parts.items() if value.requires_grad}
        loss = sum(getattr(self.config, WEIGHTS[name]) * value for name, value in parts.items())
        return (loss, {"logits": logits}) if return_outputs else loss

    def step(self, batch, records, logits) -> Step:
        answer, labels, device = batch["answer"], batch["labels"], logits.device
        k = answer.shape[1]
        row = torch.arange(len(records), device=device)[:, None].expand(-1, k)[answer]
        kind = torch.where(batch["refusal"], INSTEAD, (batch["label"] > 0).long())

        def joined(name):
            return torch.cat([getattr(r, name) for r in records]).to(device)

        entropy = torch.cat([r.entropy[-1 - len(r.log_p) : -1] for r in records]).to(device)
        threshold = self.alter.threshold if self.alter is not None else float("inf")
        target = labels[answer]
        return Step(
            logits, target, row, kind, batch["label"][row], target == self.processing_class.eos_token_id,
            joined("log_p"), joined("top_ids"), joined("top_log_p"), entropy, entropy > threshold,
            self.alter.q if self.alter is not None else 1.5,
        )  # fmt: skip


def router_state(model):
    """The RoutingState of a model with an ALTER adapter (a PeftModel or the model inside)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.token_router.state


def padded_plan(records: list[Record], batch: dict, alter, isolated: bool = True, masked: bool = True) -> Plan:
    """The samples' plans as one left-padded batch, with the isolation masks (`isolated`).

    With the two-level gate nothing acts on a retain token, so B_r would never learn: in training the experts act
    there as they would after a mistake of the gate, and B_r learns to undo it.
    """
    b, t = batch["input_ids"].shape
    device = batch["input_ids"].device
    first = records[0].plan
    plan = Plan(
        torch.zeros(b, t, first.weights.shape[-1]),
        torch.zeros(b, t, dtype=torch.bool),
        torch.zeros(b, t),
        torch.zeros(b, t, first.weights.shape[-1]),
    )
    for row, record in enumerate(records):
        n = len(record.entropy)
        for name in ("weights", "high", "entropy", "gate"):
            getattr(plan, name)[row, t - n :] = getattr(record.plan, name)[0]
    plan = Plan(*(getattr(plan, n).to(device) for n in ("weights", "high", "entropy", "gate")))
    if alter.gate == "two_level":
        retain = (batch["label"] == 0)[:, None] & batch["attention_mask"].bool()
        leak = plan.gate.clone()
        leak[..., 0] = 0
        leak = leak / leak.sum(-1, keepdim=True).clamp_min(1e-6)
        leak[..., 0] = 1
        plan.weights = torch.where(retain[..., None], leak, plan.weights)
    return plan.isolated(batch["label"], masked) if isolated else plan


def collate_pairs(pad_id: int, device):
    """Forget samples first, then retain samples, then refusals, in one batch."""

    def join(pairs: list[list[Sample]]) -> dict:
        samples = [s for column in itertools.zip_longest(*pairs) for s in column if s is not None]
        batch = collate(samples, pad_id)
        batch["index"] = [s.index for s in samples]
        return batch | {name: torch.tensor([getattr(s, name) for s in samples]) for name in ("label", "refusal")}

    return join


# --------------------------------------------------------------------------------------------------- callbacks


class Progress(TrainerCallback):
    """Reports each step to `on_step`, asks `should_stop`, and stops when the probe says that it is enough."""

    def __init__(self, config, probe: Callable[[int], float], on_step=None, should_stop=None):
        self.config, self.probe, self.on_step, self.should_stop = config, probe, on_step, should_stop
        self.trainer: UnlearnTrainer | None = None
        self.target: float | None = None
        self.history: list[dict] = []
        self.stopped = "all steps done"
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        entry = {"step": state.global_step, "seconds": round(time.perf_counter() - self.started, 2)}
        entry |= {k: round(v, 5) for k, v in self.trainer.parts.items()}
        if state.global_step % self.config.probe_every == 0 or state.global_step == state.max_steps:
            entry["probe"] = self.probe(state.global_step)
            if not math.isfinite(entry["probe"]):
                raise Diverged
            entry["probe_share"] = entry["probe"] / (self.history[0]["probe"] or 1.0)  # of what it began with
            if self.target is not None and entry["probe"] <= self.target:
                self.stopped, control.should_training_stop = "the probe reached its target", True
        self.history.append(entry)
        if self.on_step:
            self.on_step(entry, state.max_steps)
        if self.should_stop and self.should_stop():
            self.stopped, control.should_training_stop = "stopped by hand", True
        return control


def arguments(folder: Path | str, config, device: str, **extra) -> TrainingArguments:
    """TrainingArguments with everything off that would write, report or shuffle by itself."""
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        max_steps=config.max_steps,
        seed=config.seed,
        use_cpu=not device.startswith("cuda"),
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps" if getattr(config, "save_steps", 0) else "no",
        save_steps=getattr(config, "save_steps", 0) or 500,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=getattr(config, "gradient_checkpointing", False),
        **extra,
    )
    if made.n_gpu > 1:  # Trainer would split each batch among them, whose parts the losses and the router need whole
        made._n_gpu = 1
    return made
