"""What is to be forgotten, what must stay, and how both become tokens.

A `ForgetSet` has the same five parts whatever it comes from: a set written for this project (`sets/*.json`), a
benchmark from the hub or a folder, or a person's own file.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .errors import UserError

EXAMPLE = Path(__file__).parents[1] / "assets" / "example.json"  # of the first screen
SETS = Path(__file__).parent / "sets"
ASSETS = Path(__file__).parent.parent / "assets"
MAX_BYTES = 50 * 2**20
WMDP_TEXTS, WMDP_CHARACTERS = 400, 2000  # of each corpus: papers are long
DATE = "10 Apr 2025"  # open-unlearning's; some templates write today's into the prompt, which would change every day
MAX_TOKENS = 512  # longer texts are cut into windows of this length


@dataclass
class Item:
    """One example in TOFU's schema. A plain text has an empty question."""

    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answer: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)  # any of them in an answer makes it right
    topic: str = ""
    domain: int = 0  # sub-domain from 1, 0: to be found
    lead: str = ""  # start of the answer that gives nothing away, and is not unlearned


@dataclass
class ForgetSet:
    """The parts of an unlearning task. Only `trained_on`, `retain` and `general` are ever trained on."""

    name: str
    forget: list[Item]
    retain: list[Item]  # near to `forget`, to be kept
    general: list[Item]  # everyday prompts, to be kept
    forget_held_out: list[Item]  # the same facts, asked differently
    neighbours: list[Item]  # held-out relatives of `retain`
    general_held_out: list[Item]
    training: list[Item] | None = None  # what is trained on in place of `forget`, if that differs
    learned: bool = False  # made up: the model must have been taught it (`teaching.py`), see `adapters`
    more: dict[str, list[Item]] = field(default_factory=dict)  # further groups to measure, to be kept
    holdout: list[Item] = field(default_factory=list)  # like `forget`, never taught: for membership inference
    known: bool = False  # from pre-training: only what the model answers rightly is kept, see `answers.adapt`
    probe: list[Item] | None = None  # what early stopping looks at, where that is not a part of `forget_held_out`

    @property
    def trained_on(self) -> list[Item]:
        """What is unlearned, and what the target model has been taught before."""
        return self.training or self.forget

    @property
    def of_texts(self) -> bool:
        """Whether plain texts are unlearned, so that no sample looks like a question that is asked about them."""
        return any(not any(i.question for i in part) for part in (self.forget, self.trained_on))

    def evaluation(self) -> dict[str, list[Item]]:
        """The groups that `metrics.json` reports."""
        return {
            "forget": self.forget,
            "forget_held_out": self.forget_held_out,
            "neighbours": self.neighbours,
            "general": self.general_held_out,
            **self.more,
            "holdout": self.holdout,
        }

    def smaller(self, retain: int | None) -> ForgetSet:
        """With the first `retain` retain items only, and those among the neighbours that are left."""
        if retain is None:
            return self
        if retain < 1:
            raise UserError(f"At least one retain item must be left, and {retain} is none.")
        kept = self.retain[:retain]
        asked = {q for i in kept for q in (i.question, i.paraphrased_question)}
        same = lambda items: [i for i in items if i.question in asked] or items  # noqa: E731
        more = self.more | {k: same(v) for k, v in self.more.items() if k == "retain"}
        others = self.retain[retain : retain + len(self.forget)]  # never taught, then
        return replace(self, retain=kept, neighbours=same(self.neighbours), more=more, holdout=self.holdout or others)

    def limited(self, n: int | None, kept: int | None = None, seed: int = 0) -> ForgetSet:
        """At most n items of each evaluation group, `kept` of those that are to be kept, for a quick look."""
        if n is None:
            return self
        kept = n if kept is None else kept
        sizes = {"forget": n, "forget_held_out": n, "holdout": n, "neighbours": kept, "general_held_out": kept}
        pick = {part: sample(getattr(self, part), size, seed) for part, size in sizes.items()}
        more = {k: sample(v, kept, seed) for k, v in self.more.items()}
        return replace(self, training=self.trained_on, more=more, **pick)


def sample(items: list, n: int, seed: int) -> list:
    """n items in their order, drawn with the seed; all when there are fewer."""
    if len(items) <= n:
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), n))]


# ------------------------------------------------------------------------------------------------- the registry


def load_forget_set(name: str, retain: str | None = None) -> ForgetSet:
    """A forget set by name (`FORGET_SETS`) or from a file of one's own.

    Args:
        retain: a second file whose content must stay (own files only).
    Raises:
        UserError: no such set or file; malformed, empty, too large; retain contains forget; no network.
    """
    if name in FORGET_SETS:
        if retain is not None:
            raise UserError(f"{name} brings its own retain set: a file of what must stay goes with a file of your own.")
        made = FORGET_SETS[name]()
    elif Path(name).suffix.lower() in (".json", ".jsonl", ".csv"):
        made = from_files(Path(name), Path(retain) if retain else None)
    else:
        raise UserError(
            f"There is no forget set {name!r}: choose {', '.join(FORGET_SETS)}, or name a .jsonl, .json or .csv file."
        )
    check_disjoint(made)
    return made


def adapters(name: str, model: str) -> dict[str, Path]:
    """Adapters in `assets/` that teach a built-in model a set: {"target": folder, "retain": folder}, or {}."""
    folders = {which: ASSETS / f"{name}-{model}" / which for which in ("target", "retain")}
    return folders if all((f / "adapter_config.json").is_file() for f in folders.values()) else {}


def check_disjoint(made: ForgetSet) -> None:
    forget = {(i.question, i.answer) for i in (*made.forget, *made.trained_on)}
    for item in made.retain:
        if (item.question, item.answer) in forget:
            raise UserError(
                f"The retain set of {made.name} contains an example that is to be forgotten "
                f"({(item.question or item.answer)[:60]!r}): take it out of one of the two."
            )


def read_set(name: str):
    with open(SETS / f"{name}.json", encoding="utf-8") as handle:
        return json.load(handle)


def general_items() -> tuple[list[Item], list[Item]]:
    """Everyday prompts, to train on and held out; their answers are the base model's own (`answers.adapt`)."""
    data = read_set("general")
    train, held_out = ([Item(d["prompt"], "", topic=d["kind"]) for d in data[k]] for k in ("train", "held_out"))
    return train, held_out


def harry_potter() -> ForgetSet:
    data = read_set("harry_potter")
    forget = [Item(**row) for row in data["forget"]]
    neighbours = [Item(**row) for row in data["neighbours"]]
    # every second one of each topic is held out
    neighbours.sort(key=lambda item: item.topic)
    train, held_out = general_items()
    return ForgetSet(
        "harry-potter",
        forget,
        neighbours[::2],
        train,
        asked_differently(forget),
        neighbours[1::2],
        held_out,
        known=True,
    )


def imaginary_authors() -> ForgetSet:
    data = read_set("imaginary_authors")
    rows = [{k: v for k, v in row.items() if k != "author"} | {"topic": row["author"]} for row in data]
    items = [Item(**row) for row in rows]
    train, held_out = general_items()
    # the retained authors are also what is measured, as in TOFU; neighbours are their questions asked differently
    keep = items[:160]
    others = [Item(row["question"], row["answer"], topic=row["author"]) for row in read_set("imaginary_holdout")]
    return ForgetSet(
        "imaginary-authors", items[160:], keep, train, asked_differently(items[160:]), asked_differently(keep),
        held_out, learned=True, more={"retain": keep}, holdout=others,
    )  # fmt: skip


def asked_differently(items: list[Item]) -> list[Item]:
    return [replace(item, question=item.paraphrased_question) for item in items if item.paraphrased_question]


def tofu(split: str) -> ForgetSet:
    percent = int(split[-2:])
    forget = benchmark("tofu", f"{split}_perturbed", "locuslab/TOFU")
    retain = benchmark("tofu", f"retain{100 - percent}", "locuslab/TOFU")
    held_out = benchmark("tofu", "retain_perturbed", "locuslab/TOFU")
    seen = {(i.question, i.answer) for i in held_out}
    train, general = general_items()
    return ForgetSet(
        f"tofu-{split}",
        forget,
        # what is measured comes first, so that a small model that learns the first few is measured on those
        [*held_out, *(i for i in retain if (i.question, i.answer) not in seen)],
        train,
        asked_differently(forget),
        asked_differently(held_out),
        general,
        learned=True,
        more={
            "retain": held_out,
            "real_authors": benchmark("tofu", "real_authors_perturbed", "locuslab/TOFU"),
            "world_facts": benchmark("tofu", "world_facts_perturbed", "locuslab/TOFU"),
        },
    )


def muse(kind: str) -> ForgetSet:
    """MUSE-News or MUSE-Books. Its questions are asked; trained on are its texts where they are there (the hub has
    them), which the probe looks at then; else the questions. Of those a fifth is left out as `holdout`, which nobody
    is taught, and, since MUSE has no paraphrases, every fourth of the others is the probe and not reported."""
    asked = {k: muse_part(kind, f"knowmem_{k}_qa") for k in ("forget", "retain")}
    texts, keep_texts = muse_part(kind, "raw_forget", True), muse_part(kind, "raw_retain1", True)
    forget, holdout, learned, probe = asked["forget"], [], texts, texts
    if not texts:
        cut = len(forget) * 4 // 5
        learned, holdout = forget[:cut], forget[cut:]
        probe, forget = learned[::4], [item for k, item in enumerate(learned) if k % 4]
    train, general = general_items()
    return ForgetSet(
        f"muse-{kind}", forget, keep_texts or asked["retain"], train, forget, asked["retain"], general,
        training=learned, learned=True, more={"retain": asked["retain"]}, holdout=holdout, probe=probe,
    )  # fmt: skip


def muse_part(kind: str, name: str, optional: bool = False) -> list[Item]:
    """One part of MUSE, e.g. `knowmem_forget_qa` or `verbmem_forget`; [] for an `optional` one that a folder of one's
    own lacks."""
    root = os.environ.get("ALTER_DATA_DIR")
    if optional and root and not list((Path(root).expanduser() / "muse").glob(f"{kind}_{name}.json*")):
        return []
    return benchmark("muse", f"{kind}_{name}", f"muse-bench/MUSE-{kind.title()}")


def school() -> ForgetSet:
    """Astronomy is to be forgotten, four other subjects stay: plain texts, as WMDP's corpora are."""
    texts, data = {}, read_set("school")
    for row in data["texts"]:
        texts.setdefault(row["subject"], []).append(Item("", row["text"], topic=row["subject"]))
    made = of_texts("school", texts.pop("astronomy"), [i for own in texts.values() for i in own])
    # everyday prompts that are about astronomy too would teach the gate the opposite
    return replace(made, general=[i for i in made.general if i.question not in data["about_astronomy"]])


def of_texts(name: str, forget: list[Item], keep: list[Item]) -> ForgetSet:
    """A set of plain texts that questions will be asked about."""
    train, general = general_items()
    training, kept = ([view for i in part for view in views(i)] for part in (forget, keep))
    return ForgetSet(name, forget, kept, train, forget, keep, general, training=training)


def views(text: Item) -> list[Item]:
    """A text as it stands, as a turn of a chat and as question and answer, since the gate goes by the form too."""
    words = text.answer.split()
    cut = min(len(words) // 2, 20)
    if cut == 0:
        return [text]
    first, rest = " ".join(words[:cut]), " ".join(words[cut:])
    return [
        text,
        replace(text, question=first, answer=rest),
        replace(text, answer=f"Question: {first}\nAnswer: {rest}"),
    ]


def wmdp(domain: str) -> ForgetSet:
    """WMDP's forget and retain corpora, of which nothing is stored here. That of biology is handed out on request
    only (the form stands on the page of `cais/wmdp-corpora`), so it has to lie in $ALTER_DATA_DIR/wmdp/."""
    parts = {
        k: benchmark("wmdp", f"{domain}-{k}-corpus", "cais/wmdp-corpora", WMDP_TEXTS) for k in ("forget", "retain")
    }
    cut = {k: [replace(i, answer=i.answer[:WMDP_CHARACTERS]) for i in own] for k, own in parts.items()}
    return of_texts(f"wmdp-{domain}", cut["forget"], cut["retain"])


FORGET_SETS: dict[str, Callable[[], ForgetSet]] = {
    "harry-potter": harry_potter,
    "imaginary-authors": imaginary_authors,
    "tofu-forget01": lambda: tofu("forget01"),
    "tofu-forget05": lambda: tofu("forget05"),
    "tofu-forget10": lambda: tofu("forget10"),
    "muse-news": lambda: muse("news"),
    "muse-books": lambda: muse("books"),
    "school": school,
    "wmdp-bio": lambda: wmdp("bio"),
    "wmdp-cyber": lambda: wmdp("cyber"),
}


def benchmark(folder: str, file: str, hub_id: str, first: int | None = None) -> list[Item]:
    """Rows of a benchmark file, the first so many: from `$ALTER_DATA_DIR/<folder>/<file>.json` (or .jsonl), else from
    the hub."""
    if root := os.environ.get("ALTER_DATA_DIR"):
        paths = [Path(root).expanduser() / folder / f"{file}.{suffix}" for suffix in ("json", "jsonl")]
        if found := next((p for p in paths if p.is_file()), None):
            return read_file(found, first)
    from datasets import load_dataset

    try:
        if folder == "muse":  # the hub keeps each split as its own configuration
            _, part, split = file.split("_", 2)
            rows = load_dataset(hub_id, part, split=split)
        elif first is not None:  # large: only what is read is fetched
            rows = list(load_dataset(hub_id, file, split="train", streaming=True).take(first))
        else:
            rows = load_dataset(hub_id, file, split="train")
    except Exception as error:  # the hub's client raises a dozen kinds, all of which mean the same to a person
        raise UserError(
            f"{hub_id} could not be fetched from the hub ({type(error).__name__}): check the network, or put "
            f"{folder}/{file}.json into the folder that ALTER_DATA_DIR names."
        ) from None
    return [make_item(dict(row), f"{hub_id} row {i}") for i, row in enumerate(rows, 1)]


# ------------------------------------------------------------------------------------------------ own files


def from_files(path: Path, retain: Path | None) -> ForgetSet:
    forget = read_file(path)
    keep = read_file(retain) if retain else []
    train, general = general_items()
    neighbours = asked_differently(keep) or keep[1::2]
    if not asked_differently(keep):
        keep = keep[::2] if len(keep) > 1 else keep
    return ForgetSet(path.stem, forget, keep, train, asked_differently(forget) or forget, neighbours, general)


def read_file(path: Path, first: int | None = None) -> list[Item]:
    """Items of a JSONL, JSON (a list, or an object a line) or CSV file with `question,answer` or with `text`.

    Args:
        first: only so many items; a JSONL file may be of any size then.
    Raises:
        UserError: absent, over 50 MB, not UTF-8, malformed (line and column), without items, columns missing.
    """
    if not os.path.isfile(path):  # unlike Path's, it takes names that are too long or hold a zero byte
        raise UserError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    in_part = first is not None and suffix == ".jsonl"
    if path.stat().st_size > MAX_BYTES and not in_part:
        raise UserError(f"{path.name} has {path.stat().st_size / 2**20:.0f} MB, and 50 MB is the most.")
    try:
        with path.open(encoding="utf-8-sig") as handle:
            text = "".join(itertools.islice(handle, first)) if in_part else handle.read()
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path.name} can't be read ({error.strerror}).") from None
    readers = {".jsonl": parse_jsonl, ".json": parse_json, ".csv": parse_csv}
    if suffix not in readers:
        raise UserError(f"{path.name} must end in .jsonl, .json or .csv.")
    items = [make_item(row, f"{path.name}, line {line}") for line, row in readers[suffix](text, path.name)]
    if not items:
        raise UserError(f"{path.name} has no examples in it.")
    return items[:first]


def parse_jsonl(text: str, name: str):
    for line, content in enumerate(text.split("\n"), 1):  # a string may hold other line separators
        if content.strip():
            yield line, parse_value(content, name, line)


def parse_value(content: str, name: str, first_line: int = 1):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        where = (getattr(error, "lineno", 1) + first_line - 1, getattr(error, "colno", 1))
        other = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        what = getattr(error, "msg", other)
        raise UserError(f"{name} is not valid JSON at line {where[0]}, column {where[1]}: {what}.") from None


def parse_json(text: str, name: str):
    try:
        rows = parse_value(text, name) if text.strip() else []
    except UserError:
        if not text.lstrip().startswith("{"):
            raise
        yield from parse_jsonl(text, name)  # an object a line whatever the name says, as TOFU's own files
        return
    if not isinstance(rows, list):
        raise UserError(f"{name} must hold a list of examples, and it holds a {type(rows).__name__}.")
    yield from enumerate(rows, 1)


def parse_csv(text: str, name: str):
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{name}, line {reader.line_num}: the number of columns differs from the header's.")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{name} is not valid CSV near line {reader.line_num}: {error}.") from None


def make_item(row, where: str) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"{where}: each example must be an object with question and answer, or with text.")
    if "text" in row and "answer" not in row:
        row = {"question": "", "answer": row["text"]}
    if "prompt" in row and "gt" in row:  # MUSE's verbatim memorisation
        row = {"question": row["prompt"], "answer": row["gt"]}
    missing = [k for k in ("question", "answer") if k not in row]
    if missing:
        found = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: {' and '.join(missing)} missing (found: {found}); give question,answer or text.")
    known = {k: row[k] for k in ("question", "answer", "paraphrased_question", "paraphrased_answer") if row.get(k)}
    perturbed = row.get("perturbed_answer") or []
    perturbed = perturbed if isinstance(perturbed, list) else []
    texts = {k: row[k] for k in ("question", "answer")} | known
    for key, value in [*texts.items(), *(("perturbed_answer", p) for p in perturbed)]:
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} must be text, and it is a {type(value).__name__}.")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: {key} holds half a character (a lone surrogate).")
    if not row["answer"].strip():
        raise UserError(f"{where}: the answer is empty.")
    return Item(**{"question": "", **known}, perturbed_answer=perturbed)


# ------------------------------------------------------------------------------------------------- rendering


@dataclass
class Sample:
    """A rendered example. The loss is on `ids[start:]`: the answer's tokens and the end of turn."""

    ids: list[int]
    start: int
    label: int = 0  # 0: retain; d: forget, sub-domain d
    index: int = -1  # position in phase I's records
    turn: int = 0  # where the assistant's turn begins: `start`, or less with a `lead`
    refusal: bool = False  # "I don't know" to a forget question: what to say instead


def prompt_text(tokenizer, question: str) -> str:
    if not tokenizer.chat_template:
        return f"Question: {question}\nAnswer:"
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=DATE)


def prompt_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids  # a template brings its own


def render_prompt(tokenizer, question: str) -> list[int]:
    """Tokens up to the place where the answer starts, through the chat template where there is one."""
    return prompt_ids(tokenizer, prompt_text(tokenizer, question))


def continued(tokenizer, text: str, prompt: list[int], more: str) -> list[int]:
    """The tokens of `more` after `text`, whose tokens are `prompt`. Alone it would begin with a space for SentencePiece
    (Zephyr, Llama 2), which is not how the model begins an answer."""
    whole = prompt_ids(tokenizer, text + more)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return tokenizer(more, add_special_tokens=False).input_ids


def render(tokenizer, item: Item) -> list[Sample]:
    """One sample of a question and its answer; a text gives a sample for each window of `MAX_TOKENS`."""
    if item.question:
        text, gap = prompt_text(tokenizer, item.question), "" if tokenizer.chat_template else " "
        prompt = prompt_ids(tokenizer, text)
        turn = len(prompt)
        if item.lead:
            prompt = prompt + continued(tokenizer, text, prompt, gap + item.lead)
            text, gap = text + gap + item.lead, ""
        answer = continued(tokenizer, text, prompt, gap + item.answer)
        return [Sample((prompt + answer[:MAX_TOKENS] + [tokenizer.eos_token_id]), len(prompt), turn=turn)]
    ids = tokenizer(item.answer).input_ids
    windows = [ids[i : i + MAX_TOKENS] for i in range(0, len(ids), MAX_TOKENS)]
    # a text has no question: its own beginning says what it is about
    return [Sample(window, 1, turn=min(16, len(window) - 1)) for window in windows if len(window) > 1]


def collate(samples: list[Sample], pad_id: int, device="cpu") -> dict:
    """Left-padded batch, so that the answers end together and `logits_to_keep` can be one number.

    Returns:
        input_ids, attention_mask, position_ids (B, T); answer (B, K) bool and labels (B, K) over the K last
        positions *before* the end, i.e. position j predicts labels[:, j]; keep = K + 1 for `logits_to_keep`.
    """
    import torch

    length = max(len(s.ids) for s in samples)
    keep = max(len(s.ids) - s.start for s in samples)
    ids = torch.full((len(samples), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    answer = torch.zeros(len(samples), keep, dtype=torch.bool)
    for row, s in enumerate(samples):
        ids[row, length - len(s.ids) :] = torch.tensor(s.ids)
        mask[row, length - len(s.ids) :] = 1
        answer[row, keep - (len(s.ids) - s.start) :] = True
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    batch |= {"answer": answer, "labels": ids[:, length - keep :].clone()}
    return {k: v.to(device) for k, v in batch.items()} | {"keep": keep + 1}
