"""What the notebooks share: checkers of their exercises, the run that three of them look at, words with their kind.

`check(name, answer)` says whether an exercise is solved and, if not, what is missing. It never raises, so that a
notebook runs from top to bottom before anything is solved.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import losses, metrics
from .adapter import AlterConfig, ExpertDelta
from .attacks import round_trip
from .data import read_file
from .entropy import entropy_range, tsallis_entropy
from .errors import UserError
from .models import cache_dir, load_model
from .routing import fuse
from .runs import Run, UnlearnConfig, load_run, unlearn
from .tokens import TokenRecord, expert_name, words
from .training import train_config

KINDS = {  # beginnings of the tags of the C5 tag set
    "NP": "name", "CRD": "number", "ORD": "number", "NN": "noun", "AJ": "adjective", "VV": "verb", "AV": "adverb",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ for all of them


def forgotten(train: bool = False, on_step=None) -> Run:
    """The built-in model after it has forgotten Harry Potter, with fewer samples and steps than `unlearn` takes.

    Args:
        train: run it now in any case; else it is loaded from the cache if this very code has run it before.
    """
    folder = cache_dir() / "lessons"
    sources = sorted(Path(__file__).parent.glob("*.py"))
    name = f"harry-potter-{hashlib.sha256(b''.join(f.read_bytes() for f in sources)).hexdigest()[:6]}"
    lm, stored = load_model("smollm2-135m", dtype="float32"), (folder / name).is_dir()
    if stored and not train:
        return load_run(folder / name, lm)
    if not stored:  # what earlier code has left
        for old in folder.glob("harry-potter-*"):
            shutil.rmtree(old, ignore_errors=True)
    config = UnlearnConfig(general=80, retain=140)
    train = train_config("alter_selective", max_steps=15, batch_size=3, probe_every=5)
    return unlearn(lm, "harry-potter", config, train, name, None if stored else folder, evaluate=False, on_step=on_step)


def word_frame(texts: list[list[TokenRecord]]) -> pd.DataFrame:
    """Every word of some texts: word, kind (name, number, noun, verb, ..., function word), how its log-probability
    changed, and S_q, route and expert of the prediction that it came from. The kinds are HanTa's."""
    from HanTa.HanoverTagger import HanoverTagger

    tagger, rows = HanoverTagger("morphmodel_en.pgz"), []
    for records in texts:
        found = [entry for entry in words(records) if entry[0]]
        tags = [tag for _, _, tag in tagger.tag_sent([w for w, _, _ in found])]
        for (word, source, group), tag in zip(found, tags, strict=True):
            kind = next((k for start, k in KINDS.items() if tag.startswith(start)), "function word")
            both = [(r.log_prob, r.log_prob_after) for r in group if r.log_prob is not None]
            rows.append({
                "word": word, "kind": kind, "S_q": source.entropy, "route": source.route,
                "expert": expert_name(source),
                "change of log p": float(np.mean([after - before for before, after in both])) if both else 0.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------ exercises


def check(name: str, answer) -> None:
    """Print whether the exercise is solved, with a hint if not. Raises UserError for an unknown exercise."""
    hint = verdict(name, answer)
    print(f"✔ {name}: right." if hint is None else f"✘ {name}: not yet. {hint}")


def verdict(name: str, answer) -> str | None:
    """None for a right answer, else a hint."""
    if name not in EXERCISES:
        raise UserError(f"The exercises are {', '.join(EXERCISES)}, and {name!r} is none of them.")
    cases, hint = EXERCISES[name]
    try:
        for arguments, wanted in cases():
            got = answer(*arguments)
            if got is None and wanted is not None:
                return hint
            if not same(got, wanted):
                other = "" if callable(wanted) else f" instead of {short(wanted)}"
                return f"{hint} For {short(arguments)} it gives {short(got)}{other}."
    except Exception as error:  # whatever a learner's code throws is an answer too
        reason = str(error).rstrip(".")
        return f"{hint} It raises {type(error).__name__}: {reason}."
    return None


def same(got, wanted) -> bool:
    if callable(wanted):
        return wanted(got)
    if any(x is None or isinstance(x, str | bool) for x in (got, wanted)):
        return type(got) is type(wanted) and got == wanted
    if isinstance(wanted, list) and not all(isinstance(x, int | float) for x in wanted):
        return list(got) == wanted
    a, b = (np.asarray(torch.as_tensor(x).detach() if isinstance(x, torch.Tensor) else x, float) for x in (got, wanted))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-4, atol=1e-6))


def short(value) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


MIXED = np.random.default_rng(0).permutation(np.arange(101.0))  # 0 to 100 in no order
FIVE = ([0.2] * 5, [0.9, 0.04, 0.03, 0.02, 0.01], [0.5, 0.3, 0.1, 0.06, 0.04])


def entropies():
    for p in FIVE:
        for q in (0.5, 1.5, 2.0):
            yield (np.array(p), q), tsallis_entropy(torch.tensor(p).log(), q).item()


def updates():
    torch.manual_seed(0)
    x, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(3, 5, 2)
    for w in (torch.eye(3)[torch.tensor([0, 1, 2, 0])], torch.rand(4, 3)):
        yield (x, a, b, w), ExpertDelta.apply(x, a, b, w, None, None)


def gates():
    config = AlterConfig(n_experts=4)
    for z in ([2.0, 1.0, 0.5, -1.0], [0.1, 0.3, 0.2, 0.4]):
        for high in (True, False):
            yield (torch.tensor(z), high), fuse(torch.tensor([z]), torch.tensor([high]), config)[0]


def hinges():
    for p in FIVE:
        for right in (0, 1):
            loss = losses.inverted_hinge_loss(torch.tensor([p]).log(), torch.tensor([right]))
            yield (np.array(p), right), loss.item()


def slopes():
    for z in ([4.0, 1.0, 0.0], [0.5, 0.4, 0.0], [9.0, 0.0, 0.0]):
        logits = torch.tensor([z], requires_grad=True)
        losses.inverted_hinge_loss(logits, torch.tensor([0])).sum().backward()
        p = logits.softmax(-1)[0]
        yield (p[0].item(), p[1].item()), logits.grad[0, 0].item()


def divergences():
    for p, q in ((FIVE[0], FIVE[1]), (FIVE[1], FIVE[0]), (FIVE[2], FIVE[2])):
        p, q = np.array(p), np.array(q)
        yield (p, q), float((p * np.log(p / q)).sum())


def record(route: str, weights=(0.0, 0.0), word=" so") -> TokenRecord:
    return TokenRecord(word, 1, False, 0, 1, 1.0, [], route, 0, list(weights), -1.0, -2.0, [], [], 0.0)


def frames():
    table = pd.DataFrame({"word": ["owl", "Ron", "the", "owl"], "route": ["B", "B", "A", "B"]})
    return [((table, "B"), ["owl", "Ron"]), ((table, "A"), ["the"])]


def truths():
    for right, wrong in ((-0.5, [-2.0, -3.0]), (-2.0, [-1.0, -1.5, -0.5])):
        yield (right, wrong), metrics.truth_ratio(right, wrong)


def hits():
    for row in ([True, False, True, True], [True, True], [False, False], [False, True, False, True, True]):
        yield (row,), metrics.extraction_strength(row)


def roundings():
    torch.manual_seed(0)
    for bits in (8, 4, 2):
        w = torch.randn(16)
        yield (w.numpy(), bits), round_trip(w[None], bits, 16)[0].numpy()


CURVE = [{"step": 0, "rouge_l": 0.1}, {"step": 5, "rouge_l": 0.4}, {"step": 10, "rouge_l": 0.8}]


def reads_back(rows: list[tuple[str, str]]) -> Callable[[str], bool]:
    """Whether the package reads these rows from a JSONL text."""

    def read(text: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mine.jsonl"
            path.write_text(text, encoding="utf-8")
            return [(i.question, i.answer) for i in read_file(path)] == rows

    return read


def files():
    for rows in ([("Who is Ada?", "A cat.")], [('What is "x\\y"?', "Two\nlines."), ("Où?", "Là.")]):
        yield (rows,), reads_back(rows)


# name -> (cases: (arguments, what comes out, or a function that says whether it is right), hint)
EXERCISES: dict[str, tuple[Callable, str]] = {
    "tsallis": (entropies, "S_q = (1 - sum_i p_i^q) / (q - 1)."),
    "largest_entropy": (
        lambda: [((n, q), entropy_range(n, q)) for n in (2, 49152) for q in (0.5, 1.5, 2.0)],
        "S_q is largest where all n outcomes have probability 1/n.",
    ),
    "threshold_for_share": (
        lambda: [((MIXED, share), np.quantile(MIXED, 1 - share)) for share in (0.25, 0.5, 0.1)],
        "The share is to lie above it: that is a quantile.",
    ),
    "adapter_size": (
        lambda: [((r, i, o, n), r * i + (1 + n) * o * r) for r, i, o, n in ((8, 576, 1536, 4), (2, 10, 20, 1))],
        "One A of r x n_in; B_r and n_experts B_f of n_out x r each.",
    ),
    "update": (updates, "y = sum_e w_e B_e A x, for each of the n tokens."),
    "gate_weights": (gates, "Softmax over the best three at tau 0.8 if the token is uncertain, one expert if not."),
    "inverted_hinge": (hinges, "1 + p of the right token - the largest p among the others."),
    "hinge_slope": (slopes, "d/dz_true = p_t (1 - p_t + p_m), p_m the largest of the others."),
    "divergence": (divergences, "KL(p || q) = sum_i p_i ln(p_i / q_i)."),
    "share_to_a": (
        lambda: [(([record(x) for x in way],), way.count("A") / len(way)) for way in ("AABB", "B", "BAAAB")],
        "Count the records whose route is A.",
    ),
    "top_words": (frames, "Keep the rows of that route, count the words, the most frequent first."),
    "acting_expert": (
        lambda: [(([1.0, 0.2, 0.8],), 2), (([1.0, 0.8, 0.2],), 1), (([1.0, 1.0, 0.0],), 1), (([0.0, 0.0, 0.0],), 0)],
        "Column 0 is B_r, which stands beside the others; all zero means that nothing acts: 0.",
    ),
    "answer_probability": (
        lambda: [((row,), math.exp(sum(row) / len(row))) for row in ([-0.1, -0.3], [-2.0], [-5.0, -1.0, -0.5])],
        "exp of the mean log-probability of the tokens.",
    ),
    "truth_ratio": (truths, "exp of (mean log P of the wrong answers - log P of the right one)."),
    "extraction_strength": (hits, "1 - k/n, k the shortest beginning after which every token is a hit."),
    "utility": (
        lambda: [((v,), metrics.model_utility(v)) for v in ([0.5, 1.0], [0.9, 0.8, 0.01], [0.7, 0.0])],
        "The harmonic mean, and 0 as soon as one value is 0.",
    ),
    "round_to_bits": (roundings, "The largest value becomes 2^(bits-1) - 1; divide, round, multiply."),
    "steps_to_recover": (
        lambda: [((CURVE, 0.4), 5), ((CURVE, 0.05), 0), ((CURVE, 0.9), None)],
        "The first step whose rouge_l is at least the level, None where it never is.",
    ),
    "share_leaked": (
        lambda: [((["It is HOGWARTS.", "Eton", "hogwarts!"], "Hogwarts"), 2 / 3), ((["No"], "x"), 0.0)],
        "Count the answers that hold the word, whatever its case.",
    ),
    "to_jsonl": (files, "One JSON object with question and answer a line; json.dumps escapes what must be escaped."),
    "in_both": (
        lambda: [(([("a", "1"), ("b", "2")], [("b", "2"), ("a", "9")]), [("b", "2")]), (([("a", "1")], []), [])],
        "The rows of the first list that stand in the second, question and answer alike.",
    ),
    "weights_gb": (
        lambda: [((n, bits), n * bits / 8 / 2**30) for n in (134_515_008, 8_030_261_248) for bits in (4, 16, 32)],
        "bits / 8 bytes for each parameter, 2^30 bytes a GB.",
    ),
}
