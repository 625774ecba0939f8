"""The public benchmarks TOFU, MUSE and WMDP, from `$ALTER_DATA_DIR` or the Hugging Face Hub."""

import os
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from .built_in import plain_text_set, read_set, with_general_prompts
from .files import make_example, read_file
from .schema import Example, ForgetSet, paraphrased

WMDP_TEXTS = 400  # of each corpus
WMDP_CHARACTERS = 2000  # of each text: the papers are long


def tofu(split: str) -> ForgetSet:
    """TOFU (Maini et al. 2024) with the split "forget01", "forget05" or "forget10"."""
    files = [f"{split}_perturbed", f"retain{100 - int(split.removeprefix('forget'))}"]
    files += ["retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
    forget, retain, measured, authors, facts = (
        benchmark_part("tofu", file, "locuslab/TOFU") for file in files
    )
    known = {(e.question, e.answer) for e in measured}
    # the measured examples come first: `with_retain_limit` keeps what is measured
    retain = measured + [e for e in retain if (e.question, e.answer) not in known]
    groups = {"retain": measured, "real_authors": authors, "world_facts": facts}
    return taught_set("tofu", split, forget, retain, paraphrased(measured), extra_groups=groups)


def muse(split: str) -> ForgetSet:
    """MUSE (Shi et al. 2024) with the split "news" or "books".

    The questions are measured. The texts are unlearned and serve as the probe; the Hub has them.
    Without them the questions are unlearned. MUSE has no paraphrases, so then every fourth of
    these is kept for the probe and not reported, and a fifth of all is the holdout.
    """
    forget = muse_part(split, "knowmem_forget_qa")
    retain_questions = muse_part(split, "knowmem_retain_qa")
    training = probe = muse_part(split, "raw_forget", optional=True)
    retain = muse_part(split, "raw_retain1", optional=True) or retain_questions
    holdout, unlearned = [], len(forget)  # questions
    if not training:
        unlearned = unlearned * 4 // 5
        training, holdout = forget[:unlearned], forget[unlearned:]
        probe = training[::4]
        forget = [example for i, example in enumerate(training) if i % 4]
    parts = {"training": training, "probe": probe, "holdout": holdout, "forget_held_out": forget}
    parts["extra_groups"] = {"retain": retain_questions}
    if split == "news":  # two other wordings of each question, in the order of the files
        wordings = read_set("news_rewordings")
        reworded = [q for pair in wordings["forget"][:unlearned] for q in pair]
        kept = [q for pair in wordings["retain"] for q in pair]
        groups = {"reworded": reworded, "retain, reworded": kept}
        parts["gate_groups"] = {k: [Example(q, "") for q in v] for k, v in groups.items()}
    return taught_set("muse", split, forget, retain, retain_questions, **parts)


def wmdp(split: str) -> ForgetSet:
    """The corpora of WMDP (Li et al. 2024) with the split "bio" or "cyber".

    The biology corpus is available on request only: fill in the form on the page of
    `cais/wmdp-corpora` and put the file into `$ALTER_DATA_DIR/wmdp/`.
    """
    forget, retain = (
        benchmark_part("wmdp", f"{split}-{part}-corpus", "cais/wmdp-corpora", WMDP_TEXTS)
        for part in ("forget", "retain")
    )
    for text in (*forget, *retain):
        text.answer = text.answer[:WMDP_CHARACTERS]
    forget_set = plain_text_set(f"wmdp-{split}", forget, retain)
    return replace(forget_set, benchmark="wmdp", split=split)


def taught_set(benchmark: str, split: str, *parts, **more) -> ForgetSet:
    """A set that models are taught before they unlearn it; public checkpoints have learned it."""
    more |= {"needs_teaching": True, "public_checkpoints": True}
    name = f"{benchmark}-{split}"
    return with_general_prompts(name, *parts, benchmark=benchmark, split=split, **more)


def muse_part(split: str, name: str, optional: bool = False) -> list[Example]:
    """One part of MUSE, such as "knowmem_forget_qa" or "verbmem_forget"."""
    hub_id = f"muse-bench/MUSE-{split.title()}"
    return benchmark_part("muse", f"{split}_{name}", hub_id, optional=optional)


def benchmark_part(
    folder: str, file: str, hub_id: str, limit: int | None = None, optional: bool = False
) -> list[Example]:
    """The first `limit` examples of `$ALTER_DATA_DIR/folder/file.json` or `.jsonl`, or of the Hub.

    An `optional` part is [] if `$ALTER_DATA_DIR` is set but lacks it.
    """
    if root := os.environ.get("ALTER_DATA_DIR"):
        for suffix in ("json", "jsonl"):
            path = Path(root).expanduser() / folder / f"{file}.{suffix}"
            if path.is_file():
                return read_file(path, limit)
        if optional:
            return []
    from datasets import load_dataset

    # the Hub has each split of MUSE as a configuration of its own
    part, split = file.split("_", 2)[1:] if folder == "muse" else (file, "train")
    try:
        rows = load_dataset(hub_id, part, split=split, streaming=limit is not None)
        if limit is not None:  # the file is large, so only these rows are downloaded
            rows = list(rows.take(limit))
    except Exception as error:  # the client raises a dozen types that all mean the same here
        raise UserError(
            f"Cannot download {hub_id} from the Hugging Face Hub ({type(error).__name__}). Check "
            f"the network, or put {folder}/{file}.json into the folder that $ALTER_DATA_DIR names."
        ) from None
    return [make_example(dict(row), f"{hub_id} row {i}") for i, row in enumerate(rows, 1)]
