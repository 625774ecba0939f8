"""The registry of forget sets. Add a set here with a function that returns a `ForgetSet`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import UserError
from .benchmarks import muse, tofu, wmdp
from .built_in import harry_potter, imaginary_authors, school
from .files import forget_set_from_files
from .schema import ForgetSet

FORGET_SETS: dict[str, Callable[[], ForgetSet]] = {
    "harry-potter": harry_potter,
    "imaginary-authors": imaginary_authors,
    **{f"tofu-{split}": partial(tofu, split) for split in ("forget01", "forget05", "forget10")},
    **{f"muse-{split}": partial(muse, split) for split in ("news", "books")},
    "school": school,
    **{f"wmdp-{split}": partial(wmdp, split) for split in ("bio", "cyber")},
}


def load_forget_set(name: str, retain: str | None = None) -> ForgetSet:
    """A forget set by name or from the user's own files.

    Args:
        name: a key of `FORGET_SETS`, or the path of a .jsonl, .json or .csv file.
        retain: path of a second file with what to keep; only with a file.

    Raises:
        UserError: the set or file does not exist, is malformed, empty or too large, a retain
            example is also to be forgotten, or a benchmark cannot be downloaded.
    """
    if name in FORGET_SETS:
        if retain is not None:
            raise UserError(
                f"Forget set {name!r} has its own retain set. Pass a retain file only together "
                "with a forget file of your own."
            )
        forget_set = FORGET_SETS[name]()
    elif Path(name).suffix.lower() in (".json", ".jsonl", ".csv"):
        forget_set = forget_set_from_files(Path(name), Path(retain) if retain else None)
    else:
        raise UserError(
            f"Forget set {name!r} not found. Choose one of {', '.join(FORGET_SETS)}, or pass a "
            ".jsonl, .json or .csv file."
        )
    forget = {(e.question, e.answer) for e in forget_set.forget + forget_set.training_examples}
    for example in forget_set.retain:
        if (example.question, example.answer) in forget:
            raise UserError(
                f"The retain set of {forget_set.name} contains an example of the forget set "
                f"({(example.question or example.answer)[:60]!r}). Remove it from one of them."
            )
    return forget_set
