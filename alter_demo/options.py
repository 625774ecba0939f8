"""Config fields with a help text and a range, and the one place that checks the range."""

from dataclasses import field, fields, is_dataclass
from typing import Any

from .errors import UserError


def option(default, help: str, low=None, high=None, choices=None, flag=None):
    """A config field with its help text, its range (bounds included), and its command-line flag."""
    metadata = {"help": help, "min": low, "max": high, "choices": choices, "flag": flag}
    return field(default=default, metadata=metadata)


def check_ranges(config) -> None:
    """Raises UserError if a value lies outside the range or the choices of its field."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            check_ranges(value)
        elif value is not None and f.metadata:
            check_value(f.name, value, f.metadata)


def check_value(name: str, value: Any, metadata) -> None:
    low, high, choices = (metadata.get(k) for k in ("min", "max", "choices"))
    if choices and value not in choices:
        raise UserError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
    if low is not None and not value >= low:
        bounds = f"in [{low:g}, {high:g}]" if high is not None else f"at least {low:g}"
        raise UserError(f"`{name}` must be {bounds}, got {value:g}.")
    if high is not None and not value <= high:
        raise UserError(f"`{name}` must be in [{low:g}, {high:g}], got {value:g}.")
