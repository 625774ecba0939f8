"""A run: unlearn, measure before and after, keep everything in `runs/<name>/`; and what can be done with it later."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model

from . import metrics
from .adapter import AlterConfig
from .answers import RETAIN_TOKENS, adapt, greedy, log_probs
from .data import ForgetSet, Sample, adapters, load_forget_set, read_set, render
from .entropy import PUBLISHED_THRESHOLD, entropy_range, resolve_threshold
from .errors import UserError
from .models import LM, check_adapter, load_model, need_disk
from .routing import route
from .subdomains import discover, fit_gate, sample_features
from .training import (
    AlterTrainer,
    Pairs,
    Progress,
    TrainConfig,
    arguments,
    collate_pairs,
    phase_one,
    router_state,
)

RUNS = Path("runs")
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
PROBE_ITEMS = 12
PROBE_WRONG = 2  # wrong answers an item
TOP_K = 5


@dataclass
class UnlearnConfig:
    """What a person chooses; the rest stands in AlterConfig and TrainConfig."""

    variant: str = "selective"  # or "published": softmax gate, fixed threshold, retention by NLL
    threshold: float | str | None = None  # a number, "auto", or None: the variant's own
    n_experts: int | None = None  # None: found by clustering
    r: int = 8
    q: float = 1.5
    router_input: str = "context"
    general: int = 160  # everyday prompts among the retain samples
    retain: int = 240  # retain samples at most
    limit: int | None = None  # evaluation items per group, None: all


VARIANTS = {
    # as published: experts act everywhere, B_r learns by NLL
    "published": {
        "alter": {"gate": "softmax"},
        "train": {"retention": "nll", "forget_end": True, "refusal": 0.0},
        "threshold": PUBLISHED_THRESHOLD,
    },
    # calibrated two-level gate, distillation to the frozen model, threshold from the data
    "selective": {
        "alter": {"gate": "two_level"},
        "train": {},
        "threshold": "auto",
    },
}


@dataclass
class TokenRecord:
    """One token of a text as the router saw it."""

    token: str
    id: int
    start: int  # span of the token in the text, characters
    end: int
    entropy: float  # S_q of the frozen model's prediction *after* this token
    route: str  # "A": uncertain, "B": confident
    weights: list[float]  # B_r, B_f1 .. B_fN; all zero: the frozen model itself acts
    log_prob: float | None  # of this token, given those before; None for the first
    top: list[tuple[str, float]]  # likeliest next tokens and their probabilities


class Run:
    """An adapted model with its record. Made by `unlearn` and `load_run`."""

    def __init__(self, lm: LM, model, metrics: dict, path: Path | None = None):
        self.lm, self.model, self.metrics, self.path = lm, model.eval(), metrics, path

    @property
    def router(self):
        return self.model.get_base_model().token_router

    @contextmanager
    def only(self, force):
        """Context in which every token goes one way: "off", "r", or the number of a forgetting expert."""
        state = router_state(self.model)
        before = state.force, state.plan
        state.force, state.plan = force, None
        try:
            yield
        finally:
            state.force, state.plan = before

    def answer(self, prompts: list[str], adapted: bool = True, max_new_tokens: int = 64, tick=None) -> list[str]:
        """Greedy answers of the adapted or the untouched model."""
        if not 1 <= max_new_tokens <= 4096:
            raise UserError(f"max_new_tokens must lie between 1 and 4096, and {max_new_tokens} does not.")
        with self.only(None if adapted else "off"):
            return greedy(self.lm, prompts, max_new_tokens, self.model, tick)

    def log_probs(self, questions: list[str], answers: list[str], adapted: bool = True) -> list[float]:
        """Mean log-probability per answer token, end of turn included."""
        if self.model is self.lm.model:  # no adapter
            return log_probs(self.lm, questions, answers)
        with self.only(None if adapted else "off"):
            return log_probs(self.lm, questions, answers, self.model)

    @torch.no_grad()
    def tokens(self, text: str, adapted: bool = True, top: int = TOP_K) -> list[TokenRecord]:
        """Token records of a plain text (no chat template). Raises UserError for an empty text or over 4096 tokens."""
        encoded = self.lm.tokenizer(text, return_offsets_mapping=True)
        ids, spans = encoded.input_ids, encoded.offset_mapping
        if not ids or not text.strip():
            raise UserError("There is no text to look at.")
        if len(ids) > 4096:
            raise UserError(f"The text has {len(ids)} tokens, and 4096 is the most.")
        batch = torch.tensor([ids], device=self.lm.device)
        logits = self.model(input_ids=batch, use_cache=False).logits[0]
        plan = router_state(self.model).last_plan  # the same whether the experts act or not
        if not adapted:
            with self.only("off"):
                logits = self.model(input_ids=batch, use_cache=False).logits[0]
        log_p = logits.float().log_softmax(-1)
        best = log_p.exp().topk(top, -1)
        own = log_p[:-1].gather(-1, batch[0, 1:, None]).squeeze(-1).tolist()
        decode = self.lm.tokenizer.decode
        return [
            TokenRecord(
                token=decode([ids[t]]),
                id=ids[t],
                start=spans[t][0],
                end=spans[t][1],
                entropy=plan.entropy[0, t].item(),
                route="A" if plan.high[0, t] else "B",
                weights=[round(w, 4) for w in plan.weights[0, t].tolist()],
                log_prob=own[t - 1] if t else None,
                top=[(decode([i]), p) for i, p in zip(best.indices[t].tolist(), best.values[t].tolist(), strict=True)],
            )
            for t in range(len(ids))
        ]


# ------------------------------------------------------------------------------------------------------- unlearn


def unlearn(
    model: LM | str = "smollm2-135m",
    forget_set: ForgetSet | str = "harry-potter",
    config: UnlearnConfig | None = None,
    train: TrainConfig | None = None,
    name: str | None = None,
    folder: Path = RUNS,
    evaluate: bool = True,
    adapter: Path | None = None,
    retain_adapter: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    load_in_4bit: bool = False,
    resume: Path | None = None,
    on_step: Callable[[dict, int], None] | None = None,
    on_stage: Callable[[str, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Run:
    """Make a model forget, and write `folder/name/` (adapter, config.json, metrics.json, answers.json).

    Args:
        name: of the run, by default from the model, the set and the time. None and `folder=None` write nothing.
        adapter, retain_adapter: LoRA folders of the model that has learned the set and of the one that has learned
            everything but; for `imaginary-authors` on the built-in model they lie in `assets/`.
        resume: a folder with the checkpoints of an interrupted run (`TrainConfig.save_steps`).
        on_step: called after each step with its losses and the number of steps at most.
        on_stage: called with what is being done and its share done, 0 to 1.
        should_stop: asked after each step; what was learned until then is kept and measured.
    Raises:
        UserError: anything that a person can put right; then nothing is written.
    """
    config, train = config or UnlearnConfig(), train or TrainConfig()
    stage = on_stage or (lambda what, share: None)
    if config.variant not in VARIANTS:
        raise UserError(f"The variant is one of {', '.join(VARIANTS)}, not {config.variant!r}.")
    train = replace(train, **VARIANTS[config.variant]["train"])
    target = run_folder(folder, name, model, forget_set) if folder is not None else None
    check_config(config)
    made = load_forget_set(forget_set) if isinstance(forget_set, str) else forget_set
    if isinstance(model, str):
        stage("loading the model", 0.0)
    if isinstance(model, str):
        shipped = adapters(made.name, model) if made.learned else {}
        adapter, retain_adapter = adapter or shipped.get("target"), retain_adapter or shipped.get("retain")
        if made.learned and adapter is None:
            raise UserError(f"{model} has not learned {made.name}: teach it first (python -m alter_demo learn --help).")
        model = load_model(model, device, dtype, adapter, load_in_4bit)
    lm = model
    probe_items, made = split_probe(
        adapt(made, lm, config.general, lambda a, b: stage("the model's own answers", a / b))
    )
    made = made.limited(config.limit)
    seed_everything(train.seed)
    try:
        started = time.perf_counter()
        alter, records, forget, retain, refusals, report = prepare(lm, made, config, train, stage)
        peft_model, history, stopped = train_experts(
            lm, alter, records, forget, retain, refusals, report.pop("gate"), probe_items, train,
            on_step, should_stop, resume,
        )  # fmt: skip
        seconds = {"unlearn": round(time.perf_counter() - started, 1)}
        run = Run(lm, peft_model, {}, target)
        started = time.perf_counter()
        before, after, answers = ({}, {}, [])
        if evaluate:
            before, after, answers = measure(run, made, stage)
            if retain_adapter is not None:
                stage("measuring the retain-only model", 0.0)
                add_retain_model(before, after, load_model(lm.name, lm.device, lm.dtype, retain_adapter), made)
        seconds["evaluate"] = round(time.perf_counter() - started, 1)
    except torch.OutOfMemoryError:
        raise UserError(
            "The GPU ran out of memory: use a smaller batch size, gradient checkpointing or 4-bit."
        ) from None
    run.metrics = {
        "before": before,
        "after": after,
        "seconds": seconds,
        "config": {"unlearn": asdict(config), "train": asdict(train), "alter": alter_entries(alter)},
        "seed": train.seed,
        "data": {"forget_set": made.name, **{k: len(v) for k, v in made.evaluation().items()}},
        "model": lm.name,
        "adapter": lm.adapter and str(Path(lm.adapter).resolve()),
        "phase_one": report,
        "stopped": stopped,
        "steps": history[-1]["step"],
        "history": history,
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "hardware": lm.hardware,
        "date": time.strftime("%Y-%m-%d"),
    }
    if target is not None:
        write_run(run, answers, target)
    return run


def check_config(config: UnlearnConfig) -> None:
    if config.n_experts is not None and not 1 <= config.n_experts <= 8:
        raise UserError(f"The number of forgetting experts must lie between 1 and 8, and {config.n_experts} does not.")
    AlterConfig(r=config.r, q=config.q, threshold=min(PUBLISHED_THRESHOLD, entropy_range(2**31, config.q) / 2))
    if config.limit is not None and config.limit < 2:
        raise UserError("The limit must leave at least 2 items in each group.")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def split_probe(made: ForgetSet) -> tuple[list, ForgetSet]:
    """Take the forget probe out of the held-out questions, so that early stopping never sees what is reported."""
    n = min(PROBE_ITEMS, len(made.forget_held_out) // 4)
    if n == 0:
        return made.forget_held_out, made
    step = len(made.forget_held_out) // n
    chosen = set(range(0, n * step, step))
    probe = [made.forget_held_out[i] for i in sorted(chosen)]
    return probe, replace(made, forget_held_out=[x for i, x in enumerate(made.forget_held_out) if i not in chosen])


def prepare(lm: LM, made: ForgetSet, config: UnlearnConfig, train: TrainConfig, stage):
    """Phase I. Returns AlterConfig, records, forget and retain samples, and a report with the fitted gate."""
    rng = random.Random(train.seed)

    def rendered(items, tokens=None) -> list[Sample]:
        samples = [s for i in items for s in render(lm.tokenizer, i)]
        return [replace(s, ids=s.ids[: s.start + tokens]) for s in samples] if tokens else samples

    source = made.training or made.forget
    forget = rendered(source)
    keep, general = rendered(made.retain, RETAIN_TOKENS), rendered(made.general, RETAIN_TOKENS)
    keep = rng.sample(keep, min(len(keep), max(0, config.retain - len(general))))
    samples = [*forget, *keep, *general]
    layers = lm.model.config.get_text_config().num_hidden_layers
    variant = VARIANTS[config.variant]
    alter = AlterConfig(
        r=config.r, q=config.q, threshold=1e-6, router_input=config.router_input, task_type="CAUSAL_LM",
        feature_layer=round(layers * 5 / 6), **variant["alter"],
    )  # fmt: skip
    vocab = lm.model.config.get_text_config().vocab_size
    wanted = config.threshold if config.threshold is not None else variant["threshold"]
    if wanted != "auto":
        resolve_threshold(wanted, torch.empty(0), config.q, vocab)
    records = phase_one(lm, samples, alter, tick=lambda a, b: stage("phase I: frozen pass", a / b))
    at_answers = torch.cat([r.entropy[s.start - 1 : -1] for r, s in zip(records, samples, strict=True)])
    alter.threshold = resolve_threshold(wanted, at_answers, config.q, vocab)
    stage("phase I: sub-domains and router", 0.0)
    labels, scores = discover(records[: len(forget)], forget, alter, config.n_experts, train.seed)
    for sample, label in zip(forget, labels, strict=True):
        sample.label = int(label)
    alter.n_experts = config.n_experts or int(labels.max())
    gate, gate_threshold, report = fit_gate(records, samples, alter, train.seed)
    alter.gate_threshold = gate_threshold
    refusals = []  # made after the gate is fitted: "I don't know" says nothing about the subject
    if train.refusal and all(i.question for i in source):
        unknown = read_set("unknown")
        refusals = rendered([replace(i, answer=rng.choice(unknown), lead="") for i in source])
        for refusal, sample in zip(refusals, forget, strict=True):
            refusal.label, refusal.refusal = sample.label, True
        records += phase_one(lm, refusals, alter, first=len(records))
    for record in records:
        mask = torch.ones(1, len(record.entropy))
        x = sample_features(record, alter)[None]
        record.plan = route(x, record.entropy[None], mask, gate, alter)
        record.hidden = None
    report = {
        "gate": gate,
        "samples": {"forget": len(forget), "retain": len(keep), "general": len(general), "refusals": len(refusals)},
        "threshold": alter.threshold,
        "uncertain_share": round((at_answers > alter.threshold).float().mean().item(), 4),
        "n_experts": alter.n_experts,
        "silhouette": {str(k): round(v, 4) for k, v in scores.items()},
        "sub_domains": [int((labels == d).sum()) for d in range(1, alter.n_experts + 1)],
        "router": report,
    }
    return alter, records, forget, [*keep, *general], refusals, report


def train_experts(lm, alter, records, forget, retain, refusals, gate, probe_items, train, on_step, should_stop, resume):
    """Phase II. Returns the PeftModel, the history of steps and why it ended."""
    peft_model = get_peft_model(lm.model, alter)
    router = peft_model.get_base_model().token_router
    router.alter_gate["default"].data.copy_(gate)
    state = router.state
    right = [(i.question, i.paraphrased_answer or i.answer) for i in probe_items]
    wrong = [(i.question, w) for i in probe_items for w in i.perturbed_answer[:PROBE_WRONG]]

    def probe() -> float:
        """How likely the right answers are; beside wrong ones where the set has them, else by themselves."""
        before, state.plan = state.plan, None
        peft_model.eval()
        values = log_probs(lm, *map(list, zip(*right, *wrong, strict=True)), peft_model)
        peft_model.train()
        state.plan = before
        if wrong:
            return float(np.exp(np.mean(values[: len(right)]) - np.mean(values[len(right) :])))
        return float(np.exp(values).mean())

    progress = Progress(train, probe, on_step, should_stop)
    start = probe()
    # a model that never learned the set finds a right answer no likelier than a wrong one
    progress.target = 1.0 if wrong else start * train.stop_ratio
    progress.history.append({"step": 0, "seconds": 0.0, "probe": start})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = AlterTrainer(
            model=peft_model,
            args=arguments(resume or scratch, train, lm.device),
            train_dataset=Pairs(forget, retain, train.max_steps * train.batch_size, train.seed, refusals),
            data_collator=collate_pairs(lm.tokenizer.pad_token_id, lm.device),
            callbacks=[progress],
            records=records,
            processing_class=lm.tokenizer,
            config=train,
            alter_config=alter,
        )
        progress.trainer = trainer
        trainer.train(resume_from_checkpoint=bool(resume and list(Path(resume).glob("checkpoint-*"))))
    state.plan = None
    return peft_model.eval(), progress.history, progress.stopped


# ------------------------------------------------------------------------------------------------------- measure


def measure(run: Run, made: ForgetSet, stage=lambda what, share: None):
    """Before and after, in the same batches. Returns two dicts of groups, and the answers."""
    sides = {"before": {}, "after": {}}
    rows = []
    for group, items in made.evaluation().items():
        if not items or not items[0].question:
            continue
        questions = [i.question for i in items]
        said = {}
        for side in sides:
            stage(f"measuring {group}, {side}", 0.0)
            on = side == "after"
            said[side] = run.answer(questions, adapted=on, tick=lambda a, b, g=group: stage(f"measuring {g}", a / b))
            values = {"probability": np.exp(run.log_probs(questions, [i.answer for i in items], on)).tolist()}
            values["rouge_l"] = [metrics.rouge_l(a, i.answer) for a, i in zip(said[side], items, strict=True)]
            pairs = zip(said[side], said["before"], strict=True)
            values["rouge_l_to_base"] = [metrics.rouge_l(a, b) for a, b in pairs]
            values["repetition"] = [metrics.repetition(a) for a in said[side]]
            sides[side][group] = {k: round(float(np.mean(v)), 6) for k, v in values.items()}
            if ratios := truth_ratios(run, items, on):
                aggregate = metrics.forget_truth_ratio if group.startswith("forget") else metrics.retain_truth_ratio
                sides[side][group] |= {"truth_ratio": round(aggregate(ratios), 6), "truth_ratio_items": ratios}
        rows += [
            {"group": group, "question": i.question, "answer": i.answer, "before": b, "after": a}
            for i, b, a in zip(items, said["before"], said["after"], strict=True)
        ]
    for groups in sides.values():
        parts = [groups[g][m] for g in ("neighbours", "general") if g in groups for m in ("probability", "rouge_l")]
        parts += [groups["neighbours"]["truth_ratio"]] if "truth_ratio" in groups.get("neighbours", {}) else []
        groups["model_utility"] = round(metrics.model_utility(parts), 6)
    return sides["before"], sides["after"], rows


def add_retain_model(before: dict, after: dict, lm: LM, made: ForgetSet) -> None:
    """Put the retain-only model's figures on the forget set beside ours, and the forget quality against it."""
    reference = Run(lm, lm.model, {})
    for group in ("forget", "forget_held_out"):
        items = made.evaluation()[group]
        values = log_probs(lm, [i.question for i in items], [i.answer for i in items])
        probability = round(float(np.exp(values).mean()), 6)
        ratios = truth_ratios(reference, items, False)
        for side in (before, after):
            side[group]["probability_retain_model"] = probability
            if ratios:
                side[group]["forget_quality"] = metrics.forget_quality(side[group]["truth_ratio_items"], ratios)
                side[group]["truth_ratio_retain_model"] = round(metrics.forget_truth_ratio(ratios), 6)


def truth_ratios(run: Run, items, adapted: bool) -> list[float]:
    """TOFU's R of each item that has wrong answers; the paraphrased answer stands for the right one."""
    items = [i for i in items if i.perturbed_answer]
    if not items:
        return []
    questions = [i.question for i in items]
    right = run.log_probs(questions, [i.paraphrased_answer or i.answer for i in items], adapted)
    flat = [(i.question, wrong) for i in items for wrong in i.perturbed_answer]
    wrong = iter(run.log_probs([q for q, _ in flat], [a for _, a in flat], adapted))
    return [
        round(metrics.truth_ratio(r, [next(wrong) for _ in i.perturbed_answer]), 8)
        for r, i in zip(right, items, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------ the folder


def run_folder(folder: Path, name: str | None, model, forget_set) -> Path:
    """Where the run will stand. Raises UserError for a bad or taken name and a full disk, before any work."""
    label = lambda x: getattr(x, "name", x)  # noqa: E731
    if name is None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{Path(str(label(model))).name}-{Path(str(label(forget_set))).stem}")
        name = f"{name}-{time.strftime('%m%d-%H%M%S')}".lstrip(".-")
    if not NAME.fullmatch(name) or ".." in name:
        raise UserError(f"A run's name has letters, digits, dots and dashes (80 at most), unlike {name!r}.")
    if (Path(folder) / name).exists():
        raise UserError(f"The run {name!r} exists already: choose another name, or remove {Path(folder) / name}.")
    need_disk(Path(folder), 200)
    return Path(folder) / name


def alter_entries(alter: AlterConfig) -> dict:
    return {
        f.name: value for f in fields(AlterConfig) if isinstance(value := getattr(alter, f.name), str | int | float)
    }


def write_run(run: Run, answers: list[dict], target: Path) -> None:
    """Write aside, then rename: a run folder is whole or not there."""
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        run.model.peft_config["default"].base_model_name_or_path = run.lm.name  # not somebody's cache folder
        run.model.save_pretrained(aside / "adapter", save_embedding_layers=False)
        for file, value in (
            ("config.json", run.metrics["config"] | {"model": run.metrics["model"], "data": run.metrics["data"]}),
            ("metrics.json", run.metrics),
            ("answers.json", answers),
        ):
            (aside / file).write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
        os.chmod(aside, 0o755)
        os.rename(aside, target)
    except OSError as error:
        raise UserError(
            f"The run could not be written to {target} ({error.strerror}): make room, then again."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def newest_run(folder: Path) -> Path:
    """The run that was written last. Raises UserError when there is none."""
    found = sorted(folder.glob("*/metrics.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"There is no run in {folder}/ yet: python -m alter_demo unlearn makes one.")
    return found[-1].parent


def load_run(path: Path | str, lm: LM | None = None) -> Run:
    """A run from its folder. `lm`: the untouched model if it is in memory already.

    Raises:
        UserError: no such run, a damaged file, pickled weights.
    """
    path = Path(path)
    if not (path / "metrics.json").is_file():
        raise UserError(f"{path} is not a run (metrics.json is missing).")
    check_adapter(path / "adapter")
    try:
        stored = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        name = stored["model"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise UserError(f"{path / 'metrics.json'} is damaged: make the run again.") from None
    lm = lm or load_model(name, adapter=stored.get("adapter"))
    return Run(lm, PeftModel.from_pretrained(lm.model, path / "adapter"), stored, path)
