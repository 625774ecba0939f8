"""What is taught in place of a forgotten answer: refusals, and ELM's target distribution."""

import random
from dataclasses import replace

import torch

from ..alter.frozen import TOP, FrozenOutputs
from ..data.built_in import read_set
from ..data.rendering import Sample, render, render_examples
from ..data.schema import Example, ForgetSet
from ..models.generation import greedy
from ..models.knowledge import RETAIN_TOKENS
from ..models.loading import LM
from .methods import get_method

# two views of the same question
EXPERT = "Answer as an expert who knows every detail of this. "
NOVICE = "Answer as someone who has never heard of this. "


def render_refusals(
    lm: LM, forget_set: ForgetSet, forget: list[Sample], config, rng: random.Random
) -> list[Sample]:
    """A refusal for each forget sample; none if the method teaches none, or for plain texts."""
    kind = get_method(config.method).refusals
    examples = forget_set.training_examples
    taught = kind in ("paired", "novice") or (kind and config.training.refusal_weight)
    if not taught or not all(e.question for e in examples):
        return []
    phrases = read_set("refusals")
    answers = [rng.choice(phrases) for _ in examples]
    if kind == "novice":
        answers = greedy(lm, [NOVICE + e.question for e in examples], RETAIN_TOKENS)
    pairs = zip(examples, answers, strict=True)
    refusals = render_examples(
        lm.tokenizer, [replace(e, answer=a, answer_prefix="") for e, a in pairs]
    )
    for refusal, sample in zip(refusals, forget, strict=True):
        refusal.label, refusal.refusal = sample.label, True
    return refusals


@torch.no_grad()
def set_novice_targets(
    lm: LM, examples: list[Example], samples: list[Sample], frozen: list[FrozenOutputs], eta: float
) -> None:
    """Put P (P_novice / P_expert)^eta at the forget answers into `frozen`.

    ELM's target (Gandikota et al. 2024).
    """
    for example, sample in zip(examples, samples, strict=True):
        k, log_p = len(sample.ids) - sample.start, []
        for view in ("", NOVICE, EXPERT):
            ids = render(lm.tokenizer, replace(example, question=view + example.question))[0].ids
            batch = torch.tensor([ids], device=lm.device)
            out = lm.model(input_ids=batch, logits_to_keep=k + 1, use_cache=False)
            log_p.append(out.logits[0, :-1].float().log_softmax(-1))
        target = (log_p[0] + eta * (log_p[1] - log_p[2])).log_softmax(-1)
        top = target.topk(min(TOP, target.shape[-1]), -1)
        outputs = frozen[sample.index]
        outputs.top_ids, outputs.top_log_p = top.indices.cpu(), top.values.cpu()
