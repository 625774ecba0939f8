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
from .answers import answer_scores, length_batches
from .data import Item, muse_part
from .errors import Diverged, UserError

VERBATIM_PROMPT, VERBATIM_TOKENS = 200, 128  # tokens that are shown, tokens that are compared
KNOWLEDGE_TOKENS = 32
SHARES = (0.25, 0.5, 1.0)
GROUPS = ("forget", "retain", "general", "holdout")


@torch.no_grad()
def verbatim(lm, model, texts: list[Item]) -> float:
    """Verbatim memorisation: mean ROUGE-L F1 of the greedy continuation of each text's first 200 tokens with its next
    128."""
    rows = [lm.tokenizer(i.answer).input_ids[: VERBATIM_PROMPT + VERBATIM_TOKENS] for i in texts]
    rows, scores, pad = [r for r in rows if len(r) > VERBATIM_PROMPT], [], lm.tokenizer.pad_token_id
    for batch in length_batches([len(r) for r in rows], 2048):
        ids = torch.tensor([rows[i][:VERBATIM_PROMPT] for i in batch], device=lm.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=VERBATIM_TOKENS, do_sample=False,
            pad_token_id=pad,
        )  # fmt: skip
        for i, said in zip(batch, out[:, VERBATIM_PROMPT:], strict=True):
            pair = lm.tokenizer.batch_decode([said, rows[i][VERBATIM_PROMPT:]], skip_special_tokens=True)
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

    Raises:
        UserError: as `grid.Bench` does; another forget set than MUSE's; a share outside (0, 1].
    """
    from .grid import Bench, to_base
    from .models import load_model

    if not config.forget.startswith("muse-"):
        raise UserError(f"MUSE is muse-news or muse-books, not {config.forget!r}.")
    if not all(0 < s <= 1 for s in shares):
        raise UserError("A share of the forget set lies above 0 and is 1 at most.")
    bench = Bench(config, methods, how, GROUPS)
    kind = config.forget.removeprefix("muse-")
    texts = {k: muse_part(kind, k, True) for k in ("verbmem_forget", "privleak_forget", "privleak_holdout")}
    bench.prepare()
    whole, full = bench.logs, bench.made
    auc = None
    for which in reversed(whole):  # the retain model first: the others are measured beside it
        if not bench.done(which, 0, {}):
            name = how.retain_model if which == "retain" and how.retain_model else config.model
            lm = load_model(name, how.device, how.dtype, bench.folders[which])
            bench.add(which, 0, bench.figures(whole[which]) | on_texts(lm, lm.model, texts, auc), {})
            del lm
        if which == "retain":
            stored = next(r for r in bench.results["runs"] if r["method"] == "retain")
            auc = stored["metrics"].get("mia_min_k_texts")
    wanted = [(m, s, {} if share == 1 else {"share": share}) for s in seeds for m in methods for share in shares]
    missing = [item for item in wanted if not bench.done(*item)]
    for number, (method, seed, overrides) in enumerate(missing, 1):
        if how.should_stop():
            break
        n = max(4, round(overrides.get("share", 1) * len(full.forget)))
        part = round(overrides.get("share", 1) * len(full.training or full.forget))
        made = replace(full, forget=full.forget[:n], forget_held_out=full.forget[:n], training=None)
        if full.training:
            made = replace(made, training=full.training[:part])
        bench.logs = {w: log | {"forget": log["forget"].iloc[:n]} for w, log in whole.items()}
        name = f"{number} of {len(missing)}: {method}, seed {seed}, {n} questions"
        try:
            run = bench.unlearn(bench.target(), made, method, seed, how.settings[0], name, seen=bench.seen)
        except Diverged:
            bench.add(method, seed, {}, overrides, stopped="diverged")
            continue
        if run is None:
            break
        found = bench.figures(run.logs["after"]) | to_base(run) | on_texts(run.lm, run.model, texts, auc)
        bench.add(method, seed, found, overrides, run, questions=n)
        del run
    return bench.results
