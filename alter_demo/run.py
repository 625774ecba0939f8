"""A run: an unlearned model with its record. Generate, trace tokens, measure, save, load."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from .alter.tuner import TokenRouter, has_router
from .callbacks import Callback, CallbackList
from .config import DataConfig, EvaluationConfig
from .data.built_in import shipped_adapters
from .data.probe import split_probe
from .data.schema import Example, ForgetSet
from .errors import UserError
from .evaluation.measure import add_fluency, evaluate_groups
from .evaluation.summary import FORGOTTEN, Log
from .inspection.traces import TokenTrace, trace_tokens
from .models.generation import greedy
from .models.knowledge import fit_to_model
from .models.loading import LM, check_adapter, load_model, model_errors
from .models.memory import memory_errors
from .models.scoring import log_probs
from .record import group_metrics, local_path, measured_groups, read_metrics, write_record
from .run_folder import write_run
from .stopping import BY_HAND


class StopMeasuring(Exception):
    """Somebody stopped the measuring."""


class Run:
    """An unlearned model with its record. `unlearn` and `load_run` make it.

    Attributes:
        lm: the LM that was unlearned; `base_model` gives the model before that.
        model: the unlearned model.
        metrics: what metrics.json holds.
        forget_set: as it was fitted to the model; None for a run from disk.
        logs: {"before", "after", "retain model"} -> log, once measured.
        path: the folder, once saved.
    """

    def __init__(self, lm: LM, model, metrics: dict, forget_set: ForgetSet | None = None):
        self.lm, self.model, self.metrics = lm, model.eval(), metrics
        self.forget_set, self.path = forget_set, None
        self.logs: dict[str, Log] = {}
        self.base = None  # the base model, where the run's own weights have changed

    def generate(
        self, prompts: list[str], adapted: bool = True, max_new_tokens: int = 64, progress=None
    ) -> list[str]:
        """Greedy answers of the unlearned model, or of the base model if not `adapted`."""
        if not 1 <= max_new_tokens <= 4096:
            raise UserError(f"`max_new_tokens` must be in [1, 4096], got {max_new_tokens}.")
        with self.side(adapted) as model:
            return greedy(self.lm, prompts, max_new_tokens, model, progress)

    def log_probs(
        self, questions: list[str], answers: list[str], adapted: bool = True
    ) -> list[float]:
        """Mean log-probability per answer token in nats, end of turn included."""
        with self.side(adapted) as model:
            return log_probs(self.lm, questions, answers, model)

    def trace_tokens(self, text: str, question: str | None = None) -> list[TokenTrace]:
        """Token traces of a plain text, or of `text` as the answer to `question`."""
        return trace_tokens(self, text, question)

    def side(self, adapted: bool):
        """Context that gives the unlearned model, or the base model."""
        return nullcontext(self.model) if adapted else self.base_model()

    @contextmanager
    def base_model(self):
        """Context that gives the model before unlearning.

        An adapter is switched off. Where the weights have changed, the base is loaded again.
        """
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            if self.base is None:
                lm = self.lm
                self.base = load_model(lm.name, lm.device, lm.dtype, lm.adapter).model
            yield self.base

    @property
    def has_router(self) -> bool:
        """Whether the method has a router."""
        return has_router(self.model)

    @property
    def router(self) -> TokenRouter:
        """The router. Raises UserError if the method has none."""
        if not self.has_router:
            raise UserError("This run's method has no router. Only ALTER routes tokens.")
        return self.model.get_base_model().token_router

    def force_route(self, force):
        """Context in which every token goes one way: "off", "r", or a forgetting expert."""
        return self.routing(force, None)

    @contextmanager
    def follow_plan(self, plan):
        """Context that gives the unlearned model, routed by `plan`; None without a router."""
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

    def evaluate(
        self,
        callbacks: list[Callback] = (),
        before: Log | None = None,
        retain_log: Log | None = None,
        retain_adapter: Path | str | None = "auto",
        forget_set: ForgetSet | None = None,
    ) -> dict:
        """Measure the groups of the forget set before and after; fills `logs` and `metrics`.

        Save the run first: measuring may take longer than unlearning. A saved run's record is
        written again at the end. Stopped by hand, the run stays without figures.

        Args:
            before, retain_log: logs of the base and of the retain model, if measured already.
            retain_adapter: LoRA of the retain model; "auto" takes the shipped one.
            forget_set: needed for a run from disk.
        Returns:
            `metrics`.
        """
        callback = CallbackList(callbacks)
        if forget_set is not None:
            data = self.stored_config("data", DataConfig)
            self.forget_set, _ = fit_forget_set(forget_set, self.lm, data, callback)
        if self.forget_set is None:
            raise UserError("A run from disk holds no data. Pass `forget_set`.")
        if retain_adapter == "auto":
            retain_adapter = self.shipped_retain_adapter()
        started, logs = time.perf_counter(), {}
        try:
            with memory_errors():
                self.measure(logs, callback, before, retain_log, retain_adapter)
        except StopMeasuring:
            logs = {}  # an incomplete log cannot be compared
        self.metrics["seconds"]["evaluate"] = round(time.perf_counter() - started, 1)
        self.logs = logs
        self.metrics |= group_metrics(logs) | {"measured": "after" in logs}
        if self.path is not None and logs:
            write_record(self.metrics, logs, self.path)
        return self.metrics

    def measure(self, logs: dict, callback: Callback, before, retain_log, retain_adapter) -> None:
        """Fill `logs`. Raises StopMeasuring."""
        evaluation, lm = self.stored_config("evaluation", EvaluationConfig), self.lm
        groups = measured_groups(self.forget_set, evaluation)
        # the request that ended the training is not meant for the measuring
        ignored = self.metrics["stopped"] == BY_HAND

        def log_of(side: str, lm: LM, model, groups: dict[str, list[Example]]) -> Log:
            def on_stage(stage: str, share: float) -> None:
                nonlocal ignored
                callback.on_stage(f"{stage}, {side}", share)
                stop = callback.should_stop()
                if stop and not ignored:
                    raise StopMeasuring
                ignored = ignored and stop

            return evaluate_groups(lm, model, groups, evaluation.tokens, on_stage)

        with self.base_model() as base:
            logs["before"] = before or log_of("before", lm, base, groups)
        logs["after"] = log_of("after", lm, self.model, groups)
        with self.base_model() as base:
            for log in logs.values():
                add_fluency(lm, base, log)
        if retain_log is not None:
            logs["retain model"] = retain_log
        elif retain_adapter is not None:
            retain = load_model(lm.name, lm.device, lm.dtype, retain_adapter, lm.load_in_4bit)
            forgotten = {k: v for k, v in groups.items() if k in FORGOTTEN}
            logs["retain model"] = log_of("retain model", retain, retain.model, forgotten)

    def stored_config(self, part: str, cls):
        """A part of the run's config; the defaults where a run of 0.1 did not store it."""
        return cls(**self.metrics["config"].get(part, {}))

    def shipped_retain_adapter(self) -> Path | None:
        """The retain model's adapter in assets/, if the target is the one beside it."""
        shipped = shipped_adapters(self.forget_set.name, self.lm.name)
        return shipped.get("retain") if str(shipped.get("target")) == self.lm.adapter else None

    def save(self, path: Path | str) -> Path:
        """Write the run (adapter or model, config.json, metrics.json, logs) and set `path`.

        Raises:
            UserError: the disk refuses; then nothing is written.
        """
        self.path = write_run(self, Path(path))
        return self.path


def fit_forget_set(
    forget_set: ForgetSet, lm: LM, config: DataConfig, callback: Callback
) -> tuple[ForgetSet, list[Example]]:
    """The set as this model knows it, and the probe, taken out of its groups."""

    def progress(done: int, total: int) -> None:
        callback.on_stage("the model's own answers", done / total)

    return split_probe(fit_to_model(forget_set, lm, config.general, progress))


def load_run(path: Path | str, lm: LM | None = None) -> Run:
    """A run from its folder.

    Args:
        lm: the base model, if it is in memory already.
    Raises:
        UserError: no such run, a damaged file, or pickled weights.
    """
    path = Path(path)
    metrics = read_metrics(path)
    whole = (path / "model").is_dir()
    if not whole:
        check_adapter(path / "adapter")
    if lm is None:  # in another precision the model would give other answers
        loading = {k: metrics[k] for k in ("dtype", "load_in_4bit") if k in metrics}
        lm = load_model(metrics["model"], adapter=local_path(metrics.get("adapter")), **loading)
    if whole:
        run = Run(lm, load_model(str(path / "model"), lm.device, lm.dtype).model, metrics)
        run.base = lm.model
    else:
        with model_errors(str(path / "adapter")):
            run = Run(lm, PeftModel.from_pretrained(lm.model, path / "adapter"), metrics)
    run.path = path
    return run


def next_round(run: Run) -> tuple[LM, dict[str, torch.Tensor] | None]:
    """What sequential unlearning goes on from: the model, and ALTER's experts if there are any.

    Trained weights stay, a LoRA is merged, and ALTER's A and B go to the next adapter.
    """
    if not isinstance(run.model, PeftModel):
        return run.lm, None
    if not run.has_router:
        return replace(run.lm, model=run.model.merge_and_unload()), None
    parameters = run.model.named_parameters()
    experts = {n: p.detach().clone() for n, p in parameters if ".alter_A." in n or ".alter_B." in n}
    return replace(run.lm, model=run.model.unload()), experts
