"""The table of all methods: what each trains, its loss, and its own training values.

The table holds data only and imports no torch. A loss is named by its function in
`baselines/losses.py` or `alter/losses.py`; what a method trains is named by its entry in
`baselines/trainable.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from ..alter import PUBLISHED_THRESHOLD
from ..errors import UserError

# part of a loss -> the TrainingConfig field that weighs it
WEIGHTS = {
    "forget": "forget_weight",
    "retain": "retain_weight",
    "structure": "structure_weight",
    "refusal": "refusal_weight",
}
# losses that use nothing of the frozen model; retain_loss joins them when it is the plain NLL
STANDALONE = {"gradient_ascent_loss", "simnpo_loss", "random_labels_loss", "inverted_hinge_mean"}


@dataclass(frozen=True)
class Method:
    """One way to unlearn.

    `losses` maps a part of the loss to its function. `refusals` says which "I don't know" a step
    gets: "any" of the same sub-domain, the "paired" one to the same question, or "novice" answers
    (ELM). Empty: none.
    """

    losses: dict[str, str]
    trains: str  # "full", "mlp", "lora" or "alter"
    source: str
    training: dict = field(default_factory=dict)  # TrainingConfig values
    gate: str = "softmax"  # of ALTER's adapter: "softmax" as published, or "bank"
    threshold: float | str = "auto"
    uses_entropy: bool = True  # False: no threshold, no isolation, all experts fused everywhere
    plain_text_training: dict = field(default_factory=dict)  # TrainingConfig values for plain texts
    refusals: str = ""

    def needs_frozen_pass(self, training) -> bool:
        """Whether a loss reads the frozen model's outputs, so that phase one must compute them."""
        standalone = STANDALONE | ({"retain_loss"} if training.retain_loss == "nll" else set())
        return self.trains in ("alter", "mlp") or not set(self.losses.values()) <= standalone

    @property
    def trainable(self):
        """The object of `baselines/trainable.py` that this method trains."""
        return import_module("alter_demo.baselines.trainable").TRAINABLE[self.trains]

    def loss_functions(self) -> dict[str, Callable]:
        """{part: function of (LossInputs, TrainingConfig)}."""
        modules = [import_module(f"alter_demo.{m}.losses") for m in ("baselines", "alter")]
        return {
            part: next(getattr(m, name) for m in modules if hasattr(m, name))
            for part, name in self.losses.items()
        }


FULL = {"max_steps": 60, "probe_every": 3, "lr": 5e-5, "retain_loss": "nll"}
LORA = {"max_steps": 60, "probe_every": 3, "lr": 1e-3, "retain_loss": "nll"}
KL = {"retain_loss": "distill"}

METHODS: dict[str, Method] = {
    "grad_ascent": Method({"forget": "gradient_ascent_loss"}, "full", "Maini et al. 2024", FULL),
    "grad_diff": Method(
        {"forget": "gradient_ascent_loss", "retain": "retain_loss"},
        "full", "Maini et al. 2024", FULL | {"lr": 1e-4},
    ),
    "kl_min": Method(
        {"forget": "gradient_ascent_loss", "retain": "retain_loss"},
        "full", "Maini et al. 2024", FULL | KL | {"lr": 1e-4},
    ),
    "npo": Method({"forget": "npo_loss"}, "full", "Zhang et al. 2024", FULL),
    "npo_kl": Method(
        {"forget": "npo_loss", "retain": "retain_loss"},
        "full", "Zhang et al. 2024", FULL | KL | {"max_steps": 120},
    ),
    "npo_gd": Method(
        {"forget": "npo_loss", "retain": "retain_loss"}, "full", "Zhang et al. 2024", FULL
    ),
    "simnpo": Method(
        {"forget": "simnpo_loss", "retain": "retain_loss"},
        "full", "Fan et al. 2024", FULL | {"lr": 1e-4, "npo_beta": 4.5},
    ),
    "idk_dpo": Method(
        {"forget": "dpo_loss", "retain": "retain_loss"},
        "full", "Maini et al. 2024", FULL, refusals="paired",
    ),
    "rmu": Method(
        {"forget": "rmu_loss", "retain": "rmu_retain_loss"},
        "mlp", "Li et al. 2024", FULL | {"lr": 1e-4, "steering_coefficient": 100.0},
    ),
    "random_labels": Method(
        {"forget": "random_labels_loss", "retain": "retain_loss"},
        "full", "Golatkar et al. 2020", FULL,
    ),
    "elm": Method(
        {"forget": "elm_loss", "retain": "retain_loss", "refusal": "refusal_loss"},
        "lora", "Gandikota et al. 2024",
        LORA | KL | {"refusal_weight": 1.0, "elm_eta": 1000.0}, refusals="novice",
    ),
    "lora": Method(
        {"forget": "inverted_hinge_mean", "retain": "retain_loss"},
        "lora", "Hu et al. 2022; IHL of Cha et al. 2025", LORA | {"lr": 2e-3},
    ),
    "asym_lora": Method(
        {"forget": "inverted_hinge_mean", "retain": "retain_loss"},
        "alter", "Tian et al. 2024 (HydraLoRA); IHL of Cha et al. 2025",
        {"max_steps": 60, "probe_every": 3, "retain_loss": "nll", "lr_a": 1e-3, "lr_b": 5e-4},
        "softmax", uses_entropy=False,
    ),
    # as published: softmax gate, fixed threshold, experts act everywhere, B_r learns by NLL
    "alter": Method(
        {"forget": "entropy_guided_loss", "retain": "retain_loss", "structure": "structure_loss"},
        "alter", "Chen et al. 2026", {"retain_loss": "nll", "forget_end_of_turn": True},
        "softmax", threshold=PUBLISHED_THRESHOLD,
    ),
    # a gate with a bank, distillation, threshold from the data, refusals
    "alter_selective": Method(
        {"forget": "entropy_guided_loss", "refusal": "progressive_refusal_loss",
         "retain": "retain_loss", "structure": "structure_loss"},
        "alter", "this project", {"refusal_weight": 3.0, "lr_b": 2e-3}, "bank",
        refusals="any",
        # a text is gone long before the answers to questions about it, and by then B_r has more
        # to correct
        plain_text_training={"max_steps": 240, "stop_ratio": 1e-12, "retain_weight": 4.0},
    ),
}  # fmt: skip


def get_method(name: str) -> Method:
    """An entry of METHODS. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"`method` must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def check_method(name: str, forget_set, load_in_4bit: bool = False) -> None:
    """Raises UserError if the method cannot run on these data or weights."""
    method = get_method(name)
    if load_in_4bit and method.trainable.changes_weights:
        raise UserError(f"{name} trains the weights themselves and cannot train 4-bit weights.")
    has_questions = all(e.question for e in forget_set.training_examples)
    if method.refusals in ("paired", "novice") and not has_questions:
        raise UserError(
            f"{name} needs questions and answers, but {forget_set.name} has plain text."
        )
