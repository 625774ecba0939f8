"""The probe: examples that decide when training stops, and that no figure reports."""

from dataclasses import replace

from .schema import Example, ForgetSet

PROBE_EXAMPLES = 12


def split_probe(forget_set: ForgetSet) -> tuple[ForgetSet, list[Example]]:
    """Take the probe out of the held-out questions, unless there are fewer than four."""
    if probe := forget_set.probe:
        n = min(PROBE_EXAMPLES, len(probe))
        return forget_set, [probe[k * len(probe) // n] for k in range(n)]
    held_out = forget_set.forget_held_out
    n = min(PROBE_EXAMPLES, len(held_out) // 4)
    if n == 0:
        return forget_set, held_out
    indices = range(0, n * (len(held_out) // n), len(held_out) // n)
    rest = [example for i, example in enumerate(held_out) if i not in indices]
    return replace(forget_set, forget_held_out=rest), [held_out[i] for i in indices]
