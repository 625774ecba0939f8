"""The forget sets that ship with the package, as JSON files in `sets/`."""

import json
from dataclasses import replace
from pathlib import Path

from ..files import ASSETS
from .schema import Example, ForgetSet, paraphrased

SETS = Path(__file__).parent / "sets"
RETAINED_AUTHORS = 160  # the first examples of imaginary_authors.json: eight of ten authors
OPENING_WORDS = 20  # of a text, at most, that stand as its question


def read_set(name: str):
    """The content of `sets/<name>.json`."""
    return json.loads((SETS / f"{name}.json").read_text(encoding="utf-8"))


def general_examples() -> tuple[list[Example], list[Example]]:
    """Everyday prompts, (to train on, held out). `fit_to_model` adds the base model's answers."""
    data = read_set("general")
    return tuple(
        [Example(row["prompt"], "", topic=row["kind"]) for row in data[part]]
        for part in ("train", "held_out")
    )


def with_general_prompts(name: str, forget, retain, neighbours=None, **parts) -> ForgetSet:
    """A forget set with the everyday prompts; by default, the held-out groups are paraphrases."""
    parts["general"], parts["general_held_out"] = general_examples()
    parts.setdefault("forget_held_out", paraphrased(forget) or forget)
    neighbours = paraphrased(retain) if neighbours is None else neighbours
    return ForgetSet(name, forget, retain, neighbours=neighbours, **parts)


def shipped_adapters(name: str, model: str) -> dict[str, Path]:
    """The folders of the adapters that teach a model a set: {"target": ., "retain": .} or {}."""
    folders = {which: ASSETS / f"{name}-{model}" / which for which in ("target", "retain")}
    complete = all((folder / "adapter_config.json").is_file() for folder in folders.values())
    return folders if complete else {}


def harry_potter() -> ForgetSet:
    """Facts that pretrained models know; half of each neighbouring topic, and more, is held out."""
    data = read_set("harry_potter")
    parts = ("forget", "neighbours", "neighbours_held_out")
    forget, neighbours, more = ([Example(**row) for row in data[part]] for part in parts)
    neighbours.sort(key=lambda example: example.topic)
    held_out = neighbours[1::2] + more
    names = {"name alone": [Example(name, "") for name in data["name alone"]]}
    parts = {"gate_groups": names, "from_pretraining": True}
    return with_general_prompts("harry-potter", forget, neighbours[::2], held_out, **parts)


def imaginary_authors() -> ForgetSet:
    """Ten invented authors in TOFU's form, two of them to forget.

    As in TOFU, the retain examples are trained on and measured; the neighbours are their
    paraphrases. The holdout is about further authors that no model is taught.
    """
    examples, holdout = (
        [Example(topic=row.pop("author"), **row) for row in read_set(name)]
        for name in ("imaginary_authors", "imaginary_holdout")
    )
    retain, forget = examples[:RETAINED_AUTHORS], examples[RETAINED_AUTHORS:]
    parts = {"extra_groups": {"retain": retain}, "holdout": holdout}
    return with_general_prompts("imaginary-authors", forget, retain, needs_teaching=True, **parts)


def school() -> ForgetSet:
    """Plain texts on five school subjects, of which astronomy is to be forgotten."""
    data = read_set("school")
    texts = [Example("", row["text"], topic=row["subject"]) for row in data["texts"]]
    forget = [text for text in texts if text.topic == "astronomy"]
    retain = [text for text in texts if text.topic != "astronomy"]
    forget_set = plain_text_set("school", forget, retain)
    # everyday prompts on astronomy would teach the gate to keep the subject
    general = [e for e in forget_set.general if e.question not in data["about_astronomy"]]
    return replace(forget_set, general=general)


def plain_text_set(name: str, forget: list[Example], retain: list[Example]) -> ForgetSet:
    """A forget set of plain texts, each trained on in the forms of `text_forms`."""
    training, retain_forms = (
        [form for text in part for form in text_forms(text)] for part in (forget, retain)
    )
    return with_general_prompts(name, forget, retain_forms, neighbours=retain, training=training)


def text_forms(text: Example) -> list[Example]:
    """A text as it is, as a turn of a chat, and as a question with its answer.

    The gate also reads the form, so it must see the subject in each.
    """
    words = text.answer.split()
    cut = min(len(words) // 2, OPENING_WORDS)
    if cut == 0:
        return [text]
    opening, rest = " ".join(words[:cut]), " ".join(words[cut:])
    text = replace(text, source=text.answer)
    turn = replace(text, question=opening, answer=rest)
    return [text, turn, replace(text, answer=f"Question: {opening}\nAnswer: {rest}")]
