"""Multiple choice before and after forgetting, through lm-eval (ALTER, Table 1): WMDP and MMLU from the hub, or, where
the hub can't be reached, ordinary school subjects written for this project, of which astronomy is to be forgotten.
Where Harry Potter is forgotten all subjects are to stay: the utility of Table 2 (there MMLU), beside the ASG.

lm-eval scores the likelihood of each choice. WMDP and MMLU ask for a letter; a small model knows answers rather than
letters, so the school questions score the answer's own words. They do so by the whole likelihood (`acc`): per byte
(`acc_norm`) the choices alone, without the question, give 39 % away (`blind`), and no forgetting gets below that.
"""

from __future__ import annotations

import functools
import logging
import random
from contextlib import contextmanager

from tqdm import tqdm

from .data import read_set
from .errors import Diverged, UserError
from .evaluate import group_figures
from .results import TASKS, tasks_of

BATCH = 16


def school_task(subject: str, blind: bool = False) -> dict:
    """A subject of `sets/school.json` as an lm-eval task; the right choice stands first there and is shuffled here.
    `blind` withholds the question, which tells what the choices alone give away."""
    from datasets import Dataset

    rows = [q for q in read_set("school")["questions"] if q["subject"] == subject]
    rng, docs = random.Random(0), []
    for row in rows:
        choices = rng.sample(row["choices"], len(row["choices"]))
        docs.append({"question": row["question"], "choices": choices, "answer": choices.index(row["choices"][0])})
    return {
        "task": f"school_{subject}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Answer:" if blind else "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@functools.cache
def task_manager(all_tasks: bool):
    """lm-eval's index of tasks, which it reads from a thousand files. Raises UserError where it is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("Multiple choice needs lm-eval: pip install -r requirements-benchmarks.txt") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=all_tasks)


def load_tasks(names: tuple[str, ...], blind: bool = False) -> list:
    """lm-eval's tasks by name, with their questions, or without (`blind`, school subjects only).

    Raises:
        UserError: lm-eval is not installed, knows no such task, or can't fetch its questions.
    """
    manager = task_manager(not set(names) <= set(TASKS["school"]))
    for name in names:
        if name not in TASKS["school"] and name not in manager.all_tasks:
            raise UserError(f"lm-eval knows no task {name!r}: `lm-eval ls tasks` lists those that it knows.")
    found = []
    try:
        for name in names:
            own = name in TASKS["school"]
            loaded = manager.load([school_task(name.removeprefix("school_"), blind) if own else name])
            found.append(loaded["groups"].get(name) or loaded["tasks"][name])
    except Exception as error:  # the hub's client raises a dozen kinds
        raise UserError(
            f"The questions of {', '.join(names)} could not be fetched from the hub ({type(error).__name__}): check "
            "the network, or use the school subjects (--forget school), which need none."
        ) from None
    return found


def accuracy(lm, model, tasks: list, limit: int | None = None) -> dict[str, float]:
    """{task: share answered rightly} by lm-eval; of a group such as MMLU under the group's name."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    ready = task_manager(False).load(tasks)
    with own_progress():
        asked = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=BATCH)
        found = evaluate(asked, ready, limit=limit, bootstrap_iters=0, log_samples=False)["results"]
    rows = {t.task_name if hasattr(t, "task_name") else t.name: None for t in tasks}
    return {name: float(found[name]["acc,none"]) for name in rows}


@contextmanager
def own_progress():
    """lm-eval draws a bar for each task, across those that tell the whole: none in here."""
    shown = tqdm.__init__
    tqdm.__init__ = lambda bar, *args, **options: shown(bar, *args, **options | {"disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = shown


def scores(lm, model, tasks: list, limit: int | None = None, all_stay: bool = False) -> dict[str, float]:
    """What a results file holds: `TASK_acc` for each, `forget_acc` (the first, unless all are to stay) and `kept_acc`
    (mean of the others; of these not WMDP's, which nobody wants to keep, if there is anything else)."""
    found = accuracy(lm, model, tasks, limit)
    kept = list(found)
    forget = {} if all_stay else {"forget_acc": found[kept.pop(0)]}
    kept = [k for k in kept if not k.startswith("wmdp")] or kept
    return {f"{k}_acc": v for k, v in found.items()} | forget | {"kept_acc": sum(found[k] for k in kept) / len(kept)}


def fluency(log, before=None) -> dict[str, float]:
    """Of the answers to everyday questions: repeated 4-grams, and ROUGE-L to what was answered before. The paper asks
    GPT-4o instead."""
    figures = group_figures("general", log["general"], before and before["general"])
    names = {"repetition": "general_repetition", "rouge_l_to_base": "general_ROUGE_to_base"}
    return {name: figures[k] for k, name in names.items() if k in figures}


def answered(bench, log, before=None) -> dict[str, float]:
    """`fluency`, and of what is known from pre-training how far the answers are from not knowing (`metrics.asg`)."""
    figures = bench.figures(log)
    asked = ("forget_Q_A_ROUGE", "forget_BLEU", "ASG") if bench.ignorance else ()
    return {k: figures[k] for k in asked} | fluency(log, before)


def choose(asked: str) -> str:
    """The forget set that `auto` stands for: WMDP where the hub answers, else the school subjects."""
    if asked != "auto":
        return asked
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info("cais/wmdp", timeout=5)
        return "wmdp-cyber"
    except Exception:  # as above
        return "school"


def choice_grid(config, methods: list[str], seeds: list[int], how, names: tuple[str, ...] | None = None) -> dict:
    """Forget with each method and seed and ask the questions of `names` (default: TASKS of the forget set) before and
    after; goes on where it stopped, as `grid.grid`. Of what is known from pre-training its own questions are asked too.

    Raises:
        UserError: as `grid.Bench` and `load_tasks` do; a forget set without tasks; a file with other tasks in it.
    """
    from .grid import Bench

    if config.forget not in TASKS:
        raise UserError(f"Questions exist for {', '.join(TASKS)}, not for {config.forget!r}.")
    bench = Bench(config, methods, how, ("general",), untaught=True)
    names, all_stay = names or TASKS[config.forget], bench.made.known
    if all_stay:
        bench.groups = ("forget", *bench.groups)
    if len(names) < 2 and not all_stay:
        raise UserError("Name two tasks at least: what is forgotten first, then what stays (--tasks).")
    asked = [f"{n}_acc" for n in names]
    stored = [[f"{k}_acc" for k in tasks_of(r)] for r in bench.results["runs"]]
    if any(own and own != asked for own in stored):
        raise UserError(
            f"{how.path} holds answers to other tasks than {', '.join(names)}: one file for each (--results)."
        )
    tasks = load_tasks(names)
    wanted = [(m, s, values) for s in seeds for m in methods for values in how.settings]
    missing = [item for item in wanted if not bench.done(*item)]
    bench.prepare()
    references = {"target": tasks}
    if set(names) <= set(TASKS["school"]):
        references["blind"] = load_tasks(names, blind=True)
    for which in [name for name in references if not bench.done(name, 0, {})]:
        how.on_stage("the untouched model's answers", 0.0)
        lm = bench.reference("target")
        found = answered(bench, bench.logs["target"]) if which == "target" else {}
        bench.add(which, 0, found | scores(lm, lm.model, references[which], config.limit, all_stay), {})
        del lm
    for number, (method, seed, values) in enumerate(missing, 1):
        name = f"{number} of {len(missing)}: {method}, seed {seed}"
        if how.should_stop():
            break
        try:
            run = bench.unlearn(bench.reference("target"), bench.made, method, seed, values, name, seen=bench.seen)
        except Diverged:
            bench.add(method, seed, {}, values, stopped="diverged")
            continue
        if run is None:
            break
        how.on_stage(f"{name}: questions", 0.0)
        found = answered(bench, run.logs["after"], run.logs["before"])
        bench.add(method, seed, found | scores(run.lm, run.model, tasks, config.limit, all_stay), values, run)
        del run
    return bench.results
