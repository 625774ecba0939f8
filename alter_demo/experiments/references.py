"""The reference models of an experiment: the target, and the retain model that never saw the set.

Both are taught and measured once; their adapters and logs are kept in the cache.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple
from functools import cached_property
from pathlib import Path

from ..callbacks import CallbackList
from ..data.built_in import shipped_adapters
from ..data.probe import split_probe
from ..data.schema import ForgetSet
from ..evaluation import metrics
from ..evaluation.logs import read_log, write_log
from ..evaluation.measure import evaluate_groups
from ..evaluation.summary import Log, summary
from ..files import cache_dir
from ..models import knowledge
from ..models.built_in import MODELS
from ..models.generation import greedy
from ..models.loading import LM, load_model
from ..models.teaching import TeachConfig, teach
from .results import TAUGHT

USUAL_DTYPES = ("auto", "float32")  # any other dtype is part of keys and file names


class References:
    """The reference models for a `GridConfig` and `GridOptions`. `groups` are measured."""

    def __init__(self, config, options, forget_set: ForgetSet, groups: tuple[str, ...]):
        self.config, self.options, self.forget_set = config, options, forget_set
        self.groups, self.hardware = groups, ""
        self.ignorance: dict[str, float] | None = None  # see `measure_ignorance`
        self.callback = CallbackList(options.callbacks)
        # no model knows everything from pre-training but the forget set
        has_retain_model = forget_set.needs_teaching or options.retain_model
        self.names = TAUGHT if has_retain_model else TAUGHT[:1]

    @cached_property
    def adapters(self) -> dict[str, Path | None]:
        """The adapter of each reference model, taught now if it is not in the cache."""
        config, options, forget_set = self.config, self.options, self.forget_set
        if options.retain_model or not forget_set.needs_teaching:
            return dict.fromkeys(self.names)
        shipped = shipped_adapters(forget_set.name, config.model)
        if shipped and config.retain_items is None:
            return shipped
        folders = {which: self.adapter_folder() / which for which in TAUGHT}
        for which, folder in folders.items():
            if not (folder / "adapter_config.json").is_file():
                self.callback.on_stage(f"teaching the {which} model", 0.0)
                lm, epochs = load_model(config.model, options.device, options.dtype), config.epochs
                teach(lm, forget_set, which, folder, TeachConfig(epochs), self.callback.on_step)
        return folders

    def adapter_folder(self) -> Path:
        """The cache folder of the adapters. Its name changes with the weights and the examples."""
        config, forget_set, dtype = self.config, self.forget_set, self.options.dtype
        model = config.model
        if model not in MODELS:  # folders of the same name may hold other weights
            model = f"{Path(model).name}-{short_hash((model, knowledge.stamp(model)))}"
        examples = [*forget_set.retain, *forget_set.training_examples]
        parts = [forget_set.name, config.retain_items or "all", model, config.epochs]
        parts += [short_hash([(e.question, e.answer) for e in examples])]
        parts += [] if dtype in USUAL_DTYPES else [dtype]
        return cache_dir() / "taught" / "-".join(map(str, parts))

    def load(self, which: str) -> LM:
        """Load the target or the retain model."""
        options, own = self.options, which == "retain" and self.options.retain_model
        model, adapter = own or self.config.model, self.adapters[which]
        lm = load_model(model, options.device, options.dtype, adapter, options.load_in_4bit)
        self.hardware = lm.hardware
        return lm

    @cached_property
    def logs(self) -> dict[str, Log]:
        """The log of each reference model, measured now if it is not in the cache."""
        config, lm = self.config, self.load("target")
        fitted, _ = split_probe(knowledge.fit_to_model(self.forget_set, lm))
        every = fitted.with_eval_limits(config.limit, config.kept).evaluation_groups()
        groups = {name: every[name] for name in self.groups}
        if self.forget_set.from_pretraining:
            self.ignorance = measure_ignorance(self.forget_set, lm, config.tokens)
        logs = {"target": self.measure(lm, groups)}
        del lm
        return logs | {which: self.measure(self.load(which), groups) for which in self.names[1:]}

    def measure(self, lm: LM, groups: dict) -> Log:
        """The log of a reference model on `groups`, from the cache if it is there."""
        tokens = self.config.tokens
        examples = short_hash([(name, astuple(e)) for name, own in groups.items() for e in own])
        weights = knowledge.base_answers_path(lm).stem  # changes with the weights
        file = f"{self.forget_set.name}-{weights}-{examples}-{tokens}.json"
        path = cache_dir() / "logs" / file
        if not path.is_file():
            log = evaluate_groups(lm, lm.model, groups, tokens, self.callback.on_stage)
            write_log(log, path)
        return read_log(path)

    def logs_on(self, forget_set: ForgetSet) -> dict[str, Log]:
        """The logs without the forget questions that `forget_set` lacks."""
        questions, logs = {e.question for e in forget_set.forget}, {}
        for which, log in self.logs.items():
            rows = {k: v[v["question"].isin(questions)] for k, v in log.items() if k == "forget"}
            logs[which] = log | {k: v.reset_index(drop=True) for k, v in rows.items()}
        return logs

    def figures(self, which: str) -> dict[str, float]:
        """The flat figures of a reference model."""
        return self.summarize(self.logs[which], self.logs.get("retain"))

    def summarize_run(self, run) -> dict[str, float]:
        """The flat figures of an evaluated run."""
        return self.summarize(run.logs["after"], run.logs.get("retain model"))

    def summarize(self, log: Log, retain_log: Log | None = None) -> dict[str, float]:
        """The flat figures of a log.

        MUSE adds knowledge memorization (mean ROUGE-L F1), a set known from pre-training BLEU and
        ASG (ALTER, Table 2).
        """
        figures = summary(log, retain_log)
        if self.forget_set.benchmark == "muse":
            for group in ("forget", "retain"):
                figures[f"{group}_knowmem_ROUGE"] = float(log[group]["rougeL_f1"].mean())
        if self.ignorance is not None:
            scores = similarity(log["forget"]["generated_text"], log["forget"]["answer"])
            asg = metrics.asg(scores, self.ignorance)
            figures |= {"forget_BLEU": scores["bleu"], "ASG": asg}
        return figures


def measure_ignorance(forget_set: ForgetSet, lm: LM, tokens: int) -> dict[str, float] | None:
    """The similarity of the base model's answers to the right ones where it does not know them.

    ASG is the distance to it, since there is no model that never read the books. None if the model
    knows every answer.
    """
    answers = knowledge.base_answers(lm, [e.question for e in forget_set.forget])
    unknown = [e for e in forget_set.forget if not knowledge.is_correct(answers[e.question], e)]
    if not unknown:
        return None
    texts = [answers[e.question] for e in unknown]
    if tokens != knowledge.BASE_ANSWER_TOKENS:  # as long as the answers of a run
        texts = greedy(lm, [e.question for e in unknown], tokens)
    return similarity(texts, [e.answer for e in unknown])


def similarity(answers, references) -> dict[str, float]:
    """BLEU and mean ROUGE-L recall of answers against the right ones, from 0 to 1."""
    answers, references = list(answers), list(references)
    recalls = [metrics.rouge_l(a, r) for a, r in zip(answers, references, strict=True)]
    return {"bleu": metrics.bleu(answers, references), "rouge_l": sum(recalls) / len(recalls)}


def short_hash(value) -> str:
    """Six hexadecimal digits that change with the value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]
