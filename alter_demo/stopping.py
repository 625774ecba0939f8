"""When training stops: the probe of held-out examples, and the rule that reads it."""

import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from transformers import TrainerCallback

from .alter.trainer import UnlearnTrainer
from .alter.tuner import has_router, routing_state
from .callbacks import Callback
from .data.schema import Example, ForgetSet
from .errors import Diverged
from .models.generation import greedy
from .models.loading import LM, load_model
from .models.scoring import answer_likelihood

LIVE_TOKENS = 24  # maximum length of a live answer
ALL_STEPS = "all steps done"
TARGET_REACHED = "the probe reached its target"
BY_HAND = "stopped by hand"


class Probe:
    """Measures how likely the right answers are while `model` trains.

    Args:
        examples: if any has wrong answers, right ones are compared with those.
        mixed: training runs under bfloat16 autocast.
    """

    def __init__(self, lm: LM, model, examples: list[Example], mixed: bool):
        self.lm, self.model, self.examples, self.mixed = lm, model, examples, mixed
        self.plans: list = []  # of the batches: they come from the frozen model and never change

    def measure(self) -> float:
        known, plans = iter(self.plans), []

        def routed(**batch):
            state = routing_state(self.model)
            state.plan = next(known, None)
            out = self.model(**batch)
            plans.append(state.last_plan)
            return out

        with evaluation_mode(self.model, self.lm, self.mixed):
            forward = routed if has_router(self.model) else self.model
            value = answer_likelihood(self.lm, self.examples, forward)
        self.plans = plans
        return value

    def target(self, training, never_taught: list[Example]) -> float | None:
        """The value at which training stops; None: a share of the first value.

        Where wrong answers are compared, it is the value where nothing was learned: of this model
        on examples that nobody taught it, else of the model before it was taught.
        """
        if not any(e.perturbed_answer for e in self.examples):
            return None
        lm = self.lm
        if training.stop_truth_ratio:
            return training.stop_truth_ratio
        if never_taught:  # an adapter from an earlier round has forgotten already
            is_adapter = isinstance(self.model, PeftModel)
            with self.model.disable_adapter() if is_adapter else nullcontext():
                return answer_likelihood(lm, never_taught)
        if lm.adapter is None:
            return 1.0
        untaught = load_model(lm.name, lm.device, lm.dtype, load_in_4bit=lm.load_in_4bit)
        return answer_likelihood(untaught, self.examples)


@contextmanager
def evaluation_mode(model, lm: LM, mixed: bool):
    """During training: evaluation mode, routes by the router, autocast if `mixed`."""
    state = routing_state(model) if has_router(model) else None
    plan = state and state.plan
    if state:
        state.plan = None
    model.eval()
    kind = "cuda" if lm.device.startswith("cuda") else "cpu"
    try:
        with torch.autocast(kind, torch.bfloat16) if mixed else nullcontext():
            yield
    finally:
        model.train()
        if state:
            state.plan = plan


class StoppingRule(TrainerCallback):
    """Keeps the history, measures the probe, and stops the training when the target is reached.

    Args:
        measure: step -> value of the probe.
        target: value to reach; None: `stop_ratio` of the first value.
    """

    def __init__(
        self, training, measure: Callable[[int], float], target: float | None, callback: Callback
    ):
        self.training, self.measure, self.callback = training, measure, callback
        self.trainer: UnlearnTrainer | None = None
        self.reason, self.started = ALL_STEPS, time.perf_counter()
        start = measure(0)
        self.target = target or start * training.stop_ratio
        self.history: list[dict] = [{"step": 0, "seconds": 0.0, "probe": start}]

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        step, seconds = state.global_step, round(time.perf_counter() - self.started, 2)
        entry = {"step": step, "seconds": seconds}
        entry |= {k: round(v, 5) for k, v in self.trainer.parts.items()}
        if step % self.training.probe_every == 0 or step == state.max_steps:
            entry["probe"] = self.measure(step)
            if not math.isfinite(entry["probe"]):
                raise Diverged
            entry["probe_share"] = entry["probe"] / (self.history[0]["probe"] or 1.0)
            if entry["probe"] <= self.target:
                self.reason, control.should_training_stop = TARGET_REACHED, True
        self.history.append(entry)
        self.callback.on_step(entry, state.max_steps)
        if self.callback.should_stop():
            self.reason, control.should_training_stop = BY_HAND, True
        return control

    def interrupted_at(self, step: int) -> None:
        """The caller left: the steps before this one are whole and stay."""
        if step > self.history[-1]["step"]:  # the probe was being measured
            self.history.append({"step": step, "seconds": self.history[-1]["seconds"]})
        self.reason = BY_HAND


def answer_live(step: int, model, lm: LM, forget_set: ForgetSet, callback: Callback) -> None:
    """Tell the callback greedy answers to two forget and two retain questions."""
    parts = {"forget": forget_set.forget, "retain": [*forget_set.retain, *forget_set.general]}
    rows = [
        (k, e.question) for k, part in parts.items() for e in [e for e in part if e.question][:2]
    ]
    answers = greedy(lm, [question for _, question in rows], LIVE_TOKENS, model)
    callback.on_answers(step, [(*row, a) for row, a in zip(rows, answers, strict=True)])
