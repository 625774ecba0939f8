"""MUSE (Shi et al. 2024): memorization of news or books, by the size of the forget set.

For the forget set in rounds see `rounds.py`. Questions go through the chat template if there is
one; MUSE itself puts ten examples before each, for base models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..data.batches import length_batches
from ..data.benchmarks import muse_part
from ..data.schema import Example, ForgetSet
from ..errors import UserError
from ..evaluation import metrics
from ..models.generation import generation_config
from ..models.scoring import answer_scores
from .cells import Cell, Grid, GridConfig, GridOptions
from .tofu import figures

VERBATIM_PROMPT, VERBATIM_TOKENS = 200, 128  # tokens of a text to show, and to compare
BATCH_TOKENS = 2048
KNOWLEDGE_TOKENS = 32  # length of an answer
SHARES = (0.25, 0.5, 1.0)
GROUPS = ("forget", "retain", "general", "holdout")
TEXT_PARTS = ("verbmem_forget", "privleak_forget", "privleak_holdout")


def run_muse(config: GridConfig, options: GridOptions, shares: Sequence[float] = SHARES) -> dict:
    """Run each method and seed on growing shares of the forget set.

    Only the questions about the share are measured. Texts do not tell which questions are theirs,
    so with texts all questions are measured, and only what stays can be compared.

    Raises:
        UserError: as `Grid`; another forget set than MUSE's, or a share outside (0, 1].
    """
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"A share of the forget set must be in (0, 1], got {share:g}.")
    grid, retain_auc = Grid(config, options, "grid", GROUPS), None
    forget_set = grid.forget_set
    if forget_set.benchmark != "muse":
        raise UserError(f"`forget` must be muse-news or muse-books, got {config.forget!r}.")
    texts = {part: muse_part(forget_set.split, part, optional=True) for part in TEXT_PARTS}

    def measure_reference(which: str) -> dict:
        lm = grid.references.load(which)
        of_texts = measure_texts(lm, lm.model, texts, retain_auc)
        return {"metrics": grid.references.figures(which) | of_texts}

    def measure(run) -> dict:
        flat = figures(grid, run) | measure_texts(run.lm, run.model, texts, retain_auc)
        sizes = len(run.forget_set.forget), len(run.forget_set.training_examples)
        return {"metrics": flat, "questions": sizes[0], "trained_on": sizes[1]}

    grid.add_reference("retain", measure_reference)  # first: the others are compared with it
    retain_auc = grid.find(Cell("retain"))["metrics"].get("mia_min_k_texts")
    grid.add_reference("target", measure_reference)
    parts = {share: share_of(forget_set, share) for share in shares}
    cells = grid.cells([{"share": share} if share != 1 else {} for share in shares])
    chains = [[replace(cell, forget_set=parts[cell.marks.get("share", 1)])] for cell in cells]
    return grid.run(chains, measure)


def share_of(forget_set: ForgetSet, share: float) -> ForgetSet:
    """The first part of the training examples, with the questions about it; with all, if texts."""
    examples = forget_set.training_examples
    part = examples[: max(4, round(share * len(examples)))]
    if not all(e.question for e in part):
        return replace(forget_set, training=part, probe=part)
    names = ("forget", "forget_held_out", "probe")
    left = {name: [e for e in getattr(forget_set, name) if e in part] for name in names}
    return replace(forget_set, training=part, **left)


def measure_texts(lm, model, texts: dict[str, list[Example]], retain_auc=None) -> dict[str, float]:
    """Verbatim memorization, AUC of membership and, with the retain model's, privacy leakage.

    There are no figures without the `texts` of `TEXT_PARTS`.
    """
    flat, (verbatim, members, others) = {}, (texts[part] for part in TEXT_PARTS)
    if verbatim:
        flat["forget_verbmem_ROUGE"] = verbatim_memorization(lm, model, verbatim)
    if members and others:
        flat["mia_min_k_texts"] = auc = membership_auc(lm, model, members, others)
        if retain_auc is not None:
            flat["privleak"] = metrics.privleak(auc, retain_auc)
    return flat


@torch.no_grad()
def verbatim_memorization(lm, model, texts: list[Example]) -> float:
    """Mean ROUGE-L F1 of the greedy continuation of a text's first tokens against its next ones.

    The Hub's own files have these two parts as `prompt` and `gt`, here question and answer. Raises
    UserError if no text is long enough.
    """
    rows, scores, tokenizer = [], [], lm.tokenizer
    for text in texts:
        prompt = tokenizer(text.question).input_ids
        reference = tokenizer(text.answer, add_special_tokens=not text.question).input_ids
        if not text.question:
            prompt, reference = reference[:VERBATIM_PROMPT], reference[VERBATIM_PROMPT:]
        if reference:
            rows.append((prompt, reference[:VERBATIM_TOKENS]))
    if not rows:
        raise UserError(f"No text of MUSE is longer than the {VERBATIM_PROMPT} tokens to show.")
    lengths = [len(prompt) + VERBATIM_TOKENS for prompt, _ in rows]
    greedy = generation_config(lm, max_new_tokens=VERBATIM_TOKENS, do_sample=False)
    for batch in length_batches(lengths, BATCH_TOKENS):
        prompts = {"input_ids": [rows[i][0] for i in batch]}
        padded = tokenizer.pad(prompts, return_tensors="pt").to(lm.device)
        out = model.generate(**padded, generation_config=greedy)[:, padded.input_ids.shape[1] :]
        for i, answer in zip(batch, out, strict=True):
            pair = tokenizer.batch_decode([answer, rows[i][1]], skip_special_tokens=True)
            scores.append(metrics.rouge(*pair)[1])
    return float(np.mean(scores))


def membership_auc(lm, model, members: list[Example], others: list[Example]) -> float:
    """AUC of Min-K% between texts that were learned and texts that were not."""

    def min_k(texts: list[Example]) -> list[float]:
        answers = [text.answer for text in texts]
        scores = answer_scores(lm, [""] * len(texts), answers, model, full=False)
        return [metrics.min_k(s.log_p) for s in scores]

    return metrics.auc(min_k(members), min_k(others))
