"""Generating answers: greedy, sampled, or token by token for several models at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache, GenerationConfig

from ..data.batches import collate, length_batches
from ..data.rendering import Sample, render_prompt
from .loading import LM

BATCH_TOKENS = 8192  # of a batch, new tokens included


def greedy(
    lm: LM,
    prompts: list[str],
    max_new_tokens: int = 64,
    model=None,
    progress: Callable[[int, int], None] | None = None,
    answer_prefixes: list[str] | None = None,
) -> list[str]:
    """Greedy answers, in the order of `prompts`; after an answer prefix, only what follows it."""
    prefixes = answer_prefixes or [""] * len(prompts)
    inputs = [
        render_prompt(lm.tokenizer, prompt)
        + (lm.tokenizer(prefix, add_special_tokens=False).input_ids if prefix else [])
        for prompt, prefix in zip(prompts, prefixes, strict=True)
    ]
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    return [answer for (answer,) in generated(lm, inputs, model, progress, **options)]


def sampled(
    lm: LM, prompts: list[str], n: int, max_new_tokens: int = 64, model=None, seed: int = 0
) -> list[list[str]]:
    """`n` answers to each prompt, sampled at temperature 1 from the whole vocabulary."""
    torch.manual_seed(seed)
    inputs = [render_prompt(lm.tokenizer, prompt) for prompt in prompts]
    options = {"max_new_tokens": max_new_tokens, "num_return_sequences": n, "do_sample": True}
    options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return generated(lm, inputs, model, **options)


@torch.no_grad()
def generated(
    lm: LM,
    inputs: list[list[int]],
    model=None,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> list[list[str]]:
    """The texts that follow each row of token ids: `num_return_sequences`, 1 by default.

    Args:
        progress: called with the number of answers done and of all answers.
        options: values of GenerationConfig, with `max_new_tokens`.
    """
    model, copies = model or lm.model, options.get("num_return_sequences", 1)
    config = generation_config(lm, **options)
    windowed = getattr(lm.model.config.get_text_config(), "sliding_window", None)
    answers: list[list[str]] = [[] for _ in inputs]
    lengths = [(len(ids) + options["max_new_tokens"]) * copies for ids in inputs]
    for indices in length_batches(lengths, BATCH_TOKENS):
        samples = [Sample(inputs[i], 0) for i in indices]
        batch = collate(samples, lm.tokenizer.pad_token_id, lm.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        # a sliding-window cache cannot be cropped: with it ALTER would always need two caches
        cache = {"past_key_values": DynamicCache()} if windowed else {}
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **cache)
        texts = lm.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for row, i in enumerate(indices):
            answers[i] = [text.strip() for text in texts[row * copies : (row + 1) * copies]]
        if progress:
            progress(sum(map(bool, answers)), len(inputs))
    return answers


def generation_config(lm: LM, **options) -> GenerationConfig:
    """A GenerationConfig with `options` and nothing from the model's own.

    transformers fills open values from the model's, which may ask for beams or penalize
    repetition. Then no answer would be greedy, nor equal to that of `stream`.
    """
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    special = {"pad_token_id": lm.tokenizer.pad_token_id, "eos_token_id": eos_ids(lm)}
    return GenerationConfig(**neutral, **special, **options)


@torch.no_grad()
def stream(
    lms: list[LM],
    contexts: list[Callable],
    question: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[list[str]]:
    """The answers of several models to one question, as far as they are, token by token.

    At a temperature above 0 all models draw with the same Gumbel noise, so they give the same
    answer as long as their distributions agree.

    Args:
        contexts: for each model a function that returns a context manager with the model to use.
    """
    streams = [
        stream_one(lm, context, question, temperature, seed)
        for lm, context in zip(lms, contexts, strict=True)
    ]
    answers = [""] * len(lms)
    for new in itertools.islice(itertools.zip_longest(*streams), max_new_tokens):
        answers = [old if text is None else text for old, text in zip(answers, new, strict=True)]
        yield answers


def stream_one(
    lm: LM, context: Callable, question: str, temperature: float, seed: int
) -> Iterator[str]:
    """The answer of one model to a question after each token, the end of the answer included."""
    prompt, ids, ends, cache = (
        render_prompt(lm.tokenizer, question),
        [],
        eos_ids(lm),
        DynamicCache(),
    )
    for step in itertools.count(seed * 10_007):
        new = torch.tensor([ids[-1:] or prompt], device=lm.device)
        mask = torch.ones(1, len(prompt) + len(ids), dtype=torch.long, device=lm.device)
        options = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        with context() as model:
            out = model(input_ids=new, **options)
        token = next_token(out.logits[0, -1].float().cpu(), temperature, step)
        ids += [] if token in ends else [token]
        yield lm.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if token in ends:
            return


def next_token(logits: torch.Tensor, temperature: float, seed: int) -> int:
    """The argmax of logits (V,), with Gumbel noise of the seed if the temperature is above 0."""
    if temperature > 0:
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed))
        logits = logits / temperature - (-noise.clamp_min(1e-9).log()).log()
    return int(logits.argmax())


def eos_ids(lm: LM) -> list[int]:
    """The token ids that end an answer, of the model and of the tokenizer."""
    ids = lm.model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in [*ids, lm.tokenizer.eos_token_id] if i is not None})
