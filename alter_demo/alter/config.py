"""The configuration of an ALTER adapter, saved as `adapter_config.json`."""

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils import PeftType

from ..errors import UserError
from ..options import check_ranges, option
from . import DEFAULT_Q, MAX_EXPERTS, PUBLISHED_THRESHOLD
from .entropy import entropy_range


def register_type() -> None:
    """Add ALTER to PEFT's enum of adapter types: PEFT offers no entry point for outside tuners."""
    if "ALTER" not in PeftType.__members__:
        member = str.__new__(PeftType, "ALTER")
        member._name_, member._value_ = "ALTER", "ALTER"
        PeftType._member_map_["ALTER"] = PeftType._value2member_map_["ALTER"] = member
        PeftType._member_names_.append("ALTER")
        type.__setattr__(PeftType, "ALTER", member)


register_type()


@dataclass
class AlterConfig(PeftConfig):
    """The resolved settings of one adapter. A person sets `alter_demo.config.AdapterConfig`.

    Raises:
        UserError: a value out of its range.
    """

    r: int = option(8, "rank of A and of every B", 1, 256)
    scaling: float = option(4.0, "factor of the update, LoRA's alpha / r")
    target_modules: list[str] | str | None = option("all-linear", "layers to adapt")
    layers_to_transform: list[int] | int | None = option(None, "only these layer numbers")
    layers_pattern: list[str] | str | None = option(None, "name of the layer list")
    exclude_modules: list[str] | str | None = option(None, "layers to leave alone")
    n_experts: int = option(1, "forgetting experts N; B_r is one more", 1, MAX_EXPERTS)
    q: float = option(DEFAULT_Q, "order of the Tsallis entropy")
    threshold: float = option(PUBLISHED_THRESHOLD, "S_q above it: uncertain, route A")
    gate: str = option(
        "softmax", "as published, or a bank of stored prompts", choices=("softmax", "bank")
    )
    gate_threshold: float = option(0.0, "bank: score above which experts act")
    gate_evidence: float = option(0.0, "bank: token weight below which experts do not act")
    bank_dim: int = option(128, "bank: dimensions of a stored prompt", 1, 4096)
    bank_forget: int = option(0, "bank: number of stored forget entries")
    bank_retain: int = option(0, "bank: number of stored retain entries")
    answer_marker: list[int] = option(None, "bank: token ids with which a prompt ends")
    end_tokens: list[int] = option(None, "bank: token ids that end an answer")
    router_input: str = option(
        "context", "hidden states, or the entropy as published", choices=("context", "entropy")
    )
    feature_layer: int = option(-1, "hidden state that the gate reads, -1 is the last")
    feature_decay: float = option(0.97, "weight of the past in the context, 1 is a plain mean")
    tau_high: float = option(0.8, "temperature of the fusion for uncertain tokens")
    top_k: int = option(3, "experts fused for an uncertain token")

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ALTER
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.gate == "two_level":
            raise UserError("This adapter has the gate of version 0.1. Unlearn again to make one.")
        check_ranges(self)
        top = entropy_range(2**31, self.q)
        if not 0 < self.threshold < top:
            raise UserError(
                f"`threshold` must be in (0, {top:.3g}), the range of S_q at q = {self.q:g}, "
                f"got {self.threshold:g}."
            )
