"""Token by token: how sure the model is, which way the token goes, what comes next before and after unlearning.

`entropy` and `route` of a token belong to its position: they come from the frozen model's prediction of what follows
it. Records of several texts become whole words (`words`), which is what a word cloud can show.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch

from .data import render_prompt
from .entropy import PUBLISHED_THRESHOLD, tsallis_entropy
from .errors import UserError
from .routing import chosen

QS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # orders that the X-ray's slider offers
TOP_K = 5
MAX_TOKENS = 4096
ROWS = 128  # positions whose distributions are in memory at once, in float32
EXPERT_NAMES = ("B_r", *(f"B_f{d}" for d in range(1, 9)))
NO_EXPERT = "none"


@dataclass
class TokenRecord:
    """One token as the router and both models saw it."""

    token: str  # the whole character where it is only a part of one
    id: int
    special: bool  # a mark or a word of the chat template, not of the question and the answer
    start: int  # span of the token in the text, characters; in a chat: in the whole rendered conversation
    end: int
    entropy: float  # S_q of the frozen model's prediction after this token, q of the adapter
    entropies: list[float]  # the same for each q of QS
    route: str  # "A": uncertain, "B": confident
    expert: int  # 0: B_r, or nothing acts; d: B_fd is the likeliest
    weights: list[float]  # B_r, B_f1 .. B_fN; all zero: the frozen model itself acts; []: the method has no experts
    log_prob: float | None  # of this token given those before, untouched model; None for the first
    log_prob_after: float | None
    top: list[tuple[str, float]]  # likeliest next tokens of the untouched model and their probabilities
    top_after: list[tuple[str, float]]
    change: float  # total variation between the two next-token distributions, 0 to 1
    asked: bool = False  # of the question, not of the answer


@torch.no_grad()
def token_records(run, text: str, question: str | None = None, top: int = TOP_K) -> list[TokenRecord]:
    """Records of a plain text, or of a question with `text` as its answer, in the chat's form.

    Raises:
        UserError: nothing to look at, or over 4096 tokens.
    """
    lm = run.lm
    ids, spans, whole = tokenized(lm.tokenizer, text, question)
    if not ids or not (text + (question or "")).strip():
        raise UserError("There is no text to look at.")
    if len(ids) > MAX_TOKENS:
        raise UserError(f"The text has {len(ids)} tokens, and {MAX_TOKENS} is the most.")
    batch = torch.tensor([ids], device=lm.device)
    with run.side(False) as model:
        out = model(input_ids=batch, use_cache=False, output_hidden_states=run.routed)
    before, plan, config = out.logits[0], None, run.router.config if run.routed else None
    if config:  # the plan follows from the frozen pass, which need not be run twice
        entropy = tsallis_entropy(out.logits, config.q)
        plan, _ = run.router.plan(out.hidden_states[config.feature_layer], entropy, torch.ones_like(batch))
    with run.following(plan) as model:
        after = model(input_ids=batch, use_cache=False).logits[0]
    q, threshold = (config.q, config.threshold) if config else (1.5, PUBLISHED_THRESHOLD)
    entropies = torch.stack([tsallis_entropy(before, x) for x in QS], -1)  # (T, |QS|)
    entropy = plan.entropy[0] if plan else tsallis_entropy(before, q)
    facts = compared(before, after, batch[0], top)
    experts = chosen(plan.weights[0], config).tolist() if plan else [0] * len(ids)
    marks, own = set(lm.tokenizer.all_special_ids), text_spans(whole, text, question)
    decode = lm.tokenizer.decode
    records = []
    for t, token in enumerate(ids):
        weights = [round(w, 4) for w in plan.weights[0, t].tolist()] if plan else []
        top_before, top_after = ([(decode([i]), p) for i, p in facts["top"][side][t]] for side in (0, 1))
        records.append(
            TokenRecord(
                token=whole[slice(*spans[t])] if "\ufffd" in decode([token]) else decode([token]),
                id=token,
                special=token in marks or not any(a <= spans[t][0] and spans[t][1] <= b for a, b in own),
                start=spans[t][0],
                end=spans[t][1],
                entropy=entropy[t].item(),
                entropies=[round(x, 4) for x in entropies[t].tolist()],
                route="A" if entropy[t] > threshold else "B",
                expert=experts[t],
                weights=weights,
                log_prob=facts["own"][0][t - 1] if t else None,
                log_prob_after=facts["own"][1][t - 1] if t else None,
                top=top_before,
                top_after=top_after,
                change=facts["change"][t],
                asked=question is not None and spans[t][1] <= own[0][1],
            )
        )
    return records


def text_spans(whole: str, text: str, question: str | None) -> list[tuple[int, int]]:
    """Where in `whole` a person's question and answer stand; all else is the chat template's."""
    if question is None:
        return [(0, len(whole))]
    asked = whole.rfind(question, 0, len(whole) - len(text))
    return [(asked, asked + len(question)), (len(whole) - len(text), len(whole))]


def tokenized(tokenizer, text: str, question: str | None) -> tuple[list[int], list[tuple[int, int]], str]:
    """Token ids, their spans of characters, and the text that the spans count in."""
    if question is None:
        encoded = tokenizer(text, return_offsets_mapping=True)
        return encoded.input_ids, encoded.offset_mapping, text
    prompt = tokenizer.decode(render_prompt(tokenizer, question))
    text = text if tokenizer.chat_template else f" {text}"
    parts = [tokenizer(x, add_special_tokens=False, return_offsets_mapping=True) for x in (prompt, text)]
    shifted = [(a + len(prompt), b + len(prompt)) for a, b in parts[1].offset_mapping]
    return parts[0].input_ids + parts[1].input_ids, parts[0].offset_mapping + shifted, prompt + text


def compared(before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor, top: int) -> dict:
    """Own log-probabilities, likeliest next tokens and total variation of two models' logits (T, V), slice by slice."""
    found = {"own": ([], []), "top": ([], []), "change": []}
    for first in range(0, len(ids), ROWS):
        rows = slice(first, first + ROWS)
        log_p = [x[rows].float().log_softmax(-1) for x in (before, after)]
        following = ids[first + 1 : first + ROWS + 1]
        for side, values in enumerate(log_p):
            found["own"][side].extend(values[: len(following)].gather(-1, following[:, None])[:, 0].tolist())
            best = values.exp().topk(top, -1)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found["top"][side].extend(list(zip(i, p, strict=True)) for i, p in pairs)
        found["change"] += ((log_p[0].exp() - log_p[1].exp()).abs().sum(-1) / 2).tolist()
    return found


# ---------------------------------------------------------------------------------------------------------- words


def words(records: list[TokenRecord]) -> list[tuple[str, TokenRecord, list[TokenRecord]]]:
    """Whole words of one text, or of the answer to a question: (word, the record before it, its own records).

    The record before a word holds the prediction that the word came from: its S_q, its experts. The loss counts
    tokens the same way. Left out are special tokens, marks, and a word that opens a text, which nothing predicts.
    """
    groups: list[list[TokenRecord]] = []
    for record in records:
        if groups and record.end and (record.start, record.end) == (groups[-1][-1].start, groups[-1][-1].end):
            continue  # another byte of the same character
        starts = record.special or not groups or groups[-1][-1].special or record.token[:1].isspace()
        glued = not starts and is_word(record.token[:1]) and is_word(groups[-1][-1].token[-1:])
        if glued:
            groups[-1].append(record)
        else:
            groups.append([record])
    found = []
    for before, group in pairwise(groups):
        word = "".join(r.token for r in group).strip()
        if not (group[0].special or group[0].asked) and any(map(is_word, word)):
            found.append((re.sub(r"^\W+|\W+$", "", word), before[-1], group))
    return found


def is_word(character: str) -> bool:
    return character.isalnum() or character in "'’-"


def expert_name(record: TokenRecord) -> str:
    """The expert that acts there, NO_EXPERT where the frozen model itself acts. B_r where there are no experts."""
    acts = any(record.weights) or not record.weights
    return EXPERT_NAMES[record.expert] if acts else NO_EXPERT


def word_counts(found: Iterable[tuple[str, float, str]], threshold: float) -> dict[str, dict[str, int]]:
    """How often each word went each way: {"A": {word: n}, "B_f1": {...}, ...}.

    Args:
        found: (word, S_q, `expert_name`) of each word. Where an expert acts, S_q above `threshold` is A's way.
    """
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for word, entropy, name in found:
        counts["A" if entropy > threshold and name != NO_EXPERT else name][word] += 1
    return {way: dict(own) for way, own in counts.items()}
