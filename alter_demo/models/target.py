"""The target model: the one that has learned what is to be forgotten."""

from ..data.built_in import shipped_adapters
from ..data.schema import ForgetSet
from ..errors import UserError
from .built_in import MODELS
from .loading import LM, load_model


def load_target(
    name: str, forget_set: ForgetSet, device="auto", dtype="auto", adapter=None, load_in_4bit=False
) -> LM:
    """The model that has learned the set. Raises UserError if it must be taught first."""
    if forget_set.needs_teaching and adapter is None:
        adapter = shipped_adapters(forget_set.name, name).get("target")
        # public checkpoints have learned TOFU or MUSE; the built-in model has not
        if adapter is None and (name in MODELS or not forget_set.public_checkpoints):
            raise UserError(
                f"{name} has not learned {forget_set.name}. Teach it first: "
                "python -m alter_demo teach --help."
            )
    return load_model(name, device, dtype, adapter, load_in_4bit)
