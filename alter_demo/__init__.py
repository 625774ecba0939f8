"""ALTER: unlearning for language models by an asymmetric LoRA that token entropy steers.

    run = unlearn("smollm2-135m", "harry-potter")
    run.answer(["What is the name of Harry Potter's school?"])

Imports are lazy: `import alter_demo` costs nothing, the first use of a name brings in torch and transformers.
"""

import logging
from importlib import import_module

# where it is installed peft imports it, and it tells of a faster kernel that it lacks
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
# the keys of methods.METHODS, for a page that is up before torch is
METHOD_NAMES = (
    "grad_ascent", "grad_diff", "kl_min", "npo", "npo_kl", "npo_gd", "simnpo", "idk_dpo", "rmu", "random_labels",
    "elm", "lora", "asym_lora", "alter", "alter_selective",
)  # fmt: skip

_HOMES = {
    "load_model": "models",
    "LM": "models",
    "MODELS": "models",
    "load_forget_set": "data",
    "ForgetSet": "data",
    "FORGET_SETS": "data",
    "AlterConfig": "adapter",
    "TrainConfig": "training",
    "train_config": "training",
    "METHODS": "methods",
    "UnlearnConfig": "runs",
    "Run": "runs",
    "unlearn": "runs",
    "load_run": "runs",
    "learn": "teaching",
    "UserError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
