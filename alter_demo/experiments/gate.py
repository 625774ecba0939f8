"""How well the gate recognises what it stored: shares of prompts that open it, by kind of prompt.

Nothing is trained. A gate is fitted to a forget set, or taken from a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from scipy.stats import binomtest

from ..alter.bank import plan_sample
from ..alter.frozen import PhaseOneResult, frozen_pass
from ..callbacks import Callback
from ..config import flat_config
from ..data.rendering import Sample, render_prompt
from ..data.schema import ForgetSet
from ..errors import UserError
from ..inspection.traces import gate_reasons
from ..models.loading import LM
from ..run import fit_forget_set
from ..unlearn import run_phase_one
from .attacks import PROMPTS

EXPECTED = ("open", "shut")
FIRST_TURN = "What is the capital of France?", "The capital of France is Paris."


def fitted_gate(
    lm: LM, forget_set: ForgetSet, seed: int, callback: Callback
) -> tuple[PhaseOneResult, ForgetSet]:
    """Phase one of `alter_selective` on a forget set, and the set as the model knows it."""
    plain = forget_set.is_plain_text
    # refusals come after the gate
    config = flat_config("alter_selective", {"refusal_weight": 0.0, "seed": seed}, plain)
    forget_set, _ = fit_forget_set(forget_set, lm, config.data, callback)
    return run_phase_one(lm, forget_set, config, callback), forget_set


def score_prompts(
    lm: LM, gate: PhaseOneResult, prompts: list[dict], progress: Callable | None = None
) -> list[dict]:
    """What the gate says about prompts, each {"prompt", "group"?, "expected"?, "turns"?}.

    Returns:
        For each prompt {"prompt", "group", "expected", "open" (where the answer starts),
        "threshold"} and the `gate_reasons` of the token with the highest score.
    """
    samples = []
    for row in prompts:
        ids = render_prompt(lm.tokenizer, row["prompt"], row.get("turns", ()))
        samples.append(Sample([*ids, lm.tokenizer.eos_token_id], len(ids), turn=len(ids)))
    frozen, result = frozen_pass(lm, samples, gate.alter, progress), []
    for row, outputs, sample in zip(prompts, frozen, samples, strict=True):
        scores = plan_sample(outputs, sample, gate).scores
        best = max(gate_reasons(scores)[: sample.turn], key=lambda reasons: reasons["score"])
        own = {name: row.get(name, "") for name in ("prompt", "group", "expected")}
        own["open"] = scores.opened[0, sample.turn - 1].item()
        result.append(own | {"threshold": round(gate.alter.gate_threshold, 4)} | best)
    return result


def prompts_of(forget_set: ForgetSet) -> list[dict]:
    """Prompts of every kind: questions of the set, the same in other words, and what stays."""
    stored = dict.fromkeys(e.question for e in forget_set.training_examples if e.question)
    reworded = [e for e in forget_set.forget_held_out if e.question]
    kept = {"neighbours": forget_set.neighbours, "everyday": forget_set.general_held_out}
    kept |= {k: v for k, v in forget_set.extra_groups.items() if k != "retain"}
    rows = [row(question, "stored", "open") for question in stored]
    rows += [row(e.question, "reworded", "open") for e in reworded]
    for name in ("neutral_text", "few_shot", "role_play"):
        rows += [row(PROMPTS[name](e, forget_set), f"reworded, {name}", "open") for e in reworded]
    second = {"turns": [FIRST_TURN]}
    rows += [row(e.question, "reworded, second turn", "open") | second for e in reworded]
    for group, examples in kept.items():
        examples = [e for e in examples if e.question]
        rows += [row(e.question, group, "shut") for e in examples]
        if group == "neighbours":
            name = "neutral_text"
            rows += [
                row(PROMPTS[name](e, forget_set), f"{group}, {name}", "shut") for e in examples
            ]
    return rows


def row(prompt: str, group: str, expected: str) -> dict:
    return {"prompt": prompt, "group": group, "expected": expected}


def open_rates(scores: list[dict]) -> dict[str, dict]:
    """{group: {"open": share, "low", "high": 95 % Wilson interval, "prompts": n, "expected"}}."""
    rates = {}
    for group in dict.fromkeys(s["group"] for s in scores):
        members = [s for s in scores if s["group"] == group]
        opened = sum(s["open"] for s in members)
        interval = binomtest(opened, len(members)).proportion_ci(method="wilson")
        share = {"open": opened / len(members), "low": interval.low, "high": interval.high}
        share = {k: round(float(v), 4) for k, v in share.items()}
        rates[group] = share | {"prompts": len(members), "expected": members[0]["expected"]}
    return rates


def read_prompts(path: Path) -> list[dict]:
    """Prompts of a JSONL file: {"prompt", "expected"?: "open" or "shut", "group"?} a line.

    Raises:
        UserError: no such file, or a line that is no such object; says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not str(entry.get("prompt") or "").strip():
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": ...}}, got {line[:60]!r}.'
            )
        if entry.get("expected", "open") not in EXPECTED:
            got = entry["expected"]
            raise UserError(f"{path}, line {number}: expected must be open or shut, got {got!r}.")
        rows.append({k: str(entry[k]) for k in ("prompt", "group", "expected") if k in entry})
    if not rows:
        raise UserError(f"{path} holds no prompts.")
    return rows
