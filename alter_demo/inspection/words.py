"""From token traces to whole words, and how often each word takes each route."""

import re
from collections import Counter, defaultdict
from itertools import pairwise

from ..alter import MAX_EXPERTS
from .traces import TokenTrace

EXPERT_NAMES = ("B_r", *(f"B_f{d}" for d in range(1, MAX_EXPERTS + 1)))
NO_EXPERT = "none"


def words(traces: list[TokenTrace]) -> list[tuple[str, TokenTrace, list[TokenTrace]]]:
    """(word, the trace before it, its own traces) for each word of a text, or of an answer.

    The trace before a word holds the prediction that the word came from, with its S_q and expert;
    the loss counts tokens in the same way. Special tokens and punctuation are left out, and so is
    a word that starts the text, because nothing predicts it.
    """
    groups: list[list[TokenTrace]] = []
    for trace in traces:
        last = groups[-1][-1] if groups else None
        if last and trace.end and (trace.start, trace.end) == (last.start, last.end):
            continue  # another byte of the same character
        if last and continues(last, trace):
            groups[-1].append(trace)
        else:
            groups.append([trace])
    result = []
    for before, group in pairwise(groups):
        word = "".join(trace.token for trace in group).strip()
        template = group[0].special or group[0].in_question
        if not template and any(map(is_word_character, word)):
            result.append((re.sub(r"^\W+|\W+$", "", word), before[-1], group))
    return result


def continues(last: TokenTrace, trace: TokenTrace) -> bool:
    """Whether `trace` belongs to the same word as `last`, the trace before it."""
    if trace.special or last.special or trace.token[:1].isspace():
        return False
    return is_word_character(trace.token[:1]) and is_word_character(last.token[-1:])


def is_word_character(character: str) -> bool:
    return character.isalnum() or character in "'’-"


def expert_name(trace: TokenTrace) -> str:
    """The acting expert, NO_EXPERT if none acts, and B_r for a method without experts."""
    acts = any(trace.weights) or not trace.weights
    return EXPERT_NAMES[trace.expert] if acts else NO_EXPERT


def word_counts(routed_words, threshold: float) -> dict[str, dict[str, int]]:
    """How often each (word, S_q, `expert_name`) takes each route: {"A": {word: count}, ...}.

    A word with S_q above the threshold goes to A if an expert acts on it.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for word, entropy, expert in routed_words:
        counts["A" if entropy > threshold and expert != NO_EXPERT else expert][word] += 1
    return {route: dict(of_route) for route, of_route in counts.items()}
