"""ALTER: unlearning for language models with an asymmetric LoRA, routed by token entropy.

    run = unlearn("smollm2-135m", "harry-potter")
    run.generate(["What is the name of Harry Potter's school?"])

Names are imported when they are first used, so `import alter_demo` costs nothing.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType

# PEFT imports bitsandbytes where it is installed, and that warns of a kernel that it lacks
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.2.0"

_MODULES = {
    "AdapterConfig": "config",
    "AlterConfig": "alter.tuner",
    "Callback": "callbacks",
    "DataConfig": "config",
    "EvaluationConfig": "config",
    "Example": "data.schema",
    "FORGET_SETS": "data.forget_sets",
    "ForgetSet": "data.schema",
    "LM": "models.loading",
    "METHODS": "baselines.methods",
    "MODELS": "models.built_in",
    "Run": "run",
    "TrainingConfig": "config",
    "UnlearnConfig": "config",
    "UserError": "errors",
    "flat_config": "config",
    "load_forget_set": "data.forget_sets",
    "load_model": "models.loading",
    "load_run": "run",
    "load_target": "models.target",
    "teach": "models.teaching",
    "training_config": "config",
    "unlearn": "unlearn",
}
__all__ = sorted(_MODULES)


class _Package(ModuleType):
    """Importing the module `alter_demo.unlearn` must not hide the function of that name."""

    def __setattr__(self, name, value):
        is_module = name == "unlearn" and isinstance(value, ModuleType)
        super().__setattr__(name, value.unlearn if is_module else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
