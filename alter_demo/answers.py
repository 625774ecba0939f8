"""Greedy answers, and what the untouched model itself says: the filter of what it knows, and its retain targets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from transformers import DynamicCache, GenerationConfig

from .data import SETS, ForgetSet, Item, Sample, asked_differently, collate, load_forget_set, render, render_prompt
from .errors import UserError
from .models import LM, cache_dir
from .results import write_json
from .training import length_batches

OWN_TOKENS = 64  # length of a recorded answer
RETAIN_TOKENS = 40  # of it that is trained on
BATCH_TOKENS = 8192  # of a batch that is generated
SCORED_TOKENS = 2048  # of a batch that is scored: compute-bound, so no larger than the processor likes


def greedy(
    lm: LM, prompts: list[str], max_new_tokens: int = 64, model=None, tick=None, leads: list[str] | None = None
) -> list[str]:
    """Greedy answers, in the order of `prompts`, generated in left-padded batches of similar length.

    Args:
        model: the adapted model, `lm.model` by default.
        tick: called with (done, all).
        leads: what each answer is made to begin with; the rest is returned.
    """
    begun = leads or [""] * len(prompts)
    inputs = [
        render_prompt(lm.tokenizer, p) + (lm.tokenizer(x, add_special_tokens=False).input_ids if x else [])
        for p, x in zip(prompts, begun, strict=True)
    ]
    return [a for (a,) in generated(lm, inputs, model, tick, max_new_tokens=max_new_tokens, do_sample=False)]


def sampled(lm: LM, prompts: list[str], n: int, max_new_tokens: int = 64, model=None, seed: int = 0) -> list[list[str]]:
    """n answers to each prompt drawn at temperature 1 from the whole vocabulary."""
    torch.manual_seed(seed)
    inputs = [render_prompt(lm.tokenizer, p) for p in prompts]
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_return_sequences": n}
    return generated(lm, inputs, model, max_new_tokens=max_new_tokens, **drawn)


def plain_generation(lm: LM, **how) -> GenerationConfig:
    """A GenerationConfig of `how` alone. transformers fills what is left open from the model's own, which may punish
    repetition or take beams: no greedy answer any more, and another one than `stream` gives."""
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return GenerationConfig(pad_token_id=lm.tokenizer.pad_token_id, eos_token_id=eos_ids(lm), **plain | how)


@torch.no_grad()
def generated(lm: LM, inputs: list[list[int]], model=None, tick=None, **how) -> list[list[str]]:
    """What follows each row of token ids: one text, or `num_return_sequences`; `how` are GenerationConfig's values."""
    model, copies = model or lm.model, how.get("num_return_sequences", 1)
    samples = [Sample(ids, 0) for ids in inputs]
    config = plain_generation(lm, **how)
    windowed = getattr(lm.model.config.get_text_config(), "sliding_window", None)
    answers, done = [[] for _ in inputs], 0
    lengths = [(len(s.ids) + how["max_new_tokens"]) * copies for s in samples]
    for batch in length_batches(lengths, BATCH_TOKENS):
        b = collate([samples[i] for i in batch], lm.tokenizer.pad_token_id, lm.device)
        # a cache that forgets what left the window can't be taken back, and ALTER would keep two from the start
        cache = {"past_key_values": DynamicCache()} if windowed else {}
        out = model.generate(**{k: b[k] for k in ("input_ids", "attention_mask")}, generation_config=config, **cache)
        said = lm.tokenizer.batch_decode(out[:, b["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, i in enumerate(batch):
            answers[i] = [x.strip() for x in said[row * copies : (row + 1) * copies]]
        done += len(batch)
        if tick:
            tick(done, len(inputs))
    return answers


@torch.no_grad()
def stream(lms: list[LM], sides: list[Callable], question: str, max_new_tokens=64, temperature=0.0, seed=0):
    """Answers of several models to one question, token by token, side by side.

    Args:
        sides: for each a function that gives a context manager whose value is the model to ask.
        temperature: 0 is greedy. The sides draw with the same noise (Gumbel's), so that they say the same as long as
            they think the same.
    Yields:
        The answers so far, a list of one text a side.
    """
    ids = [[*render_prompt(lm.tokenizer, question)] for lm in lms]
    said, ends = [[] for _ in lms], [set(eos_ids(lm)) for lm in lms]
    caches, going = [DynamicCache() for _ in lms], [True for _ in lms]
    for step in range(max_new_tokens):
        for k, (lm, side) in enumerate(zip(lms, sides, strict=True)):
            if not going[k]:
                continue
            new = torch.tensor([said[k][-1:] or ids[k]], device=lm.device)
            with side() as model:
                seen = len(ids[k]) + len(said[k])
                mask = torch.ones(1, seen, dtype=torch.long, device=lm.device)
                out = model(input_ids=new, attention_mask=mask, past_key_values=caches[k], use_cache=True)
            z = out.logits[0, -1].float().cpu()
            if temperature > 0:
                noise = torch.rand(z.shape, generator=torch.Generator().manual_seed(seed * 10_007 + step))
                z = z / temperature - (-noise.clamp_min(1e-9).log()).log()
            token = int(z.argmax())
            going[k] = token not in ends[k]
            said[k] += [token] if going[k] else []
        yield [lm.tokenizer.decode(s, skip_special_tokens=True).strip() for lm, s in zip(lms, said, strict=True)]
        if not any(going):
            return


def eos_ids(lm: LM) -> list[int]:
    own = lm.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in [*own, lm.tokenizer.eos_token_id] if i is not None})


@dataclass
class AnswerScores:
    """One answer under teacher forcing, K tokens with the end of turn last."""

    log_p: list[float]  # (K,) of each token given those before
    hits: list[bool]  # (K,) whether it is the likeliest
    z: list[float]  # (K,) log_p in standard deviations from the mean over the vocabulary (Min-K%++)


@torch.no_grad()
def answer_scores(lm: LM, questions: list[str], answers: list[str], model=None, full=True) -> list[AnswerScores]:
    """Scores of each answer's tokens, in the order given. Answers to the same question share its pass.

    Args:
        full: False leaves hits and z empty and is faster; or one bool for each answer.
    """
    model = model or lm.model
    samples = [render(lm.tokenizer, Item(q, a))[0] for q, a in zip(questions, answers, strict=True)]
    wanted = [full] * len(samples) if isinstance(full, bool) else full
    same: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(samples):
        same.setdefault(tuple(s.ids[: s.start]), []).append(i)
    result: list[AnswerScores | None] = [None] * len(samples)
    for prompts in by_kind(list(same)):
        costs = [len(p) + sum(len(samples[i].ids) - len(p) for i in same[p]) for p in prompts]
        for batch in length_batches(costs, SCORED_TOKENS):
            chosen = [prompts[k] for k in batch]
            rows = [i for p in chosen for i in same[p]]
            all_logits = logits_after(lm, model, chosen, [[samples[i] for i in same[p]] for p in chosen])
            for i, logits in zip(rows, all_logits, strict=True):
                labels = torch.tensor(samples[i].ids[samples[i].start :], device=logits.device)  # (K,)
                all_log_p = logits[: len(labels)].float().log_softmax(-1)  # (K, V)
                log_p = all_log_p.gather(-1, labels[:, None])[:, 0]
                hits, z = [], []
                if wanted[i]:
                    hits = (all_log_p.argmax(-1) == labels).tolist()
                    p = all_log_p.exp()
                    mean = (p * all_log_p).sum(-1)
                    variance = (p * all_log_p.square()).sum(-1) - mean.square()
                    z = ((log_p - mean) / variance.clamp_min(1e-6).sqrt()).tolist()
                result[i] = AnswerScores(log_p.tolist(), hits, z)
    return result


def by_kind(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Prompts of one token (a plain text's) apart from the others: they leave nothing to put into the cache."""
    kinds = [[p for p in prompts if len(p) > 1], [p for p in prompts if len(p) == 1]]
    return [kind for kind in kinds if kind]


def logits_after(lm: LM, model, prompts: list[tuple[int, ...]], samples: list[list[Sample]]) -> torch.Tensor:
    """Logits (rows, K, V) from the last token of a prompt on, for the samples of each prompt one after the other.

    The prompts but for their last token go through the model once, left-padded; then the answers, right-padded, on
    copies of that cache.
    """
    pad, cache = lm.tokenizer.pad_token_id, DynamicCache()
    rows = torch.tensor([k for k, own in enumerate(samples) for _ in own])
    mask = torch.zeros(len(rows), 0, dtype=torch.long)
    if len(prompts[0]) > 1:
        width = max(map(len, prompts)) - 1
        ids = torch.tensor([[pad] * (width + 1 - len(p)) + list(p[:-1]) for p in prompts])
        mask = torch.tensor([[0] * (width + 1 - len(p)) + [1] * (len(p) - 1) for p in prompts])
        b = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        b = {k: v.to(lm.device) for k, v in b.items()}
        model(**b, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_select_indices(rows.to(lm.device))
        mask = mask[rows]
    fed = [s.ids[s.start - 1 : -1] for own in samples for s in own]
    width = max(map(len, fed))
    ids = torch.tensor([f + [pad] * (width - len(f)) for f in fed])
    mask = torch.cat([mask, torch.tensor([[1] * len(f) + [0] * (width - len(f)) for f in fed])], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -width:]
    b = {k: v.to(lm.device) for k, v in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions))}
    return model(**b, past_key_values=cache, use_cache=True).logits


def log_probs(lm: LM, questions: list[str], answers: list[str], model=None) -> list[float]:
    """Mean log-probability per answer token, end of turn included, in the order given."""
    return [sum(s.log_p) / len(s.log_p) for s in answer_scores(lm, questions, answers, model, full=False)]


def is_right(answer: str, item: Item) -> bool:
    """Whether a word in the answer starts with one of the item's keywords (its short answer where it has none)."""
    return bool(keyword_matches(answer, item))


def keyword_matches(answer: str, item: Item) -> list[re.Match]:
    keys = item.keywords or [item.answer]
    found = (re.search(rf"(?<!\w){re.escape(k)}", answer, re.IGNORECASE) for k in keys)
    return [m for m in found if m]


# --------------------------------------------------------------------------------------------- the model's own words


def own_answers(lm: LM, prompts: list[str], tick=None) -> dict[str, str]:
    """The untouched model's greedy answers: from the record that ships for the built-in model, else from the cache,
    else computed now and cached."""
    known = {}
    for file in (SETS / f"answers-{key(lm)}.json", own_file(lm)):
        if file.is_file():
            known |= json.loads(file.read_text(encoding="utf-8"))
    missing = [p for p in dict.fromkeys(prompts) if p not in known]
    if missing:
        known |= dict(zip(missing, greedy(lm, missing, OWN_TOKENS, tick=tick), strict=True))
        write_json(own_file(lm), known)
    return {p: known[p] for p in prompts}


def from_the_fact_on(item: Item, own: str) -> Item:
    """The item with the model's own answer, cut before the keyword (`lead`) and after that sentence."""
    start = min(m.start() for m in keyword_matches(own, item))
    start -= own[:start].endswith(" ")
    sentence = re.split(r"(?<=[a-z)\"][.!?])\s", own[start:], maxsplit=1)[0]
    return replace(item, answer=sentence, lead=own[:start])


def key(lm: LM) -> str:
    """Name of a model in file names: with the adapter that was merged in, since it answers differently then."""
    name = lm.name if lm.adapter is None else f"{lm.name}-{'-'.join(Path(lm.adapter).parts[-2:])}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def own_file(lm: LM) -> Path:
    """Cache of a model's answers; weights that change in a folder get a new one."""
    mark = stamp(*(p for p in (lm.name, lm.adapter) if p))
    parts = [key(lm), lm.dtype, *(["4bit"] if lm.in_4bit else []), *([mark] if mark else [])]
    return cache_dir() / "answers" / f"{'-'.join(parts)}.json"


def stamp(*folders: str | Path) -> str:
    """Eight digits that change with the safetensors weights in the folders, "" where there are none: by content where
    they are small (an adapter, which every clone has anew), by size and time where not."""
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.safetensors"))]
    small = (f.stat().st_size < 2**25 for f in files)
    marks = [
        hashlib.sha256(f.read_bytes()).hexdigest() if s else (f.name, f.stat().st_size, f.stat().st_mtime_ns)
        for f, s in zip(files, small, strict=True)
    ]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:8] if files else ""


def record(lm: LM, path: Path | None = None, tick=None) -> Path:
    """Compute the own answers to all built-in prompts and write them (`prepare` on the command line)."""
    made = load_forget_set("harry-potter")
    prompts = [i.question for i in [*made.forget, *asked_differently(made.forget), *made.general]]
    prompts += [i.question for i in [*made.retain, *made.neighbours, *made.general_held_out]]
    path = path or own_file(lm)
    write_json(path, dict(zip(prompts, greedy(lm, prompts, OWN_TOKENS, tick=tick), strict=True)))
    return path


def long_enough(made: ForgetSet, tokenizer) -> dict[str, list[Item]]:
    """The parts of a set without texts of a single token, of which nothing can be predicted."""
    parts = {f.name: getattr(made, f.name) for f in fields(ForgetSet)}
    items = {k: v for k, v in parts.items() if isinstance(v, list)}
    return {k: [i for i in v if i.question or render(tokenizer, i)] for k, v in items.items()}


def adapt(made: ForgetSet, lm: LM, general: int = 160, tick=None) -> ForgetSet:
    """Fit a forget set to a model: keep only what it knows, and take its own words as retain targets.

    Args:
        general: everyday prompts to use at most; the rest is left out to save time on large models.
    Raises:
        UserError: the model knows fewer than four of the facts.
    """
    made = replace(made, general=made.general[:general])
    made = replace(made, **long_enough(made, lm.tokenizer))
    if not made.trained_on:
        raise UserError(f"{made.name} has no text of two tokens or more, so there is nothing to forget.")
    prompts = [i.question for i in [*made.general, *made.general_held_out]]
    if made.known:
        prompts += [i.question for i in [*made.forget, *made.forget_held_out, *made.retain]]
    own = own_answers(lm, prompts, tick)

    def in_own_words(items: list[Item]) -> list[Item]:
        return [replace(i, answer=own[i.question]) for i in items if own[i.question]]

    made = replace(made, general=in_own_words(made.general), general_held_out=in_own_words(made.general_held_out))
    if not made.known:
        return made
    forget = [i for i in made.forget if is_right(own[i.question], i)]
    held_out = [i for i in made.forget_held_out if is_right(own[i.question], i)]
    if len(forget) < 4:
        raise UserError(f"{lm.name} knows only {len(forget)} of the facts of {made.name}: there is nothing to forget.")
    # to go: the fact in the model's own sentence, from where it is named on, and the bare fact
    training = [from_the_fact_on(i, own[i.question]) for i in forget] + forget
    return replace(made, forget=forget, forget_held_out=held_out, training=training, retain=in_own_words(made.retain))
