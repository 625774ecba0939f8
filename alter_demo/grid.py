"""A benchmark: every method, several seeds, one results file that each finished item is added to.

The target and the retain-only model are taught and measured once and kept in the cache. An interrupted grid goes on
where it stopped: what stands in the results file is not run again.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path

from . import evaluate as evaluation
from . import metrics
from .adapter import MAX_EXPERTS
from .answers import OWN_TOKENS, adapt, greedy, is_right, own_answers, own_file, stamp
from .data import MAX_TOKENS, ForgetSet, adapters, load_forget_set
from .entropy import PUBLISHED_THRESHOLD
from .errors import Diverged, UserError
from .methods import METHODS
from .models import MODELS, cache_dir, load_model
from .results import MARKS, SIZES, TAUGHT, put, read_results
from .runs import LAYERS, UnlearnConfig, check_config, check_method, next_round, split_probe, unlearn
from .teaching import LearnConfig, learn
from .training import TrainConfig, train_config

TOFU_GROUPS = ("forget", "retain", "real_authors", "world_facts", "holdout")
OTHER_GROUPS = ("forget", "retain", "general", "holdout")  # without TOFU's real authors and world facts
KNOWN_GROUPS = ("forget", "forget_held_out", "neighbours", "general")  # of what is known from pre-training
USUAL_DTYPES = ("auto", "float32")
WINDOW = 4 * MAX_TOKENS  # characters of a text that make a sample, about
FULL_PASSES = 5  # over a taught set where all of it is measured, as in TOFU: the methods' own steps are for a small one


@dataclass
class GridConfig:
    """What is asked and of which model; SIZES has the usual answers: `cpu` fits two cores, `full` a GPU."""

    forget: str = "tofu-forget01"
    model: str = "smollm2-135m"
    retain_items: int | None = None  # how many of the retain items exist for these models at all
    limit: int | None = None  # measured items a group
    kept: int | None = None  # the same for the groups that are to be kept
    tokens: int = 200  # length of an answer at most
    epochs: int = 12  # of teaching


# what is taken from ALTER, or changed in it, to see what it is good for: UnlearnConfig values
VARIANTS: dict[str, dict] = {
    "as it is": {},
    "no entropy mask": {"entropy_mask": False},
    "no gradient isolation": {"isolation": False},
    "no router": {"router": False},
    "literal gate, entropy alone": {"router_input": "entropy"},
    **{f"q {q:g}": {"q": q, "threshold": "auto"} for q in (0.5, 1.0, 1.5, 2.0)},
    "threshold 1.2": {"threshold": PUBLISHED_THRESHOLD},
    **{f"N {n}": {"n_experts": n} for n in (1, 2, 4, 8)},
    **{f"rank {r}": {"r": r} for r in (2, 4, 16, 32)},
    **{name.replace("_", " ") + " only": {"layers": name} for name in LAYERS if name != "all"},
}


def grid_config(size: str, **values) -> GridConfig:
    if size not in SIZES:
        raise UserError(f"The size is one of {', '.join(SIZES)}, not {size!r}.")
    config = GridConfig(**SIZES[size] | {k: v for k, v in values.items() if v is not None})
    if config.limit is not None and config.limit < 2:
        raise UserError("The limit must leave at least 2 items in each group.")
    return config


def taught(config: GridConfig, made: ForgetSet, device: str, dtype: str, on_step, stage) -> dict[str, Path | None]:
    """Folders of the adapters of the target and the retain-only model; taught now if they are not in the cache.

    What is known from pre-training needs no teaching, and no model is there that knows everything else.
    """
    if not made.learned:
        return {"target": None}
    if config.retain_items is None and config.model and (shipped := adapters(made.name, config.model)):
        return shipped
    # names of folders repeat, and their weights may change
    model = (
        config.model
        if config.model in MODELS
        else f"{Path(config.model).name}-{mark((config.model, stamp(config.model)))}"
    )
    items = mark([(i.question, i.answer) for i in (*made.retain, *made.trained_on)])
    dtypes = [] if dtype in USUAL_DTYPES else [dtype]
    name = "-".join(map(str, (made.name, config.retain_items or "all", model, config.epochs, items, *dtypes)))
    folders = {which: cache_dir() / "taught" / name / which for which in TAUGHT}
    for which, folder in folders.items():
        if not (folder / "adapter_config.json").is_file():
            stage(f"teaching the {which} model", 0.0)
            lm = load_model(config.model, device, dtype)
            learn(lm, made, which, folder, LearnConfig(epochs=config.epochs), on_step)
    return folders


def mark(value) -> str:
    """Six digits that change with the value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:6]


@dataclass
class How:
    """Where results go, what replaces the methods' own settings, and who is told."""

    path: Path
    overrides: dict = field(default_factory=dict)  # TrainConfig and UnlearnConfig values, lists: each is tried
    device: str = "auto"
    dtype: str = "auto"
    on_step: Callable | None = None
    on_stage: Callable[[str, float], None] = lambda what, share: None
    should_stop: Callable[[], bool] = lambda: False
    load_in_4bit: bool = False
    retain_model: str | None = None  # that never saw the forget set, beside a model that has learned it already
    timed: bool = True  # False: other work runs beside, so the seconds say nothing

    @property
    def loaded(self) -> dict:
        """How the models were loaded, where that is not the usual way."""
        found = {"dtype": self.dtype, "load_in_4bit": self.load_in_4bit, "retain_model": self.retain_model}
        return {k: v for k, v in found.items() if v and v not in USUAL_DTYPES}

    @property
    def settings(self) -> list[dict]:
        """One dict for each combination of the values in `overrides`; its runs stand beside the others.

        Raises:
            UserError: `variant` names none of VARIANTS.
        """
        listed = [v if isinstance(v, list) else [v] for v in self.overrides.values()]
        found = [dict(zip(self.overrides, values, strict=True)) for values in itertools.product(*listed)]
        for name in (values["variant"] for values in found if "variant" in values):
            if name not in VARIANTS:
                raise UserError(f"The variants are {', '.join(VARIANTS)}, and {name!r} is none of them.")
        return [values | VARIANTS.get(values.get("variant"), {}) for values in found]


class Bench:
    """A benchmark ready to run: the set, the target and the retain-only model with their logs, the results so far.

    Args:
        groups: what to measure, where that is not the usual.
        untaught: a set that nobody was taught will do.
    Raises:
        UserError: an unknown method, a bad setting, a damaged results file, no data, a set that nobody was taught.
    """

    def __init__(
        self, config: GridConfig, methods: list[str], how: How, groups: tuple[str, ...] | None = None, untaught=False
    ):
        self.config, self.how = config, how
        for method, values in itertools.product(methods, how.settings):
            configs(method, values)  # bad values now, not after an hour
        self.results = read_results(how.path)
        self.made = load_forget_set(config.forget).smaller(config.retain_items)
        for method in methods:
            check_method(method, self.made, how.load_in_4bit)
        if not (self.made.learned or self.made.known or untaught):
            raise UserError(
                f"{config.forget} was not taught to the model: the grid needs TOFU, imaginary-authors or harry-potter."
            )
        self.seen: dict = {}  # what the frozen target said about each sample
        usual = TOFU_GROUPS if "real_authors" in self.made.more else OTHER_GROUPS
        self.groups = groups or (KNOWN_GROUPS if self.made.known else usual)
        # the same name may stand for other weights tomorrow
        found = "" if config.model in MODELS else stamp(config.model)
        self.weights = {"weights": found} if found else {}

    def prepare(self) -> None:
        """Teach and measure the two reference models, or take them from the cache."""
        config, how = self.config, self.how
        if how.retain_model:  # both have learned what they should
            self.folders = dict.fromkeys(TAUGHT)
        else:
            self.folders = taught(config, self.made, how.device, how.dtype, how.on_step, how.on_stage)
        lm = self.reference("target")
        groups = split_probe(adapt(self.made, lm))[1].limited(config.limit, config.kept).evaluation()
        groups = {name: groups[name] for name in self.groups}
        self.hardware = lm.hardware
        self.ignorance = ignorance(self.made, lm, config.tokens) if self.made.known else None
        del lm
        self.logs = {which: self.measured(which, groups) for which in self.folders}

    def reference(self, which: str):
        """The target or the retain-only model, loaded as the options say."""
        how = self.how
        model = how.retain_model if which == "retain" and how.retain_model else self.config.model
        return load_model(model, how.device, how.dtype, self.folders[which], how.load_in_4bit)

    def measured(self, which: str, groups: dict) -> evaluation.Log:
        """Log of the target or the retain-only model on `groups`, kept in the cache."""
        lm, tokens = self.reference(which), self.config.tokens
        items = mark([(group, astuple(i)) for group, own in groups.items() for i in own])
        loaded = own_file(lm).stem  # changes with the weights
        file = cache_dir() / "logs" / f"{self.made.name}-{loaded}-{items}-{tokens}.json"
        if not file.is_file():
            evaluation.write_log(evaluation.evaluate(lm, lm.model, groups, tokens, self.how.on_stage), file)
        return evaluation.read_log(file)

    def figures(self, log: evaluation.Log) -> dict[str, float]:
        """The flat figures of a log, with BLEU and ASG where the set is known from pre-training (ALTER, Table 2)."""
        found = evaluation.summary(log, self.logs.get("retain"))
        if self.made.name.startswith("muse-"):
            found |= knowledge(log)
        if self.ignorance is not None:
            scores = similarity(log["forget"]["generated_text"], log["forget"]["answer"])
            found |= {"forget_BLEU": scores["bleu"], "ASG": metrics.asg(scores, self.ignorance)}
        return found

    def key(self, method: str, seed: int, overrides: dict) -> str:
        """What tells an item from all others: also which weights, and how they were loaded, where that is unusual."""
        loaded = self.how.loaded | self.weights
        return json.dumps([method, seed, asdict(self.config), overrides, *([loaded] if loaded else [])], sort_keys=True)

    def configs(self, method: str, seed: int, values: dict) -> tuple[UnlearnConfig, TrainConfig]:
        """`configs` for this set: FULL_PASSES at least, and as many retain samples, where all of it is measured; as
        many of WMDP's corpora, too. A share of plain texts takes its share of their steps."""
        asking, train = configs(method, values, seed, self.made.of_texts)
        share = values.get("share", 1)
        if self.made.of_texts and "max_steps" not in values:
            train = replace(train, max_steps=math.ceil(share * train.max_steps))
        whole = self.config.limit is None and self.made.learned and "max_steps" not in values
        if whole:
            windows = sum(max(1, math.ceil(len(i.answer) / WINDOW)) for i in self.made.trained_on)
            steps = math.ceil(FULL_PASSES * share * windows / train.batch_size)
            train = replace(train, max_steps=max(train.max_steps, steps))
        if whole or self.made.name.startswith("wmdp-"):
            asking = replace(asking, retain=max(asking.retain, train.max_steps * train.batch_size))
        return asking, train

    def settings(self, method: str, seed: int, overrides: dict) -> dict[str, dict]:
        """What an item runs with beside its size, as a results file holds it; {} for a reference model."""
        if (name := method.split("/")[0]) not in METHODS:
            return {}
        asking, train = self.configs(name, seed, overrides)
        size = ("method", "limit", "kept", "groups", "tokens")
        method = METHODS[name]
        own = {k: v for k, v in asdict(asking).items() if k not in size} | {"alter": method.alter}
        return {"train": asdict(train), "unlearn": own | {"threshold": asking.threshold or method.threshold}}

    def found(self, method: str, seed: int, overrides: dict) -> dict | None:
        """The item of the results file that ran with the settings that the method has today, if there is one."""
        now = self.settings(method, seed, overrides)
        for run in self.results["runs"]:
            stored = [(run["config"].get(part) or {}, own) for part, own in now.items()]
            same = all(own[k] == old[k] for old, own in stored for k in own.keys() & old.keys())
            if run["id"] == self.key(method, seed, overrides) and same:
                return run
        return None

    def done(self, method: str, seed: int, overrides: dict) -> bool:
        return self.found(method, seed, overrides) is not None

    def unlearn(
        self,
        lm,
        made: ForgetSet,
        method: str,
        seed: int,
        values: dict,
        name: str,
        experts=None,
        seen=None,
        evaluate=True,
    ):
        """One run with `values` in place of the method's own, None when stopped by hand: half an item is none."""
        config, how = self.config, self.how
        asking, train = self.configs(method, seed, values)
        asking = replace(asking, limit=config.limit, kept=config.kept, groups=self.groups, tokens=config.tokens)
        run = unlearn(
            lm, made, asking, train, folder=None,
            evaluate=evaluate, before=self.logs["target"], retain_log=self.logs.get("retain"), experts=experts,
            seen=seen, on_step=how.on_step,
            on_stage=lambda what, share: how.on_stage(f"{name}: {what}", share), should_stop=how.should_stop,
        )  # fmt: skip
        return None if run.metrics["stopped"] == "stopped by hand" or not run.metrics["measured"] else run

    def add(self, method: str, seed: int, metrics: dict, overrides: dict, run=None, stale=(), **more) -> None:
        """Put one finished item into the results file, in place of those with one of the ids in `stale`."""
        entry = {"id": self.key(method, seed, overrides), "method": method, "seed": seed}
        entry["metrics"] = {k: round(v, 9) if abs(v) > 1e-6 else v for k, v in metrics.items()}
        entry["config"] = asdict(self.config) | {"overrides": overrides}
        entry["config"] |= self.settings(method, seed, overrides)
        entry["config"] |= ({"loaded": self.how.loaded} if self.how.loaded else {}) | self.weights
        entry |= {"hardware": self.hardware, **more}
        if run is not None:
            m = run.metrics
            entry |= {k: m[k] for k in ("steps", "stopped", "seconds", "date")}
            entry["peak_memory_mb"] = m["training_memory_mb"]  # the frozen pass may have been another item's
            if not self.how.timed:
                del entry["seconds"]
            entry["probe"] = [h["probe"] for h in m["history"] if "probe" in h]
        tried = overrides.keys() - MARKS - VARIANTS.get(overrides.get("variant"), {}).keys()
        if not tried:  # takes the place of one that ran with other settings
            stale = {*stale, entry["id"]}
        self.results = put(self.how.path, entry, stale)


def configs(method: str, values: dict, seed: int = 0, of_texts: bool = False) -> tuple[UnlearnConfig, TrainConfig]:
    """What an item runs with: the method's defaults with `values` of UnlearnConfig and TrainConfig in their place.

    Raises:
        UserError: an unknown method, a value out of its range.
    """
    values = {k: v for k, v in values.items() if k not in MARKS}
    own = {f.name for f in fields(UnlearnConfig)}
    asking = UnlearnConfig(method=method, **{k: v for k, v in values.items() if k in own})
    check_config(asking)
    values = {k: v for k, v in values.items() if k not in own}
    return asking, train_config(method, of_texts, seed=seed, **values)


def grid(config: GridConfig, methods: list[str], seeds: list[int], how: How) -> dict:
    """Run what is missing in `how.path` and return the results. Raises UserError as `Bench` does."""
    bench = Bench(config, methods, how)
    asked = itertools.product(seeds, methods, how.settings)
    missing = [(m, s, values) for s, m, values in asked if not bench.done(m, s, values)]
    bench.prepare()
    for which, log in bench.logs.items():
        if not bench.done(which, 0, {}):
            bench.add(which, 0, bench.figures(log), {})
    for number, (method, seed, values) in enumerate(missing, 1):
        if how.should_stop():
            break
        gc.collect()
        shown = ", ".join([values["variant"]] if "variant" in values else [f"{k} {v}" for k, v in values.items()])
        name = f"{number} of {len(missing)}: {method}, seed {seed}{shown and ', '}{shown}"
        try:
            run = bench.unlearn(bench.reference("target"), bench.made, method, seed, values, name, seen=bench.seen)
            if run is None:
                break
            found = bench.figures(run.logs["after"]) | to_base(run)
        except Diverged:
            bench.add(method, seed, {}, values, stopped="diverged")
            continue
        bench.add(method, seed, found, values, run)
        del run
    return bench.results


def sequential(config: GridConfig, methods: list[str], seeds: list[int], rounds: int, how: How) -> dict:
    """Forget the set in `rounds` parts, each round starting from the last, figures after each (ALTER, Fig. 5).

    A run of the results file is one round; a method and seed that lacks a round is run again from the first, since
    the weights in between are not kept. Each part is a sub-domain with an expert of its own (from the ninth on they
    share). The forget figures are those of the whole set.
    """
    bench = Bench(config, methods, how)
    if len(how.settings) > 1:
        raise UserError("Rounds are run with one value of each setting.")
    made, values = bench.made, how.settings[0]
    if made.known:
        raise UserError(f"{made.name} is forgotten whole: rounds need a set that was taught (imaginary-authors, TOFU).")
    overrides = {"rounds": rounds} | values
    whole = made.trained_on
    if 0 < (values.get("n_experts") or 0) < min(rounds, MAX_EXPERTS):
        raise UserError(f"Each round has an expert of its own: n_experts must be {min(rounds, MAX_EXPERTS)} or more.")
    if not 2 <= rounds <= len(whole):
        raise UserError(f"There can be 2 to {len(whole)} rounds, and {rounds} is not among them.")
    bench.prepare()
    cuts = [round(k * len(whole) / rounds) for k in range(rounds + 1)]
    parts = [
        [replace(i, domain=k % MAX_EXPERTS + 1) for i in whole[a:b]]
        for k, (a, b) in enumerate(itertools.pairwise(cuts))
    ]  # fmt: skip
    for method, seed in ((m, s) for s in seeds for m in methods):
        names = [f"{method}/{k}" for k in range(1, rounds + 1)]
        if how.should_stop() or all(bench.done(name, seed, overrides) for name in names):
            continue
        stale = {bench.key(name, seed, overrides) for name in names}
        lm, experts, so_far = bench.reference("target"), None, []
        for name, part in zip(names, parts, strict=True):
            so_far = so_far + part
            asked = {q for i in part for q in (i.question, i.paraphrased_question)}
            new = [i for i in made.probe or made.forget_held_out if i.question and i.question in asked]
            now = replace(made, training=so_far, probe=new or part)  # the probe looks at what is new
            # only ALTER's frozen model is the same one in each round
            seen = bench.seen if METHODS[method].trains == "alter" else None
            try:
                run = bench.unlearn(lm, now, method, seed, values, f"{name} of {rounds}, seed {seed}", experts, seen)
                found = run and bench.figures(run.logs["after"])
            except Diverged:  # no round comes after it
                for lost in names[names.index(name) :]:
                    bench.add(lost, seed, {}, overrides, stopped="diverged")
                break
            if run is None:
                return bench.results
            bench.add(name, seed, found, overrides, run, stale)
            stale = ()  # all gone with the first round
            lm, experts = next_round(run)
            del run
    return bench.results


def to_base(run) -> dict[str, float]:
    """ROUGE-L of the answers to the target's own, on what was to be kept."""
    groups = run.metrics["after"]
    kept = [g for g in ("retain", "neighbours", "general") if "rouge_l_to_base" in groups.get(g, {})]
    return {f"{g}_ROUGE_to_base": groups[g]["rouge_l_to_base"] for g in kept}


def knowledge(log: evaluation.Log) -> dict[str, float]:
    """MUSE's knowledge memorisation: mean ROUGE-L F1 of the answers, on what was forgotten and on what stays."""
    return {f"{g}_knowmem_ROUGE": float(log[g]["rougeL_f1"].mean()) for g in ("forget", "retain") if g in log}


def similarity(said, right) -> dict[str, float]:
    """BLEU and mean ROUGE-L recall of answers beside the right ones, 0 to 1."""
    said, right = list(said), list(right)
    scores = [metrics.rouge_l(a, b) for a, b in zip(said, right, strict=True)]
    return {"bleu": metrics.bleu(said, right), "rouge_l": sum(scores) / len(scores)}


def ignorance(made: ForgetSet, lm, tokens: int) -> dict[str, float] | None:
    """How like the right ones the model's own answers are where it does not know them. ASG measures the distance to
    it, since there is no model that never read the books; None where the model knows everything that is asked."""
    own = own_answers(lm, [i.question for i in made.forget])
    unknown = [i for i in made.forget if not is_right(own[i.question], i)]
    if not unknown:
        return None
    questions = [i.question for i in unknown]
    said = [own[q] for q in questions] if tokens == OWN_TOKENS else greedy(lm, questions, tokens)  # as long as a run's
    return similarity(said, [i.answer for i in unknown])
