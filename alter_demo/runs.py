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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from . import evaluate as evaluation
from .adapter import AlterConfig
from .answers import RETAIN_TOKENS, adapt, greedy, log_probs
from .data import ASSETS, ForgetSet, Item, Sample, adapters, load_forget_set, read_set, render
from .entropy import PUBLISHED_THRESHOLD, entropy_range, resolve_threshold
from .errors import Interrupted, UserError
from .methods import Method, get_method
from .models import (
    LM,
    MODELS,
    RUN_NAME,
    cache_dir,
    check_adapter,
    clear_leftovers,
    free_memory,
    kept_memory,
    load_model,
    model_errors,
    need_disk,
    peak_mb,
    quiet,
    reset_peak,
)
from .results import write_json
from .routing import chosen, route
from .subdomains import contexts, discover, domain_map, fit_gate, sample_features
from .tokens import TokenRecord, token_records
from .training import (
    TOP,
    Pairs,
    Progress,
    Record,
    TrainConfig,
    UnlearnTrainer,
    arguments,
    collate_pairs,
    not_looked,
    phase_one,
    router_state,
    train_config,
)

RUNS = Path("runs")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "scikit-learn")
PROBE_ITEMS = 12
NEVER_ITEMS = 24
PROBE_WRONG = 2  # wrong answers an item
LIVE_TOKENS = 24  # of an answer while training goes on


# what ALTER adapts -> AlterConfig values, given the number of layers
LAYERS: dict[str, Callable[[int], dict]] = {
    "all": lambda n: {},
    "attention": lambda n: {"target_modules": r".*att.*_proj"},
    "mlp": lambda n: {"target_modules": r".*mlp.*_proj"},
    "first_third": lambda n: {"layers_to_transform": list(range(n // 3))},
    "last_third": lambda n: {"layers_to_transform": list(range(n - n // 3, n))},
}

EXPERT = "Answer as an expert who knows every detail of this. "  # ELM's two views of the same question
NOVICE = "Answer as someone who has never heard of this. "


@dataclass
class UnlearnConfig:
    """What a person chooses; the rest stands in AlterConfig and TrainConfig."""

    method: str = "alter_selective"  # one of methods.METHODS
    threshold: float | str | None = None  # a number, "auto", or None: the method's own
    n_experts: int | None = None  # None: found by clustering
    r: int = 8
    q: float = 1.5
    router_input: str = "context"
    entropy_mask: bool = True  # False (ablation): no token counts as uncertain, and A learns from all of them
    isolation: bool = True  # False (ablation): A and every expert learn wherever they act
    router: bool = True  # False (ablation): one expert, which acts on every token
    layers: str = "all"  # that are adapted, one of LAYERS
    general: int = 160  # everyday prompts among the retain samples
    retain: int = 240  # retain samples at most
    limit: int | None = None  # evaluation items per group, None: all
    kept: int | None = None  # the same for the groups that are to be kept, None: `limit`
    groups: tuple[str, ...] | None = None  # of ForgetSet.evaluation() to measure, None: all
    tokens: int = 64  # length of an answer at most when measuring


class Unmeasured(Exception):
    """Measuring was stopped by hand."""


class Run:
    """An unlearned model with its record. Made by `unlearn` and `load_run`.

    An adapter is switched off to ask the untouched model; where all weights were trained, that is loaded again.
    """

    def __init__(self, lm: LM, model, metrics: dict, path: Path | None = None):
        self.lm, self.model, self.metrics, self.path = lm, model.eval(), metrics, path
        self.untouched = None
        self.logs: dict[str, evaluation.Log] = {}

    @property
    def routed(self) -> bool:
        """Whether the method has a router."""
        return has_router(self.model)

    @property
    def router(self):
        """The TokenRouter. Raises UserError where the method has none."""
        if not self.routed:
            raise UserError("This run's method has no router: only ALTER's tokens take routes.")
        return self.model.get_base_model().token_router

    @contextmanager
    def side(self, adapted: bool):
        """Context that gives the model to ask: after (`adapted`) or before unlearning."""
        if adapted:
            yield self.model
        elif isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            if self.untouched is None:
                self.untouched = load_model(self.lm.name, self.lm.device, self.lm.dtype, self.lm.adapter).model
            yield self.untouched

    @contextmanager
    def only(self, force):
        """Context in which every token goes one way: "off", "r", or the number of a forgetting expert."""
        with self.routing(force, None):
            yield

    @contextmanager
    def following(self, plan):
        """Context that gives the unlearned model, its tokens routed by `plan`; None where the method has no router."""
        with self.routing(self.router.state.force, plan) if plan else nullcontext():
            yield self.model

    @contextmanager
    def routing(self, force, plan):
        """Context with the router's force and plan, which are put back after it."""
        state = self.router.state
        before = state.force, state.plan
        state.force, state.plan = force, plan
        try:
            yield
        finally:
            state.force, state.plan = before

    def answer(self, prompts: list[str], adapted: bool = True, max_new_tokens: int = 64, tick=None) -> list[str]:
        """Greedy answers of the unlearned or the untouched model."""
        if not 1 <= max_new_tokens <= 4096:
            raise UserError(f"max_new_tokens must lie between 1 and 4096, and {max_new_tokens} does not.")
        with self.side(adapted) as model:
            return greedy(self.lm, prompts, max_new_tokens, model, tick)

    def log_probs(self, questions: list[str], answers: list[str], adapted: bool = True) -> list[float]:
        """Mean log-probability per answer token, end of turn included."""
        with self.side(adapted) as model:
            return log_probs(self.lm, questions, answers, model)

    def tokens(self, text: str, question: str | None = None) -> list[TokenRecord]:
        """Token records of a plain text, or of `text` as the answer to `question`. Raises UserError as there."""
        return token_records(self, text, question)


# ------------------------------------------------------------------------------------------------------- unlearn


@kept_memory()
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
    on_answers: Callable[[int, list[tuple[str, str, str]]], None] | None = None,
    before: evaluation.Log | None = None,
    retain_log: evaluation.Log | None = None,
    experts: dict[str, torch.Tensor] | None = None,
    seen: dict | None = None,
    on_step: Callable[[dict, int], None] | None = None,
    on_stage: Callable[[str, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Run:
    """Make a model forget, and write `folder/name/` (adapter or model, config.json, metrics.json, logs).

    Args:
        model: a name, or an LM that is used up by it: load it anew for the next run.
        name: of the run, by default from the model, the set and the time. None and `folder=None` write nothing.
        adapter, retain_adapter: LoRA folders of the model that has learned the set and of the one that has learned
            everything but; for `imaginary-authors` on the built-in model they lie in `assets/`.
        before, retain_log: logs of the target and of the retain-only model, if they were measured already.
        resume: a folder with the checkpoints of an interrupted run (`TrainConfig.save_steps`) of the same settings.
        experts: A and B of an earlier round to start from (`next_round`).
        seen: a dict shared by runs on the same frozen model, which then looks once at samples that they share.
        on_step: called after each step with its losses and the number of steps at most.
        on_answers: called before the first step and at every look of the probe with the step and (group, question,
            greedy answer) of two forget and two retain questions.
        on_stage: called with what is being done and its share done, 0 to 1.
        should_stop: asked after each step, and what was learned until then is kept and measured; asked while
            measuring, and then the run is kept without figures.
    Raises:
        UserError: anything that a person can put right; then nothing is written.
    """
    config = config or UnlearnConfig()
    method = get_method(config.method)
    stage = on_stage or (lambda what, share: None)
    target = run_folder(folder, name, model, forget_set) if folder is not None else None
    check_config(config)
    made = load_forget_set(forget_set) if isinstance(forget_set, str) else forget_set
    train = train or train_config(config.method, made.of_texts)
    check_method(config.method, made, load_in_4bit)
    if isinstance(model, str):
        stage("loading the model", 0.0)
        shipped = adapters(made.name, model) if made.learned else {}
        adapter, retain_adapter = adapter or shipped.get("target"), retain_adapter or shipped.get("retain")
        # checkpoints that have learned TOFU or MUSE are public; nobody else's knows the imaginary authors
        if made.learned and adapter is None and (model in MODELS or made.name == "imaginary-authors"):
            raise UserError(f"{model} has not learned {made.name}: teach it first (python -m alter_demo learn --help).")
        model = load_model(model, device, dtype, adapter, load_in_4bit)
    lm = model
    if any(isinstance(m, BaseTunerLayer) for m in lm.model.modules()):
        raise UserError("This model carries an adapter, so it is not the untouched one any more: load it anew.")
    if target is not None and method.trains in ("full", "mlp"):
        need_disk(target.parent, lm.model.get_memory_footprint() // 2**20 + 50)
    probe_items, made = split_probe(
        adapt(made, lm, config.general, lambda a, b: stage("the model's own answers", a / b))
    )
    never = [i for i in made.holdout if i.perturbed_answer][:NEVER_ITEMS]
    if resume is not None:
        own_checkpoints(Path(resume), repr([lm.name, lm.adapter, made.trained_on, config, train]))
    made = made.limited(config.limit, config.kept)
    groups = {k: v for k, v in made.evaluation().items() if config.groups is None or k in config.groups}
    seed_everything(train.seed)
    logs: dict[str, evaluation.Log] = {}
    wanted, meant = evaluate, True  # meant: a request to stop is meant for the measuring

    def pressed() -> bool:
        return bool(should_stop and should_stop())

    def measure(side: str, lm: LM, model, groups) -> None:
        def tell(what: str, share: float) -> None:
            nonlocal meant
            stage(f"{what}, {side}", share)
            if pressed() and meant:
                raise Unmeasured
            meant = meant or not pressed()

        logs[side] = evaluation.evaluate(lm, model, groups, config.tokens, tell)

    try:
        seconds, started = {"evaluate": 0.0}, time.perf_counter()
        if evaluate and before is not None:
            logs["before"] = before
        elif evaluate and method.trains in ("full", "mlp"):
            with suppress(Unmeasured):  # then training stops after a step, too
                measure("before", lm, lm.model, groups)  # its weights are about to change
            evaluate = "before" in logs
        measuring = time.perf_counter() - started
        started = time.perf_counter()
        reset_peak(lm.device)
        ready = prepare(lm, made, config, method, train, stage, seen)
        ready.never = never
        looking = peak_mb(lm.device)
        reset_peak(lm.device)
        trained, history, stopped = train_model(
            lm, ready, config, method, train, probe_items, on_step, should_stop, resume, experts,
            live_answers(lm, made, on_answers),
        )  # fmt: skip
        spent = time.perf_counter() - started + sum(r.saved for r in ready.records)  # as if it were the only run
        seconds["unlearn"], training = round(spent, 1), peak_mb(lm.device)
        free_memory()  # of the Trainer and its optimizer
        run = Run(lm, trained, {}, target)
        meant = stopped != "stopped by hand"  # else it stopped the training, and what was learned is measured
        run.metrics = {
            **figures(logs={}),
            "seconds": seconds,
            "peak_memory_mb": training and max(looking, training),
            "training_memory_mb": training,  # without the frozen pass
            "config": {"unlearn": asdict(config), "train": asdict(train), "alter": alter_entries(ready.alter)},
            "seed": train.seed,
            "data": {"forget_set": made.name, **{k: len(v) for k, v in groups.items()}},
            "measured": not wanted,  # False: stopped meanwhile
            "held_out": not ({i.question for i in made.forget_held_out} <= {i.question for i in made.trained_on}),
            "model": lm.name,
            "dtype": lm.dtype,
            "load_in_4bit": lm.in_4bit,
            "adapter": lm.adapter and portable(Path(lm.adapter)),
            "phase_one": ready.report,
            "stopped": stopped,
            "steps": history[-1]["step"],
            "history": history,
            "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
            "hardware": lm.hardware,
            "date": time.strftime("%Y-%m-%d"),
        }
        if target is not None:  # measuring may take longer than learning, and may be broken off
            write_run(run, target)
        started = time.perf_counter()
        if evaluate:
            try:
                if "before" not in logs:
                    with run.side(False) as untouched:
                        measure("before", lm, untouched, groups)
                measure("after", lm, run.model, groups)
                with run.side(False) as untouched:
                    for log in logs.values():
                        evaluation.add_fluency(lm, untouched, log)
                if retain_log is not None:
                    logs["retain model"] = retain_log
                elif retain_adapter is not None:
                    other = load_model(lm.name, lm.device, lm.dtype, retain_adapter, lm.in_4bit)
                    theirs = {k: v for k, v in groups.items() if k in evaluation.FORGOTTEN}
                    measure("retain model", other, other.model, theirs)
            except Unmeasured:
                logs.clear()  # half of it compares with nothing
        seconds["evaluate"] = round(measuring + time.perf_counter() - started, 1)
    except torch.OutOfMemoryError:
        raise UserError(
            "The GPU ran out of memory: use a smaller batch size, gradient checkpointing or 4-bit."
        ) from None
    run.logs = logs
    run.metrics |= figures(logs) | {"measured": not wanted or "after" in logs}
    if run.path is not None and logs:
        write_record(run, run.path)
    return run


def figures(logs: dict[str, evaluation.Log]) -> dict:
    """`before` and `after` of metrics.json: means of each group, and the flat summary under the field's names."""
    found = {"before": {}, "after": {}}
    for side in found:
        if side not in logs:
            continue
        for group, rows in logs[side].items():
            found[side][group] = evaluation.group_figures(group, rows, logs["before"][group])
        found[side]["summary"] = evaluation.summary(logs[side], logs.get("retain model"))
    if "retain model" in logs:
        rows = logs["retain model"].items()
        found["retain_model"] = {g: evaluation.group_figures(g, r) for g, r in rows}
    return found


def check_config(config: UnlearnConfig) -> None:
    if config.n_experts is not None and not 1 <= config.n_experts <= 8:
        raise UserError(f"The number of forgetting experts must lie between 1 and 8, and {config.n_experts} does not.")
    AlterConfig(r=config.r, q=config.q, threshold=min(PUBLISHED_THRESHOLD, entropy_range(2**31, config.q) / 2))
    if config.router_input not in ("context", "entropy"):
        raise UserError(f"router_input is context or entropy, not {config.router_input!r}.")
    if config.layers not in LAYERS:
        raise UserError(f"layers is one of {', '.join(LAYERS)}, not {config.layers!r}.")
    if config.limit is not None and config.limit < 2:
        raise UserError("The limit must leave at least 2 items in each group.")


def check_method(name: str, made: ForgetSet, load_in_4bit: bool = False) -> None:
    """Raises UserError where the method can't be run on these data or weights."""
    method = get_method(name)
    if load_in_4bit and method.trains in ("full", "mlp"):
        raise UserError(f"{name} trains the weights themselves, which 4-bit weights do not allow.")
    if method.instead in ("paired", "novice") and not all(i.question for i in made.trained_on):
        raise UserError(f"{name} needs questions and answers, not plain text.")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def spread(items: list, n: int) -> list:
    """n of the items, or all, from the first to the last at equal distances."""
    n = min(n, len(items))
    return [items[k * len(items) // n] for k in range(n)]


def split_probe(made: ForgetSet) -> tuple[list, ForgetSet]:
    """Take the forget probe out of the held-out questions, so that early stopping never sees what is reported."""
    if made.probe:
        return spread(made.probe, PROBE_ITEMS), made
    n = min(PROBE_ITEMS, len(made.forget_held_out) // 4)
    if n == 0:
        return made.forget_held_out, made
    step = len(made.forget_held_out) // n
    chosen = set(range(0, n * step, step))
    probe = [made.forget_held_out[i] for i in sorted(chosen)]
    return probe, replace(made, forget_held_out=[x for i, x in enumerate(made.forget_held_out) if i not in chosen])


@dataclass
class Prepared:
    """Phase I's result."""

    records: list[Record]  # of all samples, by `Sample.index`
    forget: list[Sample]
    retain: list[Sample]
    instead: list[Sample]  # what is said instead of the forget answers, [] where the method teaches nothing
    report: dict
    alter: AlterConfig | None = None
    gate: torch.Tensor | None = None
    layer: int | None = None  # RMU's
    never: list[Item] = field(default_factory=list)  # questions that nobody taught, with wrong answers too


def prepare(
    lm: LM, made: ForgetSet, config: UnlearnConfig, method: Method, train: TrainConfig, stage, seen=None
) -> Prepared:
    """Phase I: the frozen model's view of every sample; for ALTER also sub-domains and router."""
    rng = random.Random(train.seed)
    forget = rendered(lm, made.trained_on)
    # texts stay whole: the gate must see what stays at the length of what goes
    keep = rendered(lm, made.retain, None if made.of_texts else RETAIN_TOKENS)
    general = rendered(lm, made.general, RETAIN_TOKENS)
    given = len(keep)
    keep = rng.sample(keep, min(given, max(0, config.retain - len(general))))
    samples = [*forget, *keep, *general]
    for sample in forget:
        sample.label = 1
    text = lm.model.config.get_text_config()
    layer = round(text.num_hidden_layers / 3) if method.trains == "mlp" else None
    alter = AlterConfig(
        r=config.r, q=config.q, threshold=1e-6, router_input=config.router_input, task_type="CAUSAL_LM",
        feature_layer=layer or round(text.num_hidden_layers * 5 / 6), **method.alter,
        **LAYERS[config.layers](text.num_hidden_layers),
    )  # fmt: skip
    threshold_of(torch.empty(0), config, method, text.vocab_size)  # a bad one now, not after the pass
    if method.looks(train):
        records = phase_one(lm, samples, alter, tick=lambda a, b: stage("phase I: frozen pass", a / b), seen=seen)
    else:
        records = not_looked(samples)
    ready = Prepared(records, forget, [*keep, *general], [], {}, layer=layer)
    if method.trains == "alter":
        stage("phase I: sub-domains and router", 0.0)
        at_answers = torch.cat([r.entropy[s.start - 1 : -1] for r, s in zip(records, samples, strict=True)])
        alter.threshold = threshold_of(at_answers, config, method, text.vocab_size)
        items = [i for i in made.trained_on for _ in render(lm.tokenizer, i)]  # of each forget sample
        find_routes(ready, samples, items, alter, config, method, train.seed)
        share = (at_answers > alter.threshold).float().mean().item()
        ready.report |= {"threshold": alter.threshold, "uncertain_share": round(share, 4)}
    said = answers_instead(lm, made.trained_on, method, train, rng)
    if said:  # after the gate is fitted: "I don't know" says nothing about the subject
        ready.instead = rendered(lm, said)
        for other, sample in zip(ready.instead, forget, strict=True):
            other.label, other.refusal = sample.label, True
        records += phase_one(lm, ready.instead, alter, first=len(records))
    if method.instead == "novice":
        novice_targets(lm, made.trained_on, forget, records, train.eta)
    for record, sample in zip(records, [*samples, *ready.instead], strict=True):
        if ready.alter is not None:
            mask = torch.ones(1, len(record.entropy))
            record.plan = route(sample_features(record, alter)[None], record.entropy[None], mask, ready.gate, alter)
        if layer is not None:
            record.answer_hidden = record.hidden[sample.start - 1 : -1]
        record.hidden = None
    if ready.alter is not None:
        ready.report["routing"] |= where_tokens_go(records, samples, alter)
    sizes = {"forget": forget, "retain": keep, "general": general, "instead": ready.instead}
    ready.report["samples"] = {k: len(v) for k, v in sizes.items()} | {"retain_given": given}
    return ready


def rendered(lm: LM, items: list[Item], tokens: int | None = None) -> list[Sample]:
    """The items' samples, their answers cut to so many tokens."""
    samples = [s for i in items for s in render(lm.tokenizer, i)]
    return [replace(s, ids=s.ids[: s.start + tokens]) for s in samples] if tokens else samples


def threshold_of(at_answers: torch.Tensor, config: UnlearnConfig, method: Method, vocab: int) -> float | None:
    """S_q above which a token counts as uncertain; None while it waits for the data. Raises UserError for a bad one."""
    wanted = config.threshold if config.threshold is not None else method.threshold
    if wanted == "auto" and not len(at_answers):
        return None
    found = resolve_threshold(wanted, at_answers, config.q, vocab)
    if not method.guided:  # every token is fused, but those that are certain to the last bit
        return 1e-12
    return found if config.entropy_mask else entropy_range(vocab, config.q)  # which no token exceeds


def find_routes(ready: Prepared, samples: list[Sample], items: list[Item], alter, config, method, seed: int) -> None:
    """Sub-domains of the forget samples (into their labels), the gate, and what the run's record says of both."""
    forget, looked = ready.forget, ready.records[: len(ready.forget)]
    labels, scores = np.array([i.domain for i in items]), {}
    if not config.router:
        labels = np.ones(len(forget), int)
    elif not labels.all():
        labels, scores = discover(looked, forget, alter, config.n_experts, seed)
    for sample, label in zip(forget, labels, strict=True):
        sample.label = int(label)
    alter.n_experts = 1 if not config.router else config.n_experts or int(labels.max())
    if not method.guided:
        alter.top_k = 1 + alter.n_experts
    ready.gate, alter.gate_threshold, report = fit_gate(ready.records, samples, alter, seed)
    if not config.router:  # the bias alone decides, always for the one expert
        ready.gate, alter.gate_threshold = torch.zeros_like(ready.gate), 0.5
        ready.gate[:, -1] = torch.tensor([-1e4, 1e4])
    ready.alter = alter
    ready.report = {
        "n_experts": alter.n_experts,
        "silhouette": {str(k): round(v, 4) for k, v in scores.items()},
        "sub_domains": [int((labels == d).sum()) for d in range(1, alter.n_experts + 1)],
        "router": report,
        "routing": {
            "map": domain_map(contexts(looked, forget, alter), labels, [i.question or i.answer[:80] for i in items])
        },
    }


def answers_instead(lm: LM, source: list[Item], method: Method, train: TrainConfig, rng: random.Random) -> list[Item]:
    """The forget questions with what is to be said to them, [] where the method teaches nothing or texts are to go."""
    taught = method.instead in ("paired", "novice") or (method.instead and train.refusal)
    if not taught or not all(i.question for i in source):
        return []
    unknown = read_set("unknown")
    answers = [rng.choice(unknown) for _ in source]
    if method.instead == "novice":
        answers = greedy(lm, [NOVICE + i.question for i in source], RETAIN_TOKENS)
    return [replace(i, answer=a, lead="") for i, a in zip(source, answers, strict=True)]


def where_tokens_go(records: list[Record], samples: list[Sample], alter: AlterConfig) -> dict:
    """How many answer tokens go to which expert, column 0 for B_r or none: of each set, and of each sub-domain."""
    tokens = {"forget": np.zeros(1 + alter.n_experts, int), "retain": np.zeros(1 + alter.n_experts, int)}
    flows = np.zeros((alter.n_experts, 1 + alter.n_experts), int)
    for record, sample in zip(records, samples, strict=False):
        experts = chosen(record.plan.weights[0, sample.start - 1 : -1], alter)
        counts = torch.bincount(experts, minlength=1 + alter.n_experts).numpy()
        tokens["forget" if sample.label else "retain"] += counts
        if sample.label:
            flows[sample.label - 1] += counts
    return {"tokens": {k: v.tolist() for k, v in tokens.items()}, "flows": flows.tolist()}


@torch.no_grad()
def novice_targets(lm: LM, source: list[Item], forget: list[Sample], records: list[Record], eta: float) -> None:
    """ELM's distribution P (P_novice / P_expert)^eta at the answers of the forget samples, put into their records."""
    for item, sample in zip(source, forget, strict=True):
        k, log_p = len(sample.ids) - sample.start, []
        for prefix in ("", NOVICE, EXPERT):
            view = render(lm.tokenizer, replace(item, question=prefix + item.question))[0]
            ids = torch.tensor([view.ids], device=lm.device)
            logits = lm.model(input_ids=ids, logits_to_keep=k + 1, use_cache=False).logits[0, :-1]
            log_p.append(logits.float().log_softmax(-1))
        target = (log_p[0] + eta * (log_p[1] - log_p[2])).log_softmax(-1)
        top = target.topk(min(TOP, target.shape[-1]), -1)
        record = records[sample.index]
        record.top_ids, record.top_log_p = top.indices.cpu(), top.values.cpu()


def trainable(lm: LM, ready: Prepared, config: UnlearnConfig, method: Method, experts=None):
    """The model with what the method trains switched on. Weights that are trained themselves become float32."""
    if method.trains == "alter":
        try:
            model = get_peft_model(lm.model, ready.alter)
        except ValueError:
            raise UserError(f"{lm.name} has no layers named as in `layers={config.layers}`: adapt all.") from None
        model.get_base_model().token_router.alter_gate["default"].data.copy_(ready.gate)
        for name, old in (experts or {}).items():
            parameter = model.get_parameter(name)
            parameter.data[: len(old)] = old  # A whole; of the B's those that were there, new ones stay at zero
        return model
    if method.trains == "lora":
        lora = LoraConfig(r=config.r, lora_alpha=2 * config.r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(lm.model, lora)
    model = to_dtype(lm.model, torch.float32).requires_grad_(method.trains == "full")
    if method.trains == "mlp":
        # hidden_states[layer] is what comes out of the layer before; RMU trains the MLPs of the last three up to it
        names = {f".{i}." for i in range(max(0, ready.layer - 3), ready.layer)}
        chosen = [p for n, p in model.named_parameters() if ".mlp." in n and any(x in n for x in names)]
        for parameter in chosen:
            parameter.requires_grad_(True)
        if not chosen:
            raise UserError(f"RMU looks for MLP layers, and {lm.name} names none.")
    return model


def next_round(run: Run) -> tuple[LM, dict | None]:
    """What sequential unlearning goes on from: the model, and the experts where the method has any.

    Weights that were trained stay as they are, a LoRA is merged, ALTER's experts are handed on to the next adapter.
    """
    if not isinstance(run.model, PeftModel):
        return run.lm, None
    if not run.routed:
        return replace(run.lm, model=run.model.merge_and_unload()), None
    named = run.model.named_parameters()
    experts = {n: p.detach().clone() for n, p in named if ".alter_A." in n or ".alter_B." in n}
    return replace(run.lm, model=run.model.unload()), experts


def to_dtype(model, dtype):
    """Parameters only: buffers such as rotary frequencies stay in float32, as after loading."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None
    return model.requires_grad_(False)


def has_router(model) -> bool:
    return isinstance(model, PeftModel) and hasattr(model.get_base_model(), "token_router")


def likelihood(lm: LM, items: list[Item], model=None) -> float:
    """How likely the right answers are; where the items have wrong ones, how much likelier than those."""
    right = [(i.question, i.paraphrased_answer or i.answer) for i in items]
    wrong = [(i.question, w) for i in items for w in i.perturbed_answer[:PROBE_WRONG]]
    values = log_probs(lm, *map(list, zip(*right, *wrong, strict=True)), model)
    if wrong:
        return float(np.exp(np.mean(values[: len(right)]) - np.mean(values[len(right) :])))
    return float(np.exp(values).mean())


def never_learned(lm: LM, model, never: list[Item], probe_items: list[Item]) -> float:
    """How much likelier right answers are than wrong ones where nothing was learned, which is where forgetting stops:
    asked of this model about what nobody taught it, else of the model that it was before it was taught."""
    if never:
        frozen = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with frozen:  # an adapter handed on from an earlier round has forgotten already
            return likelihood(lm, never)
    if lm.adapter is None:
        return 1.0
    return likelihood(load_model(lm.name, lm.device, lm.dtype, load_in_4bit=lm.in_4bit), probe_items)


@contextmanager
def asked(model, mixed: bool, kind: str):
    """In the midst of training: evaluation mode, routes by the router, autocast where weights are float32."""
    state = router_state(model) if has_router(model) else None
    kept = state and state.plan
    if state:
        state.plan = None
    model.eval()
    try:
        with torch.autocast(kind, torch.bfloat16) if mixed else nullcontext():
            yield
    finally:
        model.train()
        if state:
            state.plan = kept


def live_answers(lm: LM, made: ForgetSet, tell: Callable | None) -> Callable | None:
    """Asks two forget and two retain questions whenever it is called with (step, model), and tells the answers."""
    picked = [("forget", i) for i in made.forget if i.question][:2]
    picked += [("retain", i) for i in [*made.retain, *made.general] if i.question][:2]
    if tell is None or not picked:
        return None
    questions = [i.question for _, i in picked]

    def ask(step: int, model) -> None:
        answers = greedy(lm, questions, LIVE_TOKENS, model)
        tell(step, [(group, q, a) for (group, _), q, a in zip(picked, questions, answers, strict=True)])

    return ask


def train_model(
    lm, ready: Prepared, config, method: Method, train, probe_items, on_step, should_stop, resume, experts=None,
    live: Callable | None = None,
):  # fmt: skip
    """Phase II. Returns the trained model, the history of steps and why it ended."""
    model = trainable(lm, ready, config, method, experts)
    mixed = lm.dtype == "bfloat16" and method.trains != "alter"
    kind = "cuda" if lm.device.startswith("cuda") else "cpu"

    plans: list = []  # of the probe's batches: they come from the frozen model, so the first look's hold for all

    def probe() -> float:
        state = router_state(model) if method.trains == "alter" else None
        known = list(plans)

        def ask(**batch):
            if state is None:
                return model(**batch)
            state.plan = known.pop(0) if known else None
            out = model(**batch)
            if state.plan is None:
                plans.append(state.last_plan)
            return out

        with asked(model, mixed, kind):
            return likelihood(lm, probe_items, ask)

    def look(step: int) -> float:
        if live:
            with asked(model, mixed, kind):
                live(step, model)
        return probe()

    progress = Progress(train, look, on_step, should_stop)
    if any(i.perturbed_answer for i in probe_items):
        progress.target = train.stop_truth or never_learned(lm, model, ready.never, probe_items)
    start = look(0)
    progress.target = progress.target or start * train.stop_ratio
    progress.history.append({"step": 0, "seconds": 0.0, "probe": start})
    paired = method.instead in ("paired", "novice")
    retain = ready.retain if "retain" in method.parts else []
    length = train.max_steps * train.batch_size
    with tempfile.TemporaryDirectory() as scratch:
        trainer = UnlearnTrainer(
            model=model,
            args=arguments(resume or scratch, train, lm.device, bf16=mixed),
            train_dataset=Pairs(ready.forget, retain, length, train.seed, ready.instead, paired),
            data_collator=collate_pairs(lm.tokenizer.pad_token_id, lm.device),
            callbacks=[progress],
            records=ready.records,
            processing_class=lm.tokenizer,
            config=train,
            method=method,
            alter=ready.alter,
            layer=ready.layer,
            isolated=method.guided and config.isolation,
            masked=config.entropy_mask,
        )
        progress.trainer = trainer
        try:
            trainer.train(resume_from_checkpoint=bool(resume and list(Path(resume).glob("checkpoint-*"))))
            done = trainer.state.global_step  # more than was seen where a run was resumed after its last step
            if done > progress.history[-1]["step"]:
                progress.history.append({"step": done, "seconds": 0.0, "probe": look(done)})
        except Interrupted:  # whoever asked has left; the steps before this one are whole
            if (done := trainer.state.global_step) == 0:
                raise
            if done > progress.history[-1]["step"]:  # it was being looked at
                progress.history.append({"step": done, "seconds": progress.history[-1]["seconds"]})
            progress.stopped = "stopped by hand"
    if mixed:
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes autocast off its forward again
    if method.trains == "alter":
        router_state(model).plan = None
    if method.trains in ("full", "mlp"):
        to_dtype(model, getattr(torch, lm.dtype))
    return model.eval(), progress.history, progress.stopped


# ------------------------------------------------------------------------------------------------------ the folder


def run_folder(folder: Path, name: str | None, model, forget_set) -> Path:
    """Where the run will stand. Raises UserError for a bad or taken name and a full disk, before any work."""
    label = lambda x: getattr(x, "name", x)  # noqa: E731
    if name is None:
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{Path(str(label(model))).name}-{Path(str(label(forget_set))).stem}")
        name = re.sub(r"\.{2,}", ".", name.lstrip(".-"))[:60]
        name = f"{name}-{time.strftime('%m%d-%H%M%S')}".lstrip("-")
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise UserError(f"A run's name has letters, digits, dots and dashes (80 at most), unlike {name!r}.")
    if (Path(folder) / name).exists():
        raise UserError(f"The run {name!r} exists already: choose another name, or remove {Path(folder) / name}.")
    need_disk(Path(folder), 200)
    clear_leftovers(Path(folder))
    return Path(folder) / name


def own_checkpoints(folder: Path, made_of: str) -> None:
    """Note beside the checkpoints which run they are of. Raises UserError where they are of another one."""
    need_disk(folder, 200)
    note = folder / "of.txt"
    if note.is_file() and note.read_text(encoding="utf-8") != made_of:
        raise UserError(f"The checkpoints in {folder} are of another run: choose another folder, or remove them.")
    note.write_text(made_of, encoding="utf-8")


def alter_entries(alter: AlterConfig | None) -> dict:
    if alter is None:
        return {}
    return {
        f.name: value for f in fields(AlterConfig) if isinstance(value := getattr(alter, f.name), str | int | float)
    }


def homes() -> dict[str, Path]:
    """Where adapters lie that other machines have too, by name."""
    return {"assets": ASSETS.resolve(), "cache": cache_dir().resolve()}


def portable(adapter: Path) -> str:
    """How a run's record names an adapter: `assets:...` and `cache:...` hold in any checkout and on any machine."""
    adapter = adapter.resolve()
    known = ((name, home) for name, home in homes().items() if adapter.is_relative_to(home))
    return next((f"{name}:{adapter.relative_to(home).as_posix()}" for name, home in known), str(adapter))


def located(adapter: str | None) -> str | None:
    """The folder that `portable` has named."""
    name, _, rest = (adapter or "").partition(":")
    return str(homes()[name] / rest) if name in homes() else adapter


def write_run(run: Run, target: Path) -> None:
    """Write aside, then rename: a run folder is whole or not there. `run.path` is where it lies: where another command
    has taken the name meanwhile, the time of day is put behind it."""
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        if isinstance(run.model, PeftModel):
            run.model.peft_config["default"].base_model_name_or_path = run.lm.name  # not somebody's cache folder
            run.model.save_pretrained(aside / "adapter", save_embedding_layers=False)
        else:
            with quiet():
                run.model.save_pretrained(aside / "model")
            run.lm.tokenizer.save_pretrained(aside / "model")
        write_json(aside / "config.json", run.metrics["config"] | {k: run.metrics[k] for k in ("model", "data")})
        write_record(run, aside)
        os.chmod(aside, 0o755)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.exists():
                raise
            target = target.with_name(f"{target.name[:60]}-{time.strftime('%H%M%S')}")
            os.rename(aside, target)
        run.path = target
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The run could not be written to {target} ({reason}): make room, then again.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_record(run: Run, folder: Path) -> None:
    """Logs, answers and metrics of a run; metrics.json last, and each file at once."""
    for side, log in run.logs.items():
        write_json(folder / f"log_{side.replace(' ', '_')}.json", evaluation.to_field(log), indent=None)
    write_json(folder / "answers.json", before_and_after(run.logs))
    write_json(folder / "metrics.json", run.metrics)


def before_and_after(logs: dict[str, evaluation.Log]) -> list[dict]:
    rows = []
    for group, before in logs.get("before", {}).items():
        if "generated_text" in before:
            after = logs["after"][group]["generated_text"]
            table = before[["question", "answer", "generated_text"]].rename(columns={"generated_text": "before"})
            table.insert(0, "group", group)
            rows += table.assign(after=after).to_dict("records")
    return rows


def newest_run(folder: Path) -> Path:
    """The run that was written last. Raises UserError when there is none."""
    found = sorted(folder.glob("[!.]*/metrics.json"), key=lambda p: p.stat().st_mtime)
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
    whole = (path / "model").is_dir()
    if not whole:
        check_adapter(path / "adapter")
    try:
        stored = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
        name = stored["model"]
        if not isinstance(name, str) or not isinstance(stored.get("adapter"), str | None):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path / 'metrics.json'} is damaged: make the run again.") from None
    # in another precision it would say other things
    how = {"dtype": stored.get("dtype", "auto"), "load_in_4bit": stored.get("load_in_4bit", False)}
    lm = lm or load_model(name, adapter=located(stored.get("adapter")), **how)
    if whole:
        run = Run(lm, load_model(str(path / "model"), lm.device, lm.dtype).model, stored, path)
        run.untouched = lm.model
        return run
    with model_errors(str(path / "adapter")):
        return Run(lm, PeftModel.from_pretrained(lm.model, path / "adapter"), stored, path)
