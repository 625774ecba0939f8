"""What the base model knows: its own answers, and the forget set that fits it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from ..data.built_in import shipped_answers
from ..data.forget_sets import load_forget_set
from ..data.rendering import render
from ..data.schema import Example, ForgetSet, paraphrased
from ..errors import UserError
from ..files import cache_dir, write_json
from .generation import greedy
from .loading import LM

BASE_ANSWER_TOKENS = 64  # length of a recorded answer
RETAIN_TOKENS = 40  # of a recorded answer that are trained on
MIN_FACTS = 4
SMALL_FILE = 2**25  # bytes


def fit_to_model(
    forget_set: ForgetSet,
    lm: LM,
    general: int = 160,
    progress: Callable[[int, int], None] | None = None,
) -> ForgetSet:
    """The forget set for one model.

    The answers to the everyday prompts are the model's own. In a set from pretraining, only the
    facts that the model knows remain, and the retain answers are the model's own too.

    Args:
        general: use at most this many everyday prompts; fewer save time on a large model.
        progress: called with the number of answers done and of all answers.

    Raises:
        UserError: no example can be trained on, or the model knows fewer than four facts.
    """
    forget_set = replace(forget_set, general=forget_set.general[:general])
    forget_set = drop_short_texts(forget_set, lm.tokenizer)
    if not forget_set.training_examples:
        raise UserError(
            f"Forget set {forget_set.name} has nothing to forget: no text has two tokens or more."
        )
    parts = [forget_set.general, forget_set.general_held_out]
    if forget_set.from_pretraining:
        parts += [forget_set.forget, forget_set.forget_held_out, forget_set.retain]
    answers = base_answers(lm, [e.question for part in parts for e in part], progress)

    def with_base_answers(examples: list[Example]) -> list[Example]:
        return [replace(e, answer=answers[e.question]) for e in examples if answers[e.question]]

    forget_set = replace(
        forget_set,
        general=with_base_answers(forget_set.general),
        general_held_out=with_base_answers(forget_set.general_held_out),
    )
    if not forget_set.from_pretraining:
        return forget_set
    forget = [e for e in forget_set.forget if is_correct(answers[e.question], e)]
    held_out = [e for e in forget_set.forget_held_out if is_correct(answers[e.question], e)]
    if len(forget) < MIN_FACTS:
        raise UserError(
            f"{lm.name} must know at least {MIN_FACTS} facts of {forget_set.name}, got "
            f"{len(forget)}. There is nothing to forget."
        )
    # each fact twice: in the model's own sentence, and as the short answer
    training = [trim_to_fact(e, answers[e.question]) for e in forget] + forget
    return replace(
        forget_set,
        forget=forget,
        forget_held_out=held_out,
        training=training,
        retain=with_base_answers(forget_set.retain),
    )


def drop_short_texts(forget_set: ForgetSet, tokenizer) -> ForgetSet:
    """A copy without texts of a single token, in which there is nothing to predict."""
    parts = {field.name: getattr(forget_set, field.name) for field in fields(ForgetSet)}
    kept = {
        name: [e for e in part if e.question or render(tokenizer, e)]
        for name, part in parts.items()
        if isinstance(part, list)
    }
    return replace(forget_set, **kept)


def trim_to_fact(example: Example, answer: str) -> Example:
    """The example with the model's own answer, from the keyword to the end of its sentence.

    The part before the keyword becomes the answer prefix.
    """
    start = min(match.start() for match in keyword_matches(answer, example))
    start -= answer[:start].endswith(" ")
    sentence = re.split(r"(?<=[a-z)\"][.!?])\s", answer[start:], maxsplit=1)[0]
    return replace(example, answer=sentence, answer_prefix=answer[:start])


def is_correct(answer: str, example: Example) -> bool:
    """Whether a word of the answer starts with a keyword of the example.

    An example without keywords counts its answer as the keyword.
    """
    return bool(keyword_matches(answer, example))


def keyword_matches(answer: str, example: Example) -> list[re.Match]:
    keywords = example.keywords or [example.answer]
    matches = (re.search(rf"(?<!\w){re.escape(k)}", answer, re.IGNORECASE) for k in keywords)
    return [match for match in matches if match]


def base_answers(
    lm: LM, prompts: list[str], progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """The base model's greedy answers, {prompt: answer}.

    They are read from the shipped record or the cache. Missing answers are generated and cached.
    """
    path = base_answers_path(lm)
    answers = shipped_answers(model_key(lm))
    if path.is_file():
        answers |= json.loads(path.read_text(encoding="utf-8"))
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answers]
    if missing:
        new = greedy(lm, missing, BASE_ANSWER_TOKENS, progress=progress)
        answers |= dict(zip(missing, new, strict=True))
        write_json(path, answers)
    return {prompt: answers[prompt] for prompt in prompts}


def record(
    lm: LM, path: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Generate the base answers to all prompts of `harry-potter` and write them to a file.

    Args:
        path: the file, `base_answers_path(lm)` by default.
    """
    forget_set = load_forget_set("harry-potter")
    parts = [forget_set.forget, paraphrased(forget_set.forget), forget_set.general]
    parts += [forget_set.retain, forget_set.neighbours, forget_set.general_held_out]
    prompts = [e.question for part in parts for e in part]
    path = path or base_answers_path(lm)
    answers = greedy(lm, prompts, BASE_ANSWER_TOKENS, progress=progress)
    write_json(path, dict(zip(prompts, answers, strict=True)))
    return path


def base_answers_path(lm: LM) -> Path:
    """The cache file of a model's base answers. A folder with new weights has a new file."""
    parts = [model_key(lm), lm.dtype, *(["4bit"] if lm.load_in_4bit else [])]
    if weights := stamp(*(folder for folder in (lm.name, lm.adapter) if folder)):
        parts.append(weights)
    return cache_dir() / "answers" / f"{'-'.join(parts)}.json"


def model_key(lm: LM) -> str:
    """The model's name in file names, with the name of the merged adapter if there is one."""
    name = lm.name if lm.adapter is None else f"{lm.name}-{'-'.join(Path(lm.adapter).parts[-2:])}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def stamp(*folders: str | Path) -> str:
    """Eight hex digits that change with the safetensors weights in the folders; "" without any.

    Small files (adapters) count by content, because each clone writes them anew. Large files
    count by size and time.
    """
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.safetensors"))]
    if not files:
        return ""
    marks = []
    for file in files:
        stat = file.stat()
        if stat.st_size < SMALL_FILE:
            marks.append(hashlib.sha256(file.read_bytes()).hexdigest())
        else:
            marks.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:8]
