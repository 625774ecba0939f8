"""Every way of unlearning, one entry each in `METHODS`: what is trained, the parts of its loss, its defaults.

A loss sees one forward pass as a `Step`: answer positions only, with what the frozen model said there (phase I keeps
it for each sample, so no method needs a second model in memory). NLL is a mean over positions, S(y) the sum of an
answer's log-probabilities, r = S_theta - S_frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from . import losses
from .entropy import PUBLISHED_THRESHOLD, tsallis_entropy
from .errors import UserError


@dataclass
class Step:
    """n answer positions of the B samples of a batch: forget samples first, then retain samples, then refusals."""

    logits: torch.Tensor  # (n, V)
    labels: torch.Tensor  # (n,)
    row: torch.Tensor  # (n,) sample that the position belongs to
    kind: torch.Tensor  # (B,) 0 retain, 1 forget, 2 said instead (a refusal)
    domain: torch.Tensor  # (n,) sub-domain from 1, 0 for retain
    end: torch.Tensor  # (n,) bool, the label is the end of turn
    frozen_log_p: torch.Tensor  # (n,) the label's log-probability
    top_ids: torch.Tensor  # (n, TOP) the frozen model's likeliest tokens
    top_log_p: torch.Tensor  # (n, TOP)
    entropy: torch.Tensor  # (n,) S_q of the frozen model
    high: torch.Tensor  # (n,) bool, uncertain
    q: float = 1.5
    hidden: torch.Tensor | None = None  # (n, D) state of the steered layer
    frozen_hidden: torch.Tensor | None = None  # (n, D)

    def on(self, kind: int) -> torch.Tensor:
        return (self.kind == kind)[self.row]

    def nll(self, on: torch.Tensor) -> torch.Tensor:
        return losses.nll(self.logits[on], self.labels[on])

    def sums(self, values: torch.Tensor, kind: int) -> torch.Tensor:
        """Sum of (n,) values over each sample of one kind, (samples of that kind,)."""
        total = values.new_zeros(len(self.kind)).index_add(0, self.row, values)
        return total[self.kind == kind]

    def log_ratio(self, kind: int) -> torch.Tensor:
        """r = S_theta - S_frozen of each sample of one kind."""
        log_p = -self.nll(torch.ones_like(self.end))
        return self.sums(log_p - self.frozen_log_p, kind)


RETAIN, FORGET, INSTEAD = 0, 1, 2  # Step.kind


# ----------------------------------------------------------------------------------------------------- forgetting


def ascent(s: Step, c) -> torch.Tensor:
    return -s.nll(s.on(FORGET)).mean()


def npo(s: Step, c) -> torch.Tensor:
    """-(2/b) log sigmoid(-b r_f): ascent that slows down as the answer goes (Zhang et al. 2024)."""
    return (2 / c.sharpness) * F.softplus(c.sharpness * s.log_ratio(FORGET)).mean()


def simnpo(s: Step, c) -> torch.Tensor:
    """-(2/b) log sigmoid(b NLL_f): NPO without a reference, normalised by length (Fan et al. 2024)."""
    values = s.nll(torch.ones_like(s.end))
    mean = s.sums(values, FORGET) / s.sums(torch.ones_like(values), FORGET)
    return (2 / c.sharpness) * F.softplus(-c.sharpness * mean).mean()


def dpo(s: Step, c) -> torch.Tensor:
    """-(2/b) log sigmoid(b (r_idk - r_f)): "I don't know" preferred to the answer (Maini et al. 2024)."""
    return (2 / c.sharpness) * F.softplus(-c.sharpness * (s.log_ratio(INSTEAD) - s.log_ratio(FORGET))).mean()


def random_labels(s: Step, c) -> torch.Tensor:
    on = s.on(FORGET)
    return losses.nll(s.logits[on], torch.randint_like(s.labels[on], s.logits.shape[-1])).mean()


def steer(s: Step, c) -> torch.Tensor:
    """Forget states towards c u, u a fixed random direction (RMU, Li et al. 2024)."""
    generator = torch.Generator().manual_seed(c.seed)
    u = torch.rand(s.hidden.shape[-1], generator=generator).to(s.hidden.device)
    return F.mse_loss(s.hidden[s.on(FORGET)], (c.steering * u / u.norm()).expand(int(s.on(FORGET).sum()), -1))


def inverted_hinge(s: Step, c) -> torch.Tensor:
    on = s.on(FORGET)
    return losses.inverted_hinge_loss(s.logits[on], s.labels[on]).mean()


def entropy_guided(s: Step, c) -> torch.Tensor:
    """ALTER: sum over the sub-domains of the mean over the confident tokens of each, by IHL or unlikelihood."""
    on = s.on(FORGET) & ~s.high
    if not c.forget_end:
        on &= ~s.end
    if not on.any():
        return s.logits.new_zeros((), dtype=torch.float32)
    per_token = losses.FORGETTING[c.forgetting](s.logits[on], s.labels[on])
    domain = s.domain[on]
    return sum(per_token[domain == d].mean() for d in domain.unique())


ALONE = (ascent, simnpo, random_labels, inverted_hinge)  # ask nothing of the frozen model


# --------------------------------------------------------------------------------------------------------- keeping


def keep(s: Step, c) -> torch.Tensor:
    on = s.on(RETAIN)
    if not on.any():
        return s.logits.new_zeros((), dtype=torch.float32)
    if c.retention == "nll":
        return s.nll(on).mean()
    return losses.distillation(s.logits[on], s.top_ids[on], s.top_log_p[on]).mean()


def keep_states(s: Step, c) -> torch.Tensor:
    on = s.on(RETAIN)
    return F.mse_loss(s.hidden[on], s.frozen_hidden[on])


def said_instead(s: Step, c) -> torch.Tensor:
    on = s.on(INSTEAD)
    return s.nll(on).mean() if on.any() else s.logits.new_zeros((), dtype=torch.float32)


def said_as_it_goes(s: Step, c) -> torch.Tensor:
    """IHL hardly moves a token of p near 1: what is still memorised comes first, what to say instead after it."""
    on = s.on(FORGET) & ~s.high
    if not c.forget_end:
        on &= ~s.end
    gone = 1 - (-s.nll(on)).exp().mean().nan_to_num(0).detach()
    return gone * said_instead(s, c)


def structure(s: Step, c) -> torch.Tensor:
    """First-order form of lambda ||grad_A S_q||^2: the entropy of uncertain tokens stays where it was."""
    if not (c.structure and s.high.any()):
        return s.logits.new_zeros((), dtype=torch.float32)
    return (tsallis_entropy(s.logits[s.high], s.q) - s.entropy[s.high]).square().mean()


def erase(s: Step, c) -> torch.Tensor:
    """KL to P (P_novice / P_expert)^eta of the frozen model (ELM, Gandikota et al. 2024); see `runs.novice_targets`."""
    on = s.on(FORGET)
    return losses.distillation(s.logits[on], s.top_ids[on], s.top_log_p[on]).mean()


# ------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """`parts` maps a part's name to its function; its weight is the TrainConfig field of the name in WEIGHTS."""

    parts: dict[str, Callable]
    trains: str  # "full" (all weights), "mlp" (three layers' MLPs), "lora", "alter"
    source: str
    train: dict = field(default_factory=dict)  # TrainConfig values
    alter: dict = field(default_factory=dict)  # AlterConfig values
    threshold: float | str = "auto"
    guided: bool = True  # False: no entropy, no isolation; all experts learn everywhere
    texts: dict = field(default_factory=dict)  # TrainConfig values where plain texts are unlearned
    instead: str = ""  # what is said instead: "refusals", "paired" (to the same question), "novice" (ELM)

    def looks(self, config) -> bool:
        """Whether it takes anything from the frozen model, so that phase I is worth its time."""
        alone = {*ALONE, keep} if config.retention == "nll" else {*ALONE}
        return self.trains in ("alter", "mlp") or not {*self.parts.values()} <= alone


WEIGHTS = {"forget": "beta", "retain": "gamma", "structure": "structure", "refusal": "refusal"}
FULL = {"max_steps": 60, "probe_every": 3, "lr": 5e-5, "retention": "nll"}
LORA = {"max_steps": 60, "probe_every": 3, "lr": 1e-3, "retention": "nll"}
KL = {"retention": "distill"}

METHODS: dict[str, Method] = {
    "grad_ascent": Method({"forget": ascent}, "full", "Maini et al. 2024", FULL),
    "grad_diff": Method({"forget": ascent, "retain": keep}, "full", "Maini et al. 2024", FULL | {"lr": 1e-4}),
    "kl_min": Method({"forget": ascent, "retain": keep}, "full", "Maini et al. 2024", FULL | KL | {"lr": 1e-4}),
    "npo": Method({"forget": npo}, "full", "Zhang et al. 2024", FULL),
    "npo_kl": Method({"forget": npo, "retain": keep}, "full", "Zhang et al. 2024", FULL | KL | {"max_steps": 120}),
    "npo_gd": Method({"forget": npo, "retain": keep}, "full", "Zhang et al. 2024", FULL),
    "simnpo": Method(
        {"forget": simnpo, "retain": keep}, "full", "Fan et al. 2024",
        FULL | {"lr": 1e-4, "sharpness": 4.5},
    ),
    "idk_dpo": Method({"forget": dpo, "retain": keep}, "full", "Maini et al. 2024", FULL, instead="paired"),
    "rmu": Method(
        {"forget": steer, "retain": keep_states}, "mlp", "Li et al. 2024", FULL | {"lr": 1e-4, "steering": 100.0}
    ),
    "random_labels": Method({"forget": random_labels, "retain": keep}, "full", "Golatkar et al. 2020", FULL),
    "elm": Method(
        {"forget": erase, "retain": keep, "refusal": said_instead}, "lora", "Gandikota et al. 2024",
        LORA | KL | {"refusal": 1.0, "eta": 1000.0}, instead="novice",
    ),
    "lora": Method(
        {"forget": inverted_hinge, "retain": keep}, "lora", "Hu et al. 2022; IHL of Cha et al. 2025",
        LORA | {"lr": 2e-3},
    ),
    "asym_lora": Method(
        {"forget": inverted_hinge, "retain": keep}, "alter", "Tian et al. 2024 (HydraLoRA); IHL of Cha et al. 2025",
        {"max_steps": 60, "probe_every": 3, "retention": "nll", "lr_a": 1e-3, "lr_b": 5e-4}, {"gate": "softmax"},
        guided=False,
    ),
    # as published: softmax gate, fixed threshold, experts act everywhere, B_r learns by NLL
    "alter": Method(
        {"forget": entropy_guided, "retain": keep, "structure": structure}, "alter", "Chen et al. 2026",
        {"retention": "nll", "forget_end": True}, {"gate": "softmax"}, threshold=PUBLISHED_THRESHOLD,
    ),
    # calibrated two-level gate, distillation to the frozen model, threshold from the data, taught what to say instead
    "alter_selective": Method(
        {"forget": entropy_guided, "refusal": said_as_it_goes, "retain": keep, "structure": structure}, "alter",
        "this project", {"refusal": 3.0, "lr_b": 2e-3}, {"gate": "two_level"}, instead="refusals",
        # a text is gone long before the answers to questions about it, and B_r has more to put right by then
        texts={"max_steps": 240, "stop_ratio": 1e-12, "gamma": 4.0},
    ),
}  # fmt: skip


def get_method(name: str) -> Method:
    if name not in METHODS:
        raise UserError(f"The method is one of {', '.join(METHODS)}, not {name!r}.")
    return METHODS[name]
