"""MUSE (Shi et al. 2024): verbatim and knowledge memorisation of what is to be forgotten, knowledge of what stays,
privacy leakage, and how all this changes with the size of the forget set (rounds: `grid.sequential`).

Questions are asked as everywhere here, through the chat template where there is one; MUSE puts ten examples before
each, for base models.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from . import metrics
from .answers import answer_scores, length_batches, plain_generation
from .data import ForgetSet, Item, muse_part
from .errors import Diverged, UserError

VERBATIM_PROMPT, VERBATIM_TOKENS = 200, 128  # tokens that are shown, tokens that are compared
KNOWLEDGE_TOKENS = 32
SHARES = (0.25, 0.5, 1.0)
GROUPS = ("forget", "retain", "general", "holdout")


@torch.no_grad()
def verbatim(lm, model, texts: list[Item]) -> float:
    """Verbatim memorisation: mean ROUGE-L F1 of the greedy continuation of each text's first 200 tokens with its next
    128. Where the texts come as MUSE's `prompt` and `gt`, these are the two parts."""
    rows, scores, tokenizer = [], [], lm.tokenizer
    for text in texts:
        shown, right = tokenizer(text.question).input_ids, tokenizer(text.answer, add_special_tokens=False).input_ids
        if not text.question:
            ids = tokenizer(text.answer).input_ids
            shown, right = ids[:VERBATIM_PROMPT], ids[VERBATIM_PROMPT:]
        if right:
            rows.append((shown, right[:VERBATIM_TOKENS]))
    for batch in length_batches([len(shown) + VERBATIM_TOKENS for shown, _ in rows], 2048):
        padded = tokenizer.pad({"input_ids": [rows[i][0] for i in batch]}, return_tensors="pt").to(lm.device)
        how = plain_generation(lm, max_new_tokens=VERBATIM_TOKENS, do_sample=False)
        out = model.generate(**padded, generation_config=how)
        for i, said in zip(batch, out[:, padded.input_ids.shape[1] :], strict=True):
            pair = tokenizer.batch_decode([said, rows[i][1]], skip_special_tokens=True)
            scores.append(metrics.rouge(*pair)[1])
    if not scores:
        raise UserError(f"No text of MUSE is longer than the {VERBATIM_PROMPT} tokens that are shown.")
    return float(np.mean(scores))


def membership(lm, model, members: list[Item], others: list[Item]) -> float:
    """AUC of Min-K% between texts that were learned and texts that were not."""
    scored = [
        answer_scores(lm, [""] * len(own), [i.answer for i in own], model, full=False) for own in (members, others)
    ]
    return metrics.auc(*([metrics.min_k(s.log_p) for s in own] for own in scored))


def on_texts(lm, model, texts: dict[str, list[Item]], auc_retain: float | None = None) -> dict[str, float]:
    """`verbmem_ROUGE`, and `privleak` beside the retain model's AUC; nothing where the texts are not there."""
    found = {}
    if texts["verbmem_forget"]:
        found["forget_verbmem_ROUGE"] = verbatim(lm, model, texts["verbmem_forget"])
    if texts["privleak_forget"] and texts["privleak_holdout"]:
        found["mia_min_k_texts"] = membership(lm, model, texts["privleak_forget"], texts["privleak_holdout"])
        if auc_retain is not None:
            found["privleak"] = metrics.privleak(found["mia_min_k_texts"], auc_retain)
    return found


def muse_grid(config, methods: list[str], seeds: list[int], how, shares: tuple[float, ...] = SHARES) -> dict:
    """Each method and seed on growing shares of the forget set; goes on where it stopped, as `grid.grid`.

    Asked is about what was unlearned. Texts do not tell which questions are theirs: of a share of them all are asked,
    and only what stays can be compared.

    Raises:
        UserError: as `grid.Bench` does; another forget set than MUSE's; a share outside (0, 1].
    """
    from .grid import Bench, to_base

    if not config.forget.startswith("muse-"):
        raise UserError(f"MUSE is muse-news or muse-books, not {config.forget!r}.")
    if not all(0 < s <= 1 for s in shares):
        raise UserError("A share of the forget set lies above 0 and is 1 at most.")
    bench = Bench(config, methods, how, GROUPS)
    kind = config.forget.removeprefix("muse-")
    texts = {k: muse_part(kind, k, True) for k in ("verbmem_forget", "privleak_forget", "privleak_holdout")}
    bench.prepare()
    whole, full = dict(bench.logs), bench.made
    auc = None
    for which in reversed(whole):  # the retain model first: the others are measured beside it
        if not bench.done(which, 0, {}):
            lm = bench.reference(which)
            bench.add(which, 0, bench.figures(whole[which]) | on_texts(lm, lm.model, texts, auc), {})
            del lm
        if which == "retain":
            auc = bench.found("retain", 0, {})["metrics"].get("mia_min_k_texts")
    values = how.settings[0]
    marks = [{} if share == 1 else {"share": share} for share in shares]
    wanted = [(m, s, values | own) for s in seeds for m in methods for own in marks]
    missing = [item for item in wanted if not bench.done(*item)]
    for number, (method, seed, overrides) in enumerate(missing, 1):
        if how.should_stop():
            break
        made = share_of(full, overrides.get("share", 1))
        asked = {i.question for i in made.forget}
        for which, log in whole.items():
            rows = log["forget"][log["forget"]["question"].isin(asked)].reset_index(drop=True)
            bench.logs[which] = log | {"forget": rows}
        name = f"{number} of {len(missing)}: {method}, seed {seed}, {len(made.trained_on)} of {len(full.trained_on)}"
        try:
            run = bench.unlearn(bench.reference("target"), made, method, seed, overrides, name, seen=bench.seen)
            if run is None:
                break
            found = bench.figures(run.logs["after"]) | to_base(run) | on_texts(run.lm, run.model, texts, auc)
        except Diverged:
            bench.add(method, seed, {}, overrides, stopped="diverged")
            continue
        bench.add(method, seed, found, overrides, run, questions=len(made.forget), trained_on=len(made.trained_on))
        del run
    return bench.results


def share_of(made: ForgetSet, share: float) -> ForgetSet:
    """The first part of what is trained on, with those questions that it holds; with all where it is texts."""
    part = made.trained_on[: max(4, round(share * len(made.trained_on)))]
    if not all(i.question for i in part):
        return replace(made, training=part, probe=part)
    left = {k: [i for i in getattr(made, k) if i in part] for k in ("forget", "forget_held_out", "probe")}
    return replace(made, training=part, **left)
