"""How well the gate recognises what it stored: shares of prompts that open it, by kind of prompt.

Nothing is trained. A gate is fitted to a forget set, or taken from a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from scipy.stats import binomtest

from ..alter.bank import one_text, plan_tokens
from ..alter.frozen import PhaseOneResult, gate_states
from ..callbacks import Callback
from ..config import flat_config
from ..data.files import parse_jsonl
from ..data.rendering import Sample, render_prompt
from ..data.schema import ForgetSet
from ..errors import UserError
from ..inspection.traces import gate_reasons
from ..models.loading import LM
from ..run import fit_forget_set
from ..unlearn import run_phase_one
from .attacks import PROMPTS
from .results import add_result

# what a group's prompts should do; those of all other groups should leave the gate shut
EXPECTED = {"reworded": "open", "distant": "open", "name alone": ""}
# group -> what its prompts are also put into, see `PROMPTS`
CONTEXTS = {"reworded": ("neutral_text", "few_shot", "role_play"), "neighbours": ("neutral_text",)}
FIRST_TURN = "What is the capital of France?", "The capital of France is Paris."


def prepare_gate(
    lm: LM, forget_set: ForgetSet, values: dict, callback: Callback, leave_out_every: int = 0
) -> tuple[PhaseOneResult, list[dict]]:
    """Phase one of `alter_selective` on a forget set, and the prompts to measure the gate with.

    Args:
        values: of the config, such as {"seed": 1, "feature_layer": 3}.
        leave_out_every: n leaves every n-th question out of the fit; these are the prompts then.
    """
    values = values | {"refusal_weight": 0.0}  # refusals come after the gate
    config = flat_config("alter_selective", values, forget_set.is_plain_text)
    forget_set, _ = fit_forget_set(forget_set, lm, config.data, callback)
    if leave_out_every:
        forget_set, prompts = leave_out(forget_set, leave_out_every)
    else:
        prompts = prompts_of(forget_set)
    return run_phase_one(lm, forget_set, config, callback), prompts


def score_prompts(
    lm: LM, gate: PhaseOneResult, prompts: list[dict], progress: Callable | None = None
) -> list[dict]:
    """What the gate says about prompts, each {"prompt", "group"?, "expected"?, "turns"?}.

    Returns:
        For each prompt {"prompt", "group", "expected", "open" (where the answer starts),
        "threshold"} and the `gate_reasons` of the token with the highest score, of any turn.
    """
    samples = []
    for row in prompts:
        ids = render_prompt(lm.tokenizer, row["prompt"], row.get("turns", ()))
        samples.append(Sample([*ids, lm.tokenizer.eos_token_id], len(ids), turn=len(ids)))
    states, result = gate_states(lm, samples, gate.alter.feature_layer, progress), []
    for row, own_states, sample in zip(prompts, states, samples, strict=True):
        tokens = one_text(sample.ids, own_states)
        scores = plan_tokens(gate.alter, gate.gate, gate.bank, tokens)[0].scores
        best = max(gate_reasons(scores)[: sample.turn], key=lambda reasons: reasons["score"])
        own = {name: row.get(name, "") for name in ("prompt", "group", "expected")}
        own["open"] = scores.opened[0, sample.turn - 1].item()
        result.append(own | {"threshold": round(gate.alter.gate_threshold, 4)} | best)
    return result


def prompts_of(forget_set: ForgetSet) -> list[dict]:
    """Prompts of every kind: questions of the set, the same in other words, and what stays."""
    stored = dict.fromkeys(e.question for e in forget_set.training_examples if e.question)
    groups = {"reworded": [e for e in forget_set.forget_held_out if e.question not in stored]}
    groups |= {"neighbours": forget_set.neighbours, "everyday": forget_set.general_held_out}
    groups |= {k: v for k, v in forget_set.extra_groups.items() if k != "retain"}
    distant = (replace(e, question=e.distant_question) for e in forget_set.forget)
    groups |= {"distant": [*distant]} | forget_set.gate_groups
    rows = [row(question, "stored", "open") for question in stored]
    for group, examples in groups.items():
        examples, expected = [e for e in examples if e.question], EXPECTED.get(group, "shut")
        rows += [row(e.question, group, expected) for e in examples]
        for name in CONTEXTS.get(group, ()):
            prompts = (PROMPTS[name](e, forget_set) for e in examples)
            rows += [row(prompt, f"{group}, {name}", expected) for prompt in prompts]
    second = {"turns": [FIRST_TURN]}
    name = "reworded, second turn"
    return rows + [row(e.question, name, "open") | second for e in groups["reworded"]]


def leave_out(forget_set: ForgetSet, every: int) -> tuple[ForgetSet, list[dict]]:
    """The set without every n-th forget and retain question, and these as prompts.

    Raises UserError if no forget question would be left out or kept.
    """
    left = {}
    for part in ("forget", "retain"):
        questions = [*dict.fromkeys(e.question for e in getattr(forget_set, part) if e.question)]
        left[part] = questions[every - 1 :: every]
        if part == "forget" and not 2 <= every <= len(questions):
            raise UserError(
                f"--leave-out must be at least 2 and at most the number of forget questions, "
                f"{len(questions)}, got {every}."
            )
    rows = [row(q, "left out", "open") for q in left["forget"]]
    rows += [row(q, "retain, left out", "shut") for q in left["retain"]]
    gone = {q for questions in left.values() for q in questions}
    parts = {
        part: [e for e in examples if e.question not in gone]
        for part in ("forget", "retain", "training")
        if (examples := getattr(forget_set, part))
    }
    return replace(forget_set, **parts), rows


def row(prompt: str, group: str, expected: str) -> dict:
    return {"prompt": prompt, "group": group, "expected": expected}


def open_rates(scores: list[dict]) -> dict[str, dict]:
    """{group: {"open": share, "low", "high": 95 % Wilson interval, "prompts": n, "expected"}}.

    Prompts without a group do not count.
    """
    rates = {}
    for group in dict.fromkeys(s["group"] for s in scores if s["group"]):
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
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from None
    rows = []
    for number, entry in parse_jsonl(text, path.name):
        if not isinstance(entry, dict) or not str(entry.get("prompt") or "").strip():
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": ...}}, got {str(entry)[:60]!r}.'
            )
        if entry.get("expected", "open") not in ("open", "shut"):
            got = entry["expected"]
            raise UserError(f"{path}, line {number}: expected must be open or shut, got {got!r}.")
        rows.append({k: str(entry[k]) for k in ("prompt", "group", "expected") if k in entry})
    if not rows:
        raise UserError(f"{path} holds no prompts.")
    return rows


def store(
    path: Path, lm: LM, gate: PhaseOneResult, rates: dict, config: dict, command: str
) -> dict:
    """Add the rates of one set, of `open_rates`, to a results file. Returns the whole content."""
    config = {"model": lm.name, "feature_layer": gate.alter.feature_layer} | config
    entry = {"id": json.dumps(["gate", config]), "method": "alter_selective"}
    entry |= {"seed": config["seed"], "config": config, "command": command, "rates": rates}
    entry["metrics"] = {group: rate["open"] for group, rate in rates.items()}
    return add_result(path, entry | {"hardware": lm.hardware}, "gate")
