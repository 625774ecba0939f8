"""What is stored from a run: the finished example on the first screen, and the words that went each way (Fig. 2)."""

from __future__ import annotations

import json
import time
from pathlib import Path

from .data import EXAMPLE
from .errors import UserError
from .results import put, read_results, write_json
from .tokens import expert_name, word_counts, words
from .xray import xray_data

QUESTIONS = (  # none of them is trained on
    "What is the name of the school where Hermione Granger studies magic?",
    "What is the name of Harry Potter's friend with red hair and many brothers?",
    "Which train departs for Hogwarts from Platform Nine and Three-Quarters?",
    "Which author wrote The Lord of the Rings?",
    "Who wrote the Odyssey?",
)
TOKENS = 40
WORD_ITEMS = 60  # questions of each group


def store_example(run, path: Path = EXAMPLE) -> Path:
    """Ask `run` the QUESTIONS and write what the first screen shows. Raises UserError for a run that lacks figures."""
    before, after = run.metrics["before"], run.metrics["after"]
    own = run.metrics["data"]["forget_set"]
    if own != "harry-potter" or not {"forget_held_out", "neighbours", "general"} <= set(after):
        raise UserError("The example needs a run on harry-potter with all its groups measured.")
    kept = {g: after[g]["probability"] / before[g]["probability"] for g in ("forget_held_out", "neighbours", "general")}
    items = []
    for question in QUESTIONS:
        said, now = (run.answer([question], adapted, TOKENS)[0] for adapted in (False, True))
        data = xray_data(run.tokens(said, question), run.router.config)
        items.append({"question": question, "before": said, "after": now, "xray": data})
    write_json(
        path,
        {
            "numbers": {
                "forgot": 1 - kept["forget_held_out"],
                "kept": kept["general"],
                "neighbours": kept["neighbours"],
            },
            "items": items,
            "before": {g: before[g] for g in after if g != "summary"},
            "after": {g: after[g] for g in after if g != "summary"},
            "peak_memory_mb": run.metrics["peak_memory_mb"],
            "data": run.metrics["data"],
            **{k: run.metrics[k] for k in ("model", "hardware", "date", "seconds", "steps")},
            "forget_set": run.metrics["data"]["forget_set"],
            "stored": time.strftime("%Y-%m-%d"),
        },
        indent=None,
    )
    return path


def store_words(run, path: Path, items: int = WORD_ITEMS) -> dict:
    """Count which words of the untouched model's answers go which way, for the run's forget questions and for everyday
    ones, and put that into a results file (ALTER, Fig. 2).

    Raises:
        UserError: the run has no router or no answers; a damaged file.
    """
    read_results(path)  # damaged: now, not after the work
    threshold = run.router.config.threshold
    rows = json.loads((run.path / "answers.json").read_text(encoding="utf-8"))
    counts, metrics = {}, {}
    for group in ("forget", "general"):
        own = [r for r in rows if r["group"] == group and r["question"] and r["before"]][:items]
        if not own:
            raise UserError(f"The run {run.path.name} has no {group} answers, so there are no words to count.")
        found = (w for r in own for w in words(run.tokens(r["before"], r["question"])))
        counts[group] = word_counts(((w, source.entropy, expert_name(source)) for w, source, _ in found), threshold)
        total = sum(n for way in counts[group].values() for n in way.values())
        metrics |= {f"{group}_{way}_share": round(sum(w.values()) / total, 9) for way, w in counts[group].items()}
    entry = {
        "id": json.dumps(["words", run.metrics["seed"], run.metrics["data"]["forget_set"], items]),
        "method": run.metrics["config"]["unlearn"]["method"], "seed": run.metrics["seed"], "metrics": metrics,
        "config": {"forget": run.metrics["data"]["forget_set"], "model": run.metrics["model"], "items": items,
                   "threshold": threshold}, "hardware": run.lm.hardware, "words": counts,
    }  # fmt: skip
    return put(path, entry)
