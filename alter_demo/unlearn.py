"""ALTER from start to end. Read this file first.

Phase one runs the frozen model over every sample once: entropies, sub-domains, the gate.
Phase two trains A, B_r and the forgetting experts, each only where it may learn, until a probe of
held-out questions has fallen far enough. Baselines go the same way and skip what they do not need.

    function                    stands on            what for
    unlearn
      run_phase_one
        render_samples          data/rendering.py
        frozen_pass             alter/frozen.py      S_q, states, likeliest tokens
        fit_router              alter/entropy.py     the threshold: uncertain or confident
                                alter/subdomains.py  one expert for each sub-domain
                                alter/bank_fit.py    where experts act at all (alter/bank.py)
                                alter/gate.py        which expert acts
        render_refusals         baselines/refusals.py
        plan_samples            alter/routing.py     which way each token goes
      run_phase_two
        draw_groups             alter/dataset.py     forget, retain, refusal; isolated gradients
        UnlearnTrainer          alter/trainer.py     on alter/losses.py and baselines/losses.py
        Probe, StoppingRule     stopping.py
    Run                         run.py               generate, measure, save
"""

import random
import tempfile
import time

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import set_seed

from .alter import MAX_EXPERTS
from .alter.bank import plan_sample
from .alter.bank_fit import fit_bank_gate
from .alter.config import AlterConfig
from .alter.dataset import draw_groups
from .alter.entropy import entropy_range, resolve_threshold
from .alter.frozen import PhaseOneResult, empty_outputs, frozen_pass
from .alter.gate import NEVER, fit_gate, single_expert_gate
from .alter.subdomains import find_sub_domains, sample_contexts
from .alter.trainer import UnlearnTrainer
from .baselines.methods import WEIGHTS, check_method, get_method
from .baselines.refusals import render_refusals, set_novice_targets
from .baselines.trainable import initial_alter_config
from .callbacks import Callback, CallbackList
from .config import UnlearnConfig
from .data.batches import collate_groups
from .data.forget_sets import load_forget_set
from .data.rendering import Sample, render, render_examples
from .data.schema import Example, ForgetSet
from .errors import Interrupted, UserError
from .inspection.routes import count_routes, sub_domain_map
from .models.fine_tuning import training_arguments
from .models.knowledge import RETAIN_TOKENS
from .models.loading import LM
from .models.memory import free_memory, keep_freed_memory, memory_errors, peak_mb, reset_peak
from .models.target import load_target
from .record import run_record
from .run import Run, fit_forget_set
from .stopping import Probe, StoppingRule, answer_live, evaluation_mode

NEVER_TAUGHT_EXAMPLES = 24
ALL_FUSED = 1e-12  # practically every token exceeds this threshold


@keep_freed_memory()
def unlearn(
    model: LM | str = "smollm2-135m",
    forget_set: ForgetSet | str = "harry-potter",
    config: UnlearnConfig | None = None,
    callbacks: list[Callback] = (),
    experts: dict[str, torch.Tensor] | None = None,
    frozen_cache: dict | None = None,
) -> Run:
    """Make a model forget. Saves and measures nothing: see `Run.save` and `Run.evaluate`.

    Args:
        model: a name, or an LM. It is modified in place: load it anew for the next run.
        forget_set: a name, a file, or a ForgetSet.
        experts: A and B of an earlier round to start from (`next_round`).
        frozen_cache: a dict shared by runs on the same frozen model. A run with exactly the same
            samples, q and feature layer reuses the frozen pass of the last one.
    Raises:
        UserError: an error that the user can fix.
    """
    config, callback = config or UnlearnConfig(), CallbackList(callbacks)
    if isinstance(forget_set, str):
        forget_set = load_forget_set(forget_set)
    config = config.for_set(forget_set.is_plain_text)
    if isinstance(lm := model, str):
        callback.on_stage("loading the model", 0.0)
        lm = load_target(model, forget_set)
    check_method(config.method, forget_set, lm.load_in_4bit)
    check_model(lm, config)
    forget_set, probe_examples = fit_forget_set(forget_set, lm, config.data, callback)
    never_taught = [e for e in forget_set.holdout if e.perturbed_answer][:NEVER_TAUGHT_EXAMPLES]
    set_seed(config.training.seed)
    with memory_errors():
        started = time.perf_counter()
        reset_peak(lm.device)
        phase_one = run_phase_one(lm, forget_set, config, callback, frozen_cache)
        phase_one_peak = peak_mb(lm.device)
        reset_peak(lm.device)
        probe = probe_examples, never_taught
        model, rule = run_phase_two(lm, phase_one, forget_set, config, probe, callback, experts)
    # with the frozen pass that an earlier run has paid for, so that costs compare
    seconds = time.perf_counter() - started + sum(f.seconds for f in phase_one.frozen)
    cost = {
        "seconds": {"unlearn": round(seconds, 1), "evaluate": 0.0},
        "training_memory_mb": (peak := peak_mb(lm.device)),  # without the frozen pass
        "peak_memory_mb": peak and max(phase_one_peak, peak),
    }
    free_memory()  # the Trainer and its optimizer
    return Run(lm, model, run_record(lm, forget_set, config, phase_one, rule) | cost, forget_set)


def check_model(lm: LM, config: UnlearnConfig) -> None:
    """Raises UserError if the model was unlearned before, or if S_q never reaches the threshold."""
    if any(isinstance(m, BaseTunerLayer) for m in lm.model.modules()):
        raise UserError("This model carries an adapter already. Load the model anew.")
    entropy_threshold(torch.empty(0), config, lm.model.config.get_text_config().vocab_size)


# --------------------------------------------------------------------------------- phase one


def render_samples(
    lm: LM, forget_set: ForgetSet, retain_samples: int, rng: random.Random
) -> tuple[dict[str, list[Sample]], int]:
    """Samples to train on by part of the set, and the number of retain samples there were.

    Forget samples get label 1.
    """
    forget = render_examples(lm.tokenizer, forget_set.training_examples)
    # plain texts stay whole: with shorter retain texts the gate would learn length
    tokens = None if forget_set.is_plain_text else RETAIN_TOKENS
    retain = render_examples(lm.tokenizer, forget_set.retain, tokens)
    general = render_examples(lm.tokenizer, forget_set.general, RETAIN_TOKENS)
    count = min(len(retain), max(0, retain_samples - len(general)))
    for sample in forget:
        sample.label = 1
    parts = {"forget": forget, "retain": rng.sample(retain, count), "general": general}
    return parts, len(retain)


def run_phase_one(
    lm: LM, forget_set: ForgetSet, config: UnlearnConfig, callback: Callback, frozen_cache=None
) -> PhaseOneResult:
    """The frozen model's view of every sample; for ALTER also sub-domains, gate and plans."""
    method, training = get_method(config.method), config.training
    rng = random.Random(training.seed)
    parts, retain_given = render_samples(lm, forget_set, config.data.retain, rng)
    samples = [*parts["forget"], *parts["retain"], *parts["general"]]
    layer = method.trainable.steering_layer(lm)
    alter = initial_alter_config(lm, config, layer)
    if method.needs_frozen_pass(training):
        report = "phase one: frozen pass"
        progress = lambda done, total: callback.on_stage(report, done / total)  # noqa: E731
        frozen = frozen_pass(lm, samples, alter, progress, cache=frozen_cache)
    else:
        frozen = empty_outputs(samples)
    retain = [*parts["retain"], *parts["general"]]
    result = PhaseOneResult(frozen, parts["forget"], retain, [], {}, steering_layer=layer)
    if method.trainable.routed:
        fit_router(lm, result, forget_set, alter, config, callback)
    # after the gate is fitted: "I don't know" says nothing about the topic
    result.refusals = render_refusals(lm, forget_set, result.forget, config, rng)
    if result.refusals:
        frozen += frozen_pass(lm, result.refusals, alter, first=len(frozen))
    if method.refusals == "novice":
        examples = forget_set.training_examples
        set_novice_targets(lm, examples, result.forget, frozen, training.elm_eta)
    plan_samples(result, [*samples, *result.refusals])
    sizes = {name: len(part) for name, part in parts.items()}
    sizes |= {"refusals": len(result.refusals), "retain_given": retain_given}
    result.report["samples"] = sizes
    if result.alter is not None:
        result.report["routing"] |= count_routes(frozen, samples, alter)
    return result


def entropy_threshold(
    entropy: torch.Tensor, config: UnlearnConfig, vocab_size: int
) -> float | None:
    """S_q above which a token is uncertain; None while "auto" waits for the entropies (n,)."""
    method, adapter = get_method(config.method), config.adapter
    threshold = method.threshold if adapter.threshold is None else adapter.threshold
    if threshold == "auto" and not len(entropy):
        return None
    value = resolve_threshold(threshold, entropy, adapter.q, vocab_size)
    if not method.uses_entropy:
        return ALL_FUSED
    return value if adapter.entropy_mask else entropy_range(vocab_size, adapter.q)  # none exceeds


def fit_router(
    lm: LM,
    result: PhaseOneResult,
    forget_set: ForgetSet,
    alter: AlterConfig,
    config: UnlearnConfig,
    callback: Callback,
) -> None:
    """Threshold, sub-domains (into the forget samples' labels) and gate, into `result`.

    Raises UserError if there is nothing to keep, or a sub-domain without an expert.
    """
    if not result.retain:
        raise UserError(
            "The gate needs something to keep. Add a retain set, or set `general` above 0."
        )

    def progress(done: int, total: int) -> None:
        callback.on_stage("phase one: sub-domains and gate", done / total)

    progress(0, 1)
    adapter, seed, frozen = config.adapter, config.training.seed, result.frozen
    samples = [*result.forget, *result.retain]
    pairs = zip(frozen, samples, strict=True)
    at_answers = torch.cat([f.entropy[s.start - 1 : -1] for f, s in pairs])
    vocab_size = lm.model.config.get_text_config().vocab_size
    alter.threshold = entropy_threshold(at_answers, config, vocab_size)
    examples = forget_set.training_examples
    examples = [e for e in examples for _ in render(lm.tokenizer, e)]  # one for each sample
    forget_frozen = frozen[: len(result.forget)]
    labels, scores = np.array([e.sub_domain for e in examples]), {}
    if not adapter.router:
        labels = np.ones(len(examples), int)
    elif not labels.all():
        labels, scores = find_sub_domains(
            forget_frozen, result.forget, alter, adapter.n_experts, seed
        )
    elif labels.max() > (most := adapter.n_experts or MAX_EXPERTS):
        raise UserError(
            f"Sub-domain {labels.max()} has no expert: there are at most {most}. Number the "
            "sub-domains from 1, or raise `n_experts`."
        )
    for sample, label in zip(result.forget, labels, strict=True):
        sample.label = int(label)
    alter.n_experts = 1 if not adapter.router else adapter.n_experts or int(labels.max())
    if not get_method(config.method).uses_entropy:
        alter.top_k = 1 + alter.n_experts
    if alter.gate == "bank":
        gate_report = fit_bank_gate(lm, result, examples, forget_set, alter, seed, progress)
    else:
        result.gate, gate_report = fit_gate(frozen, samples, alter, seed)
    if not adapter.router:
        result.gate, alter.gate_threshold = single_expert_gate(result.gate), NEVER
    result.alter = alter
    contexts = sample_contexts(forget_frozen, result.forget, alter)
    texts = [e.question or e.answer[:80] for e in examples]
    share = (at_answers > alter.threshold).float().mean().item()
    result.report = {
        "n_experts": alter.n_experts,
        "silhouette": {str(k): round(v, 4) for k, v in scores.items()},
        "sub_domains": [int((labels == d).sum()) for d in range(1, alter.n_experts + 1)],
        "router": gate_report,
        "routing": {"map": sub_domain_map(contexts, labels, texts)},
        "threshold": alter.threshold,
        "uncertain_share": round(share, 4),
    }


def plan_samples(result: PhaseOneResult, samples: list[Sample]) -> None:
    """Route every sample, keep the steered states, and drop the states that nobody needs."""
    for frozen, sample in zip(result.frozen, samples, strict=True):
        if result.alter is not None:
            frozen.plan = plan_sample(frozen, sample, result)
        if result.steering_layer is not None:
            frozen.answer_hidden = frozen.hidden[sample.start - 1 : -1]
        frozen.hidden = None


# --------------------------------------------------------------------------------- phase two


def run_phase_two(
    lm: LM,
    phase_one: PhaseOneResult,
    forget_set: ForgetSet,
    config: UnlearnConfig,
    probe_examples: tuple[list[Example], list[Example]],
    callback: Callback,
    experts: dict[str, torch.Tensor] | None = None,
):
    """Train until the probe reaches its target, all steps are done, or somebody stops it.

    Args:
        probe_examples: the probe examples, and examples that were never taught.
    Returns:
        The trained model in evaluation mode, and the StoppingRule with the history.
    """
    method, training = get_method(config.method), config.training
    model = method.trainable.prepare(lm, phase_one, config, experts)
    mixed = lm.dtype == "bfloat16" and not method.trainable.routed
    examples, never_taught = probe_examples
    probe = Probe(lm, model, examples, mixed)

    def measure(step: int) -> float:
        if callback.live_answers:
            with evaluation_mode(model, lm, mixed):
                answer_live(step, model, lm, forget_set, callback)
        return probe.measure()

    rule = StoppingRule(training, measure, probe.target(training, never_taught), callback)
    groups = draw_groups(
        phase_one.forget,
        phase_one.retain if "retain" in method.losses else [],
        training.max_steps * training.batch_size,
        training.seed,
        phase_one.refusals,
        paired=method.refusals in ("paired", "novice"),
    )
    with tempfile.TemporaryDirectory() as folder:
        rule.trainer = trainer = UnlearnTrainer(
            model=model,
            args=training_arguments(folder, training, lm.device, bf16=mixed),
            train_dataset=groups,
            data_collator=collate_groups(lm.tokenizer.pad_token_id),
            callbacks=[rule],
            processing_class=lm.tokenizer,
            phase_one=phase_one,
            config=config,
            method=method,
            weights=WEIGHTS,
        )
        try:
            trainer.train()
        except Interrupted:
            if trainer.state.global_step == 0:
                raise
            rule.interrupted_at(trainer.state.global_step)
    rule.trainer = None  # it holds the optimizer
    if mixed:  # takes autocast off the model's forward again
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return method.trainable.finish(lm, model).eval(), rule
