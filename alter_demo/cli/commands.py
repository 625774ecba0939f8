"""The registry of commands, the arguments they share, and those that the config defines."""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

from ..config import PARTS, part_of
from ..errors import UserError

CONFIG = "config_"  # prefix of the parsed names of config options


@dataclass(frozen=True)
class Command:
    run: Callable[[argparse.Namespace], None]  # its docstring is the help
    arguments: list[tuple[tuple, dict]]  # of ArgumentParser.add_argument
    kept: str  # what stays if the command is interrupted
    config: dict | None  # defaults of the config options, None: the command has none


COMMANDS: dict[str, Command] = {}


def command(*arguments, kept: str = "Nothing was written.", config: dict | None = None):
    """Register a function of the parsed arguments as the command of its name."""

    def register(function: Callable) -> Callable:
        flat = [a for group in arguments for a in (group if isinstance(group, list) else [group])]
        COMMANDS[function.__name__] = Command(function, flat, kept, config)
        return function

    return register


def argument(*names, **options) -> tuple[tuple, dict]:
    return names, options


MODEL = [
    argument("--model", default="smollm2-135m", help="smollm2-135m, a folder, or a hub id"),
    argument("--device", default="auto", help="auto, cpu or cuda"),
    argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32"),
]
FOUR_BIT = argument("--load-in-4bit", action="store_true", help="4-bit base; needs bitsandbytes")
SEED = argument("--seed", type=int, default=0, help="random seed")
SETTINGS = argument(
    "--set", nargs="+", default=[], metavar="NAME=VALUE[,VALUE...]", help="config values to try"
)
RESULTS = Path("assets/results")
RUN = argument("run", type=Path, help="folder of a run")


def results_file(name: str = ""):
    text = f"results file (default: {name or 'one'} in assets/results)"
    return argument("--results", type=Path, default=RESULTS / name if name else None, help=text)


def grid_arguments(seeds=(0, 1, 2)) -> list:
    """Arguments of the commands that compare methods and seeds."""
    text = "store no seconds: the machine is shared"
    return [
        *MODEL,
        FOUR_BIT,
        argument("--seeds", nargs="+", type=int, default=list(seeds), help="random seeds"),
        argument("--untimed", action="store_true", help=text),
        results_file(),
    ]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only if it says something."""

    def _get_help_string(self, action):
        silent = action.default in (None, False, []) or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


# -------------------------------------------------------------------------- options of the config


def value_type(name: str) -> type:
    """The type that the value of a config option is read as."""
    hint = get_type_hints(PARTS[part_of(name)])[name]
    hints = [h for h in get_args(hint) or [hint] if h is not type(None)]
    return tuple if "tuple" in str(hints[0]) else hints[-1]


def add_config_options(parser, **defaults) -> None:
    """One option for each field of the config. Without it the method's own value holds."""
    for part, cls in PARTS.items():
        group = parser.add_argument_group(f"{part} options")
        for field in fields(cls):
            kind, text = value_type(field.name), field.metadata["help"]
            default = defaults.get(field.name)
            if default is not None:
                text = text.partition(" (default")[0] + "; 0: all"
            options = {"dest": CONFIG + field.name, "default": default, "help": text}
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif kind is tuple:
                options |= {"nargs": "+", "metavar": "NAME"}
            else:
                options |= {"type": kind, "choices": field.metadata["choices"]}
                options["metavar"] = None if options["choices"] else kind.__name__.upper()
            if part != "training" and default is None and field.default is not None:
                options["help"] += f" (default: {field.default})"
            flag = field.metadata["flag"] or field.name.replace("_", "-")
            group.add_argument(f"--{flag}", **options)


def config_values(args) -> dict:
    """The config options that were given, by name."""
    values = vars(args).items()
    return {k.removeprefix(CONFIG): v for k, v in values if k.startswith(CONFIG) and v is not None}


def parse_settings(pairs: list[str]) -> dict:
    """Config values from NAME=VALUE; a list of values from NAME=VALUE,VALUE.

    Raises:
        UserError: an unknown name, or a value of another type.
    """
    settings = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        values = [parse_value(name, value, value_type(name)) for value in text.split(",")]
        settings[name] = values if len(values) > 1 else values[0]
    return settings


def parse_value(name: str, text: str, kind: type):
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if name == "threshold" and text != "auto":
            return float(text)
        return kind(text)
    except (ValueError, KeyError):
        expected = {bool: "true or false", str: "a word"}.get(kind, "a number")
        raise UserError(f"`{name}` must be {expected}, got {text!r}.") from None


def print_json(value) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))
