"""What is stored of one run: the example on the first screen, and its words by route (Fig. 2)."""

import json
import time
from pathlib import Path

from ..errors import UserError
from ..files import EXAMPLE, write_json
from ..inspection.words import expert_name, word_counts, words
from ..inspection.xray import xray_data
from .results import add_result, read_results

QUESTIONS = (  # none of them is trained on
    "What is the name of the school where Hermione Granger studies magic?",
    "What is the name of Harry Potter's friend with red hair and many brothers?",
    "Which train departs for Hogwarts from Platform Nine and Three-Quarters?",
    "Which author wrote The Lord of the Rings?",
    "Who wrote the Odyssey?",
)
MEASURED = {"forgot": "forget_held_out", "kept": "general", "neighbours": "neighbours"}


def store_example(run, path: Path = EXAMPLE) -> Path:
    """Answer QUESTIONS before and after, and write what the first screen shows."""
    metrics, before, after = run.metrics, run.metrics["before"], run.metrics["after"]
    forget_set, groups = metrics["data"]["forget_set"], [g for g in after if g != "summary"]
    if forget_set != "harry-potter" or not {*MEASURED.values()} <= {*groups}:
        raise UserError("The example needs a measured run on harry-potter with all its groups.")
    kept = {k: after[g]["probability"] / before[g]["probability"] for k, g in MEASURED.items()}
    example = {
        "numbers": kept | {"forgot": 1 - kept["forgot"]},
        "items": [answered(run, question) for question in QUESTIONS],
        "before": {group: before[group] for group in groups},
        "after": {group: after[group] for group in groups},
        "forget_set": forget_set,
        "stored": time.strftime("%Y-%m-%d"),
    }
    copied = ("model", "hardware", "date", "seconds", "steps", "peak_memory_mb", "data")
    write_json(path, example | {k: metrics[k] for k in copied}, indent=None)
    return path


def answered(run, question: str) -> dict:
    """The answers before and after, and the X-ray of the first."""
    before, after = (run.generate([question], adapted, 40)[0] for adapted in (False, True))
    xray = xray_data(run.trace_tokens(before, question), run.router.config)
    return {"question": question, "before": before, "after": after, "xray": xray}


def store_words(run, path: Path, examples: int = 60, command: str = "") -> dict:
    """Count which words of the base model's answers take which route (ALTER, Fig. 2), for the first
    `examples` forget questions and everyday ones, and add the counts to a results file."""
    read_results(path, "words")  # a damaged file fails now, not after the work
    metrics, threshold = run.metrics, run.router.config.threshold
    rows = json.loads((run.path / "answers.json").read_text(encoding="utf-8"))
    counts, shares = {}, {}
    for group in ("forget", "general"):
        own = [r for r in rows if r["group"] == group and r["question"] and r["before"]][:examples]
        if not own:
            raise UserError(f"The run {run.path.name} has no {group} answers to count words in.")
        routed = [
            (word, trace.entropy, expert_name(trace))
            for row in own
            for word, trace, _ in words(run.trace_tokens(row["before"], row["question"]))
        ]
        counts[group] = word_counts(routed, threshold)
        for route, times in counts[group].items():
            shares[f"{group}_{route}_share"] = round(sum(times.values()) / len(routed), 9)
    forget, seed = metrics["data"]["forget_set"], metrics["seed"]
    entry = {"id": json.dumps(["words", seed, forget, examples]), "seed": seed, "command": command}
    entry |= {"method": metrics["config"]["method"], "metrics": shares, "words": counts}
    config = {"forget": forget, "model": metrics["model"], "items": examples}
    entry |= {"config": config | {"threshold": threshold}, "hardware": run.lm.hardware}
    return add_result(path, entry, "words")
