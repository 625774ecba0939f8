"""The finished example on the first screen: five questions before and after, with their tokens, from a run's folder."""

from __future__ import annotations

import time
from pathlib import Path

from .answers import write_json
from .data import EXAMPLE
from .errors import UserError
from .xray import xray_data

QUESTIONS = (
    "What is the name of Harry Potter's school?",
    "Who is Harry Potter's red-haired best friend?",
    "Which train takes students to Hogwarts?",
    "Who wrote The Hobbit?",
    "What is the capital of France?",
)
TOKENS = 40


def store_example(run, path: Path = EXAMPLE) -> Path:
    """Ask `run` the QUESTIONS and write what the first screen shows. Raises UserError for a run that lacks figures."""
    before, after = run.metrics["before"], run.metrics["after"]
    if not {"forget_held_out", "neighbours", "general"} <= set(after):
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
