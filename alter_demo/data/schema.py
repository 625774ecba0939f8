"""The data of an unlearning task: `Example` and `ForgetSet`."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from ..errors import UserError


@dataclass
class Example:
    """A question and its answer in TOFU's schema. A plain text has an empty question."""

    question: str
    answer: str
    paraphrased_question: str = ""
    paraphrased_answer: str = ""
    perturbed_answer: list[str] = field(default_factory=list)  # wrong answers of the same form
    keywords: list[str] = field(default_factory=list)  # an answer with any of them is correct
    topic: str = ""
    rewordings: list[str] = field(default_factory=list)  # further questions, for the gate's bank
    distant_question: str = ""  # the same without its names, only to measure the gate with
    sub_domain: int = 0  # from 1; if any example has 0, phase one clusters all
    source: str = ""  # the plain text of which this is another form
    answer_prefix: str = ""  # start of the answer that reveals nothing and is not unlearned


@dataclass
class ForgetSet:
    """What to forget and what to keep.

    Only `training_examples`, `retain` and `general` are trained on. The other parts are for
    evaluation, early stopping and the reference models.
    """

    name: str
    forget: list[Example]
    retain: list[Example]  # near the forget set, kept
    general: list[Example]  # everyday prompts, kept
    forget_held_out: list[Example]  # the facts of `forget` in other words
    neighbours: list[Example]  # held-out relatives of `retain`
    general_held_out: list[Example]
    training: list[Example] | None = None  # trained on in place of `forget`
    needs_teaching: bool = False  # no pretrained model knows it: see `models.teaching`
    extra_groups: dict[str, list[Example]] = field(default_factory=dict)  # measured too, kept
    holdout: list[Example] = field(default_factory=list)  # like `forget`, never taught
    from_pretraining: bool = False  # only facts that the model knows are used: see `fit_to_model`
    # questions that only the gate is measured with: group -> examples
    gate_groups: dict[str, list[Example]] = field(default_factory=dict)
    probe: list[Example] | None = None  # decides when to stop, in place of `forget_held_out`
    benchmark: str = ""  # "tofu", "muse" or "wmdp"
    split: str = ""  # part of the benchmark, such as "forget10", "news" or "bio"
    public_checkpoints: bool = False  # models that have learned the set are public

    @property
    def training_examples(self) -> list[Example]:
        """What is unlearned, and what the target model is taught before."""
        return self.training or self.forget

    @property
    def is_plain_text(self) -> bool:
        """Whether plain texts are unlearned, so that no sample looks like a question on them."""
        parts = (self.forget, self.training_examples)
        return not all(any(example.question for example in part) for part in parts)

    def evaluation_groups(self) -> dict[str, list[Example]]:
        """The groups that `metrics.json` reports."""
        groups = {name: getattr(self, name) for name in ("forget", "forget_held_out", "neighbours")}
        groups |= {"general": self.general_held_out, **self.extra_groups}
        return groups | {"holdout": self.holdout}

    def with_retain_limit(self, limit: int | None) -> ForgetSet:
        """A copy with the first `limit` retain examples and the neighbours that belong to them.

        The examples that follow become the holdout if the set has none.
        """
        if limit is None:
            return self
        if limit < 1:
            raise UserError(f"The number of retain examples must be at least 1, got {limit}.")
        retain = self.retain[:limit]
        questions = {q for e in retain for q in (e.question, e.paraphrased_question)}

        def related(examples: list[Example]) -> list[Example]:
            return [e for e in examples if e.question in questions] or examples

        groups = {k: related(v) if k == "retain" else v for k, v in self.extra_groups.items()}
        parts = {"retain": retain, "neighbours": related(self.neighbours), "extra_groups": groups}
        holdout = self.holdout or self.retain[limit : limit + len(self.forget)]
        return replace(self, holdout=holdout, **parts)

    def with_eval_limits(self, n: int | None, kept: int | None = None, seed: int = 0) -> ForgetSet:
        """A copy with at most `n` examples in each evaluation group, `kept` in the kept groups."""
        if n is None:
            return self
        kept = n if kept is None else kept
        sizes = {"forget": n, "forget_held_out": n, "holdout": n}
        sizes |= {"neighbours": kept, "general_held_out": kept}
        parts = {part: sample(getattr(self, part), size, seed) for part, size in sizes.items()}
        groups = {name: sample(group, kept, seed) for name, group in self.extra_groups.items()}
        return replace(self, training=self.training_examples, extra_groups=groups, **parts)


def sample(examples: list, n: int, seed: int) -> list:
    """At most `n` of the examples, drawn with the seed, in their original order."""
    chosen = random.Random(seed).sample(range(len(examples)), min(n, len(examples)))
    return [examples[i] for i in sorted(chosen)]


def paraphrased(examples: list[Example]) -> list[Example]:
    """The examples that have a paraphrased question, with it as their question."""
    return [replace(e, question=e.paraphrased_question) for e in examples if e.paraphrased_question]
