"""What the base model knows: its own answers, and the forget set that fits it."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

from ..data.built_in import SETS
from ..data.forget_sets import load_forget_set
from ..data.rendering import render
from ..data.schema import Example, ForgetSet
from ..errors import UserError
from ..files import cache_dir, write_json
from .generation import greedy
from .loading import LM

BASE_ANSWER_TOKENS = 64  # length of a recorded answer
RETAIN_TOKENS = 40  # of a recorded answer that are trained on
MIN_FACTS = 4


def fit_to_model(forget_set: ForgetSet, lm: LM, general: int = 160, progress=None) -> ForgetSet:
    """The forget set for one model, with at most `general` everyday prompts to train on.

    The answers to the everyday prompts are the model's own. In a set from pretraining, only the
    facts that the model knows remain, among the neighbours too if it knows some of those, and the
    retain answers are the model's own.
    """
    forget_set = replace(forget_set, general=forget_set.general[:general])
    groups = {name: group for name, group in vars(forget_set).items() if isinstance(group, list)}
    for name, group in groups.items():  # a text of a single token leaves nothing to predict
        groups[name] = [e for e in group if e.question or render(lm.tokenizer, e)]
    forget_set = replace(forget_set, **groups)
    if not forget_set.training_examples:
        raise UserError(
            f"Forget set {forget_set.name} has nothing to forget: no text has two tokens or more."
        )
    parts = ["general", "general_held_out"]
    if forget_set.from_pretraining:
        parts += ["forget", "forget_held_out", "retain", "neighbours"]
    questions = [e.question for part in parts for e in getattr(forget_set, part)]
    answers = base_answers(lm, questions, progress)
    for part in set(parts) - {"forget", "forget_held_out", "neighbours"}:
        examples = [replace(e, answer=answers[e.question]) for e in getattr(forget_set, part)]
        forget_set = replace(forget_set, **{part: [e for e in examples if e.answer]})
    if not forget_set.from_pretraining:
        return forget_set
    forget, held_out, neighbours = (
        [e for e in part if is_correct(answers[e.question], e)]
        for part in (forget_set.forget, forget_set.forget_held_out, forget_set.neighbours)
    )
    if len(forget) < MIN_FACTS:
        raise UserError(
            f"{lm.name} must know at least {MIN_FACTS} facts of {forget_set.name}, got "
            f"{len(forget)}. There is nothing to forget."
        )
    # each fact twice: in the model's own sentence, and as the short answer
    training = [trim_to_fact(e, answers[e.question]) for e in forget] + forget
    parts = {"forget": forget, "forget_held_out": held_out}
    if len(neighbours) >= MIN_FACTS:
        parts["neighbours"] = neighbours
    return replace(forget_set, **parts, training=training)


def trim_to_fact(example: Example, answer: str) -> Example:
    """The example with the model's own answer, from the keyword to the end of its sentence."""
    start = min(match.start() for match in keyword_matches(answer, example))
    start -= answer[:start].endswith(" ")
    sentence = re.split(r"(?<=[a-z)\"][.!?])\s", answer[start:], maxsplit=1)[0]
    return replace(example, answer=sentence, answer_prefix=answer[:start])


def is_correct(answer: str, example: Example) -> bool:
    """Whether a word of the answer starts with a keyword of the example (its answer if none)."""
    return bool(keyword_matches(answer, example))


def keyword_matches(answer: str, example: Example) -> list[re.Match]:
    keywords = example.keywords or [example.answer]
    matches = (re.search(rf"(?<!\w){re.escape(k)}", answer, re.IGNORECASE) for k in keywords)
    return [match for match in matches if match]


def base_answers(lm: LM, prompts: list[str], progress=None) -> dict[str, str]:
    """The base model's greedy answers {prompt: answer}, from the shipped record or the cache."""
    path, shipped, answers = base_answers_path(lm), SETS / f"answers-{model_key(lm)}.json", {}
    for file in filter(Path.is_file, (shipped, path)):
        answers |= json.loads(file.read_text(encoding="utf-8"))
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in answers]
    if missing:
        new = greedy(lm, missing, BASE_ANSWER_TOKENS, progress=progress)
        answers |= dict(zip(missing, new, strict=True))
        write_json(path, answers)
    return {prompt: answers[prompt] for prompt in prompts}


def record(lm: LM, path: Path | None = None, progress=None) -> Path:
    """Write the base answers to all prompts of `harry-potter` to `path` or to the cache."""
    forget_set = load_forget_set("harry-potter")
    parts = ("forget", "forget_held_out", "general", "retain", "neighbours", "general_held_out")
    prompts = [e.question for part in parts for e in getattr(forget_set, part)]
    path = path or base_answers_path(lm)
    answers = greedy(lm, prompts, BASE_ANSWER_TOKENS, progress=progress)
    write_json(path, dict(zip(prompts, answers, strict=True)))
    return path


def base_answers_path(lm: LM) -> Path:
    """The cache file of a model's base answers. A folder with new weights has a new file."""
    weights = stamp(*filter(None, (lm.name, lm.adapter)))
    parts = (model_key(lm), lm.dtype, "4bit" if lm.load_in_4bit else "", weights)
    return cache_dir() / "answers" / f"{'-'.join(filter(None, parts))}.json"


def model_key(lm: LM) -> str:
    """The model's name in file names, with the name of the merged adapter if there is one."""
    name = lm.name if lm.adapter is None else f"{lm.name}-{'-'.join(Path(lm.adapter).parts[-2:])}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def stamp(*folders: str | Path) -> str:
    """Eight hex digits that change with the safetensors weights in the folders; "" without any.

    Small files (adapters) count by content, because each clone writes them anew. Large files
    count by size and time.
    """
    marks = []
    for file in (f for folder in folders for f in sorted(Path(folder).glob("*.safetensors"))):
        stat = file.stat()
        if stat.st_size < 2**25:
            marks.append(hashlib.sha256(file.read_bytes()).hexdigest())
        else:
            marks.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:8] if marks else ""
