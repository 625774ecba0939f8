"""Every option of a run, documented once. The command line and the page are built from this file.

`UnlearnConfig` nests four parts: the adapter, the training, the data and the evaluation. This
module imports no torch, which keeps `--help` and the page fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from .alter import DEFAULT_Q, MAX_EXPERTS
from .baselines.methods import METHODS, get_method
from .errors import UserError
from .options import check_ranges, option

LAYERS = ("all", "attention", "mlp", "first_third", "last_third")


@dataclass
class AdapterConfig:
    """What ALTER adds to the model. The last three switches exist for the ablation."""

    r: int = option(8, "rank of A and of every B", 1, 256)
    n_experts: int | None = option(
        None, "forgetting experts (default: set by clustering)", 1, MAX_EXPERTS
    )
    q: float = option(DEFAULT_Q, "order of the Tsallis entropy", 1e-3, 100.0)
    threshold: float | str | None = option(
        None, 'S_q above which a token is uncertain, a number or "auto" (default: the method\'s)'
    )
    router_input: str = option("context", "what the gate reads", choices=("context", "entropy"))
    feature_layer: int | None = option(
        None, "hidden state that the gate reads (default: at 1/5 of the depth, or 5/6)", 0
    )
    layers: str = option("all", "layers to adapt", choices=LAYERS)
    entropy_mask: bool = option(True, "false: no token counts as uncertain, A learns from all")
    isolation: bool = option(True, "false: A and every expert learn wherever they act")
    router: bool = option(True, "false: one expert that acts on every token")


@dataclass
class TrainingConfig:
    """How phase two trains. Each method has values of its own: see `training_config`."""

    max_steps: int = option(120, "maximum number of steps", 1, 10_000)
    batch_size: int = option(4, "forget samples per step, with as many retain samples", 1, 256)
    lr_b: float = option(1e-3, "learning rate of the experts", 0.0, 1.0)
    lr_a: float = option(1e-5, "learning rate of A", 0.0, 1.0)
    lr: float = option(1e-5, "learning rate of a baseline's weights or LoRA", 1e-12, 1.0)
    forget_weight: float = option(1.0, "weight of the forget loss")
    retain_weight: float = option(1.0, "weight of the retain loss")
    structure_weight: float = option(0.01, "weight of the structure loss, lambda in the paper")
    refusal_weight: float = option(0.0, "weight of the refusal loss; 0 teaches no refusals")
    forget_loss: str = option("ihl", "ALTER's forget loss", choices=("ihl", "unlikelihood"))
    retain_loss: str = option(
        "distill", "distill: KL to the frozen model; nll: as published", choices=("distill", "nll")
    )
    npo_beta: float = option(0.1, "beta of NPO, SimNPO and DPO", 1e-9)
    steering_coefficient: float = option(2.0, "c of RMU, the length of its target vector")
    elm_eta: float = option(5.0, "eta of ELM, the strength of erasing")
    forget_end_of_turn: bool = option(False, "unlearn the end-of-turn token too (as published)")
    probe_every: int = option(6, "steps between two measurements of the probe", 1)
    stop_ratio: float = option(
        0.001, "stop when the probe has fallen to this share of its start", 1e-300, 1 - 1e-9
    )
    stop_truth_ratio: float = option(
        0.0, "stop at this ratio of right to wrong answers; 0: that of unlearned knowledge", 0.0
    )
    gradient_checkpointing: bool = option(False, "use less memory and more time")
    seed: int = option(0, "random seed", 0, 2**32 - 1)

    def __post_init__(self):
        check_ranges(self)


@dataclass
class DataConfig:
    """How much of what must stay is trained on."""

    general: int = option(
        160, "everyday prompts among the retain samples", 0, flag="general-prompts"
    )
    retain: int = option(
        240, "retain samples in all, but at least the everyday prompts", 0, flag="retain-samples"
    )


@dataclass
class EvaluationConfig:
    """What `Run.evaluate` measures."""

    limit: int | None = option(None, "examples per group (default: all)", 2)
    kept: int | None = option(None, "examples per group that must stay (default: limit)", 1)
    groups: tuple[str, ...] | None = option(None, "groups to measure (default: all)")
    tokens: int = option(64, "maximum answer length in tokens", 1, 4096)


@dataclass
class UnlearnConfig:
    """All user-facing options. `training=None` takes the method's own values."""

    method: str = option("alter_selective", "one of the methods", choices=tuple(METHODS))
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def for_set(self, plain_text: bool) -> UnlearnConfig:
        """This config with the training values filled in, checked.

        Raises:
            UserError: an unknown method, or a value out of its range.
        """
        training = self.training or training_config(self.method, plain_text)
        config = replace(self, training=training)
        check_ranges(config)
        return config


def training_config(method: str, plain_text: bool = False, **values) -> TrainingConfig:
    """A method's own training values, with those of `values` that are not None in their place.

    Args:
        plain_text: the forget set holds plain texts (`ForgetSet.is_plain_text`).
    Raises:
        UserError: an unknown method, or a value out of its range.
    """
    entry = get_method(method)
    defaults = entry.training | (entry.plain_text_training if plain_text else {})
    return TrainingConfig(**defaults | {k: v for k, v in values.items() if v is not None})


def flat_config(method: str, values: dict, plain_text: bool = False) -> UnlearnConfig:
    """An `UnlearnConfig` from flat values such as `{"r": 4, "lr_b": 1e-3}`, whatever their part.

    A value of None is the default.
    """
    parts: dict[str, dict] = {"adapter": {}, "training": {}, "data": {}, "evaluation": {}}
    for name, value in values.items():
        if value is not None:
            parts[part_of(name)][name] = value
    return UnlearnConfig(
        method,
        AdapterConfig(**parts["adapter"]),
        training_config(method, plain_text, **parts["training"]),
        DataConfig(**parts["data"]),
        EvaluationConfig(**parts["evaluation"]),
    ).for_set(plain_text)


PARTS = {
    "adapter": AdapterConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "evaluation": EvaluationConfig,
}


def part_of(name: str) -> str:
    """The part of `UnlearnConfig` that holds option `name`. Raises UserError for an unknown one."""
    for part, cls in PARTS.items():
        if name in cls.__dataclass_fields__:
            return part
    known = ", ".join(f.name for cls in PARTS.values() for f in fields(cls))
    raise UserError(f"Unknown option {name!r}. Choose one of {known}.")
