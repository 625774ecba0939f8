"""What the notebooks share: one unlearning run, a table of words, and a checker of the exercises.

`check(name, answer)` prints whether an exercise is solved, and a hint if it is not. A wrong answer
never raises, so a notebook runs from top to bottom before any exercise is solved.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from .alter.config import AlterConfig
from .alter.entropy import entropy_range, tsallis_entropy
from .alter.experts import ExpertDelta
from .alter.losses import inverted_hinge_loss
from .alter.routing import acting_expert, fuse_experts
from .config import DataConfig, UnlearnConfig, training_config
from .data.files import read_file
from .errors import UserError
from .evaluation import metrics
from .experiments.attacks import fake_quantize
from .files import cache_dir
from .inspection.traces import TokenTrace
from .inspection.words import expert_name, words
from .models.loading import load_model
from .run import Run, load_run
from .unlearn import unlearn

WORD_KINDS = {  # first letters of a C5 tag -> kind of word
    "NP": "name", "CRD": "number", "ORD": "number", "NN": "noun", "AJ": "adjective", "VV": "verb",
    "AV": "adverb",
}  # fmt: skip


def load_lesson_run(train: bool = False) -> Run:
    """Return a short run of the built-in model that unlearns Harry Potter.

    The run comes from the cache if the same sources of this package have trained it before and
    `train` is False.
    """
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()[:6]
    folder = cache_dir() / "lessons"
    path = folder / f"harry-potter-{key}"
    lm = load_model("smollm2-135m", dtype="float32")
    cached = path.is_dir()
    if cached and not train:
        return load_run(path, lm)
    training = training_config("alter_selective", max_steps=15, batch_size=3, probe_every=5)
    config = UnlearnConfig(training=training, data=DataConfig(general=80, retain=140))
    run = unlearn(lm, "harry-potter", config)
    if not cached:
        for old in folder.glob("harry-potter-*"):  # runs of older sources
            shutil.rmtree(old, ignore_errors=True)
        run.save(path)
    return run


def word_frame(texts: list[list[TokenTrace]]) -> pd.DataFrame:
    """Return one row for each word of the texts.

    Columns: word, kind (part of speech, from HanTa's tagger), change of log p (of the word), and
    S_q, route and expert of the prediction that the word comes from.
    """
    from HanTa.HanoverTagger import HanoverTagger

    tagger, rows = HanoverTagger("morphmodel_en.pgz"), []
    for traces in texts:
        entries = [entry for entry in words(traces) if entry[0]]
        tags = [tag for _, _, tag in tagger.tag_sent([word for word, _, _ in entries])]
        for (word, source, own), tag in zip(entries, tags, strict=True):
            kinds = (kind for start, kind in WORD_KINDS.items() if tag.startswith(start))
            changes = [t.log_prob_after - t.log_prob for t in own if t.log_prob is not None]
            rows.append({
                "word": word, "kind": next(kinds, "function word"), "S_q": source.entropy,
                "route": source.route, "expert": expert_name(source),
                "change of log p": float(np.mean(changes)) if changes else 0.0,
            })  # fmt: skip
    return pd.DataFrame(rows)


@dataclass
class Exercise:
    """An exercise is solved if the answer returns the same as `solution` for all `inputs`."""

    hint: str
    solution: Callable
    inputs: list[tuple]
    parse: Callable | None = None  # applied to what the answer returns


def check(name: str, answer: Callable) -> None:
    """Print whether the exercise is solved, and a hint if it is not."""
    hint = find_hint(name, answer)
    print(f"✔ {name}: right." if hint is None else f"✘ {name}: not yet. {hint}")


def find_hint(name: str, answer: Callable) -> str | None:
    """Return None if the answer is right, else a hint. Raises UserError for an unknown name."""
    if name not in EXERCISES:
        raise UserError(f"Exercise {name!r} not found. Choose one of {', '.join(EXERCISES)}.")
    exercise = EXERCISES[name]
    try:
        for arguments in exercise.inputs:
            expected, result = exercise.solution(*arguments), answer(*deepcopy(arguments))
            if result is None and expected is not None:
                return exercise.hint
            result = exercise.parse(result) if exercise.parse else result
            if not is_equal(result, expected):
                values = [shorten(x) for x in (arguments, result, expected)]
                return "{} For {} it returns {} instead of {}.".format(exercise.hint, *values)
    except Exception as error:  # the learner's code can raise anything
        return f"{exercise.hint} It raises {type(error).__name__}: {str(error).rstrip('.')}."
    return None


def is_equal(result, expected) -> bool:
    """Compare numbers and arrays with a tolerance, everything else exactly."""
    if any(x is None or isinstance(x, str | bool) for x in (result, expected)):
        return type(result) is type(expected) and result == expected
    if isinstance(expected, list):
        return list(result) == expected
    a, b = (np.asarray(torch.as_tensor(x).detach(), float) for x in (result, expected))
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-4, atol=1e-6))


def shorten(value) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_jsonl(text: str) -> list[tuple[str, str]]:
    """Questions and answers that the package reads from a JSONL text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.jsonl"
        path.write_text(text, encoding="utf-8")
        return [(e.question, e.answer) for e in read_file(path)]


DISTRIBUTIONS = np.array([[0.2] * 5, [0.9, 0.04, 0.03, 0.02, 0.01], [0.5, 0.3, 0.1, 0.06, 0.04]])
VALUES = np.random.default_rng(0).permutation(np.arange(101.0))  # 0 to 100, shuffled
FRAME = pd.DataFrame({"word": ["owl", "Ron", "the", "owl"], "route": ["B", "B", "A", "B"]})
CURVE = [{"step": s, "rouge_l": r} for s, r in ((0, 0.1), (5, 0.4), (10, 0.8))]
RNG = torch.Generator().manual_seed(0)
LAYER = [torch.randn(shape, generator=RNG) for shape in ((4, 6), (2, 6), (3, 5, 2))]  # x, A, B

EXERCISES = {
    "tsallis": Exercise(
        "S_q = (1 - sum_i p_i^q) / (q - 1).",
        lambda p, q: tsallis_entropy(torch.tensor(p).log(), q).item(),
        list(product(DISTRIBUTIONS, (0.5, 1.5, 2.0))),
    ),
    "largest_entropy": Exercise(
        "S_q is largest if all n outcomes have probability 1/n.",
        entropy_range,
        list(product((2, 49152), (0.5, 1.5, 2.0))),
    ),
    "threshold_for_share": Exercise(
        "The given share of the values lies above the threshold, so it is a quantile.",
        lambda values, share: np.quantile(values, 1 - share),
        [(VALUES, share) for share in (0.25, 0.5, 0.1)],
    ),
    "adapter_size": Exercise(
        "One A has r x n_in parameters. B_r and each of the n B_f's have n_out x r.",
        lambda r, n_in, n_out, n: r * n_in + (1 + n) * n_out * r,
        [(8, 576, 1536, 4), (2, 10, 20, 1)],
    ),
    "update": Exercise(
        "y = sum_e w_e B_e A x, for each of the n tokens.",
        lambda x, a, b, w: ExpertDelta.apply(x, a, b, w, None, None),
        [(*LAYER, torch.eye(3)[[0, 1, 2, 0]]), (*LAYER, torch.rand(4, 3, generator=RNG))],
    ),
    "gate_weights": Exercise(
        "Uncertain: softmax over the best three experts at temperature 0.8. Confident: one expert.",
        lambda z, high: fuse_experts(z[None], torch.tensor([high]), AlterConfig(n_experts=4))[0],
        list(product(torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.1, 0.3, 0.2, 0.4]]), (True, False))),
    ),
    "inverted_hinge": Exercise(
        "1 + p of the right token - the largest p among the others.",
        lambda p, i: inverted_hinge_loss(torch.tensor(p).log()[None], torch.tensor([i])).item(),
        list(product(DISTRIBUTIONS, (0, 1))),
    ),
    "hinge_slope": Exercise(
        "The derivative is p_true (1 - p_true + p_other).",
        lambda p_true, p_other: p_true * (1 - p_true + p_other),
        [(0.94, 0.05), (0.4, 0.35), (0.999, 0.0008)],
    ),
    "divergence": Exercise(
        "KL(p || q) = sum_i p_i ln(p_i / q_i).",
        lambda p, q: float((p * np.log(p / q)).sum()),
        [tuple(DISTRIBUTIONS[[i, j]]) for i, j in ((0, 1), (1, 0), (2, 2))],
    ),
    "share_to_a": Exercise(
        "Count the traces whose route is A.",
        lambda traces: sum(t.route == "A" for t in traces) / len(traces),
        [([SimpleNamespace(route=r) for r in routes],) for routes in ("AABB", "B", "BAAAB")],
    ),
    "top_words": Exercise(
        "Keep the rows of this route and count the words, most frequent first.",
        lambda frame, route: frame[frame.route == route].word.value_counts().index.tolist(),
        [(FRAME, "B"), (FRAME, "A")],
    ),
    "acting_expert": Exercise(
        "Column 0 is B_r, which acts beside the others. If all are 0, nothing acts: return 0.",
        lambda w: acting_expert(torch.tensor(w), AlterConfig(n_experts=2, gate="bank")).item(),
        [([1.0, 0.2, 0.8],), ([1.0, 0.8, 0.2],), ([1.0, 1.0, 0.0],), ([0.0, 0.0, 0.0],)],
    ),
    "answer_probability": Exercise(
        "exp of the mean log-probability of the tokens.",
        lambda log_p: np.exp(sum(log_p) / len(log_p)),
        [([-0.1, -0.3],), ([-2.0],), ([-5.0, -1.0, -0.5],)],
    ),
    "truth_ratio": Exercise(
        "exp of (mean log P of the wrong answers - log P of the right answer).",
        metrics.truth_ratio,
        [(-0.5, [-2.0, -3.0]), (-2.0, [-1.0, -1.5, -0.5])],
    ),
    "extraction_strength": Exercise(
        "1 - k/n, where k is the length of the shortest prefix after which every token is a hit.",
        metrics.extraction_strength,
        [([x == "1" for x in hits],) for hits in ("1011", "11", "00", "01011")],
    ),
    "utility": Exercise(
        "The harmonic mean, and 0 if any value is 0.",
        metrics.model_utility,
        [([0.5, 1.0],), ([0.9, 0.8, 0.01],), ([0.7, 0.0],)],
    ),
    "round_to_bits": Exercise(
        "The largest value becomes 2^(bits-1) - 1: divide, round, multiply.",
        lambda w, bits: fake_quantize(torch.tensor(w)[None], bits, 16)[0].numpy(),
        [(torch.randn(16, generator=RNG).numpy(), bits) for bits in (8, 4, 2)],
    ),
    "steps_to_recover": Exercise(
        "The first step whose rouge_l is at least the level, or None if there is none.",
        lambda curve, level: next((p["step"] for p in curve if p["rouge_l"] >= level), None),
        [(CURVE, 0.4), (CURVE, 0.05), (CURVE, 0.9)],
    ),
    "share_leaked": Exercise(
        "Count the answers that contain the word, in upper or lower case.",
        lambda answers, word: sum(word.lower() in a.lower() for a in answers) / len(answers),
        [(["It is HOGWARTS.", "Eton", "hogwarts!"], "Hogwarts"), (["No"], "x")],
    ),
    "to_jsonl": Exercise(
        "Write one JSON object with question and answer per line. json.dumps escapes for you.",
        lambda rows: rows,
        [([("Who is Ada?", "A cat.")],), ([('What is "x\\y"?', "Two\nlines."), ("Où?", "Là.")],)],
        parse=read_jsonl,
    ),
    "in_both": Exercise(
        "Keep the rows of the first list that the second list contains, question and answer alike.",
        lambda forget, retain: [row for row in forget if row in retain],
        [([("a", "1"), ("b", "2")], [("b", "2"), ("a", "9")]), ([("a", "1")], [])],
    ),
    "weights_gb": Exercise(
        "Each parameter takes bits / 8 bytes, and a GB has 2^30 bytes.",
        lambda parameters, bits: parameters * bits / 8 / 2**30,
        list(product((134_515_008, 8_030_261_248), (4, 16, 32))),
    ),
}
