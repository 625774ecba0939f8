"""Generating answers: greedy, sampled, or token by token for several models at once."""

from collections.abc import Iterator

import torch
from transformers import DynamicCache, GenerationConfig

from ..data.batches import collate, length_batches
from ..data.rendering import Sample, render_prompt
from .loading import LM

BATCH_TOKENS = 8192  # of a batch, new tokens included


def greedy(
    lm: LM, prompts: list[str], max_new_tokens=64, model=None, progress=None, answer_prefixes=None
) -> list[str]:
    """Greedy answers, in the order of `prompts`; after an answer prefix, only what follows it."""
    inputs = [render_prompt(lm.tokenizer, prompt) for prompt in prompts]
    if answer_prefixes:
        prefixes = lm.tokenizer(answer_prefixes, add_special_tokens=False).input_ids
        inputs = [prompt + prefix for prompt, prefix in zip(inputs, prefixes, strict=True)]
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
    lm: LM, inputs: list[list[int]], model=None, progress=None, **options
) -> list[list[str]]:
    """The texts that follow each row of token ids. `progress` is called with (done, total)."""
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
    """A GenerationConfig of `options` and nothing else."""
    # transformers fills open values from the model's own, which may ask for beams or penalties:
    # then no answer would be greedy, nor equal to that of `stream`
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    special = {"pad_token_id": lm.tokenizer.pad_token_id, "eos_token_id": eos_ids(lm)}
    return GenerationConfig(**neutral | special | options)


@torch.no_grad()
def stream(
    lms: list[LM], contexts: list, question: str, max_new_tokens=64, temperature=0.0, seed=0
) -> Iterator[list[str]]:
    """The answers so far of several models to one question, after each token.

    Each of `contexts` returns a context manager with the model to use. At a temperature above 0,
    all models draw with the same Gumbel noise, so equal distributions give equal answers.
    """
    prompts = [render_prompt(lm.tokenizer, question) for lm in lms]
    answers, caches = [[] for _ in lms], [DynamicCache() for _ in lms]
    texts, active = [""] * len(lms), [True] * len(lms)
    for step in range(max_new_tokens):
        for k, (lm, context) in enumerate(zip(lms, contexts, strict=True)):
            if not active[k]:
                continue
            new = torch.tensor([answers[k][-1:] or prompts[k]], device=lm.device)
            length = len(prompts[k]) + len(answers[k])
            mask = torch.ones(1, length, dtype=torch.long, device=lm.device)
            options = {"attention_mask": mask, "past_key_values": caches[k], "use_cache": True}
            with context() as model:
                out = model(input_ids=new, **options)
            token = next_token(out.logits[0, -1].float().cpu(), temperature, seed * 10_007 + step)
            active[k] = token not in eos_ids(lm)
            answers[k] += [token] if active[k] else []
            texts[k] = lm.tokenizer.decode(answers[k], skip_special_tokens=True).strip()
        yield list(texts)
        if not any(active):
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
