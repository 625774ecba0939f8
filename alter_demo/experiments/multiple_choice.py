"""Multiple choice before and after unlearning, through lm-eval (ALTER, Tables 1 and 2).

The questions are WMDP and MMLU from the Hub, or school subjects written for this project, of which
astronomy is to be forgotten. With harry-potter all subjects must stay.

WMDP and MMLU ask for a letter; a small model knows answers rather than letters, so the school
questions score the words of each choice, by their whole likelihood (`acc`). Per byte (`acc_norm`)
the choices alone, without the question (`blind`), give 39 % away.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Sequence
from unittest.mock import patch

from tqdm import tqdm

from ..data.built_in import read_set
from ..errors import UserError
from ..evaluation.summary import group_figures
from .cells import Grid, GridConfig, GridOptions
from .results import TASKS, tasks_of

BATCH_SIZE = 16
KNOWN_FIGURES = ("forget_Q_A_ROUGE", "forget_BLEU", "ASG")  # of a set known from pre-training
# figure of the everyday answers -> its name in the results; the paper asks GPT-4o instead
FLUENCY = {"repetition": "general_repetition", "rouge_l_to_base": "general_ROUGE_to_base"}


def choose_forget_set(name: str) -> str:
    """The forget set for `name`: "auto" is WMDP if the Hub answers, else the school subjects."""
    if name != "auto":
        return name
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info("cais/wmdp", timeout=5)
        return "wmdp-cyber"
    except Exception:  # the Hub's client raises a dozen kinds
        return "school"


def run_multiple_choice(
    config: GridConfig, options: GridOptions, names: Sequence[str] = ()
) -> dict:
    """Ask the questions of lm-eval's tasks before and after unlearning.

    Args:
        names: the tasks, what is forgotten first; by default those of the forget set in `TASKS`.
    Raises:
        UserError: as `Grid` and `load_tasks`; tasks that do not fit the set or the results file.
    """
    if config.forget not in TASKS:
        raise UserError(f"`forget` must be one of {', '.join(TASKS)}, got {config.forget!r}.")
    grid = Grid(config, options, "choice", ("general",), untaught=True)
    names, all_stay = list(names or TASKS[config.forget]), grid.forget_set.from_pretraining
    if all_stay:
        grid.references.groups = ("forget", "general")
    elif len(names) < 2:
        raise UserError("`tasks` needs two names: what is forgotten first, then what stays.")
    if any(tasks_of(run) not in ([], names) for run in grid.results["runs"]):
        raise UserError(f"{options.path} holds answers to other tasks. Choose another (--results).")
    tasks = load_tasks(names)

    def measure_accuracy(lm, model, tasks) -> dict[str, float]:
        return summarize_accuracy(accuracy(lm, model, tasks, config.limit), all_stay)

    def measure_reference(which: str) -> dict:
        lm, log = grid.references.load("target"), grid.references.logs["target"]
        if which == "blind":
            return {"metrics": measure_accuracy(lm, lm.model, load_tasks(names, blind=True))}
        flat = answer_figures(grid.references.summarize(log), log)
        return {"metrics": flat | measure_accuracy(lm, lm.model, tasks)}

    def measure(run) -> dict:
        before, flat = run.logs["before"]["general"], grid.references.summarize_run(run)
        flat = answer_figures(flat, run.logs["after"], before)
        grid.callback.on_stage("multiple choice", 0.0)
        return {"metrics": flat | measure_accuracy(run.lm, run.model, tasks)}

    grid.add_reference("target", measure_reference)
    if set(names) <= set(TASKS["school"]):
        grid.add_reference("blind", measure_reference)
    return grid.run([[cell] for cell in grid.cells()], measure)


def answer_figures(flat: dict, log, before=None) -> dict[str, float]:
    """`KNOWN_FIGURES` of a log, and the fluency of its everyday answers, beside those `before`."""
    known = {k: flat[k] for k in KNOWN_FIGURES} if "ASG" in flat else {}
    general = group_figures("general", log["general"], before)
    return known | {name: general[k] for k, name in FLUENCY.items() if k in general}


def summarize_accuracy(shares: dict[str, float], all_stay: bool) -> dict[str, float]:
    """`TASK_acc` for each task, `forget_acc` of the first unless all stay, `kept_acc` of the rest.

    Nobody wants to keep WMDP's tasks, so they count among the rest only if there are no others.
    """
    names = list(shares) if all_stay else list(shares)[1:]
    kept = [name for name in names if not name.startswith("wmdp")] or names
    flat = {f"{name}_acc": share for name, share in shares.items()}
    flat |= {} if all_stay else {"forget_acc": next(iter(shares.values()))}
    return flat | {"kept_acc": sum(shares[name] for name in kept) / len(kept)}


def accuracy(lm, model, tasks: list, limit: int | None = None) -> dict[str, float]:
    """{task: share of correct answers to `limit` questions}; a group such as MMLU is one task."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    init, loaded = tqdm.__init__, task_manager(False).load(tasks)

    def no_bar(bar, *args, **options):  # lm-eval draws one per task, across our own
        init(bar, *args, **options | {"disable": True})

    with patch.object(tqdm, "__init__", no_bar):
        wrapped = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=BATCH_SIZE)
        found = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    names = [t.task_name if hasattr(t, "task_name") else t.name for t in tasks]
    return {name: float(found["results"][name]["acc,none"]) for name in names}


def load_tasks(names: Sequence[str], blind: bool = False) -> list:
    """lm-eval's tasks by name; `blind` ones have no question (school subjects only).

    Raises:
        UserError: lm-eval is not installed, has no such task, or cannot download its questions.
    """
    school, tasks = set(TASKS["school"]), []
    manager = task_manager(not set(names) <= school)
    for name in names:
        if name not in school and name not in manager.all_tasks:
            raise UserError(f"lm-eval has no task {name!r}. `lm-eval ls tasks` lists its tasks.")
    try:
        for name in names:
            own = school_task(name.removeprefix("school_"), blind) if name in school else name
            loaded = manager.load([own])
            tasks.append(loaded["groups"].get(name) or loaded["tasks"][name])
    except Exception as error:  # the Hub's client raises a dozen kinds
        raise UserError(
            f"Cannot download the questions of {', '.join(names)} from the Hugging Face Hub "
            f"({type(error).__name__}). Check the network, or use --forget school."
        ) from None
    return tasks


@functools.cache
def task_manager(all_tasks: bool):
    """lm-eval's index of tasks, read from a thousand files. Raises UserError without lm-eval."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        install = "pip install -r requirements-benchmarks.txt"
        raise UserError(f"Multiple choice needs lm-eval: {install}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=all_tasks)


def school_task(subject: str, blind: bool = False) -> dict:
    """A subject of `sets/school.json` as an lm-eval task, without the questions if `blind`.

    The correct choice is the first one in the file, and they are shuffled here.
    """
    from datasets import Dataset

    rng, rows = random.Random(0), []
    for question in read_set("school")["questions"]:
        if question["subject"] == subject:
            choices = rng.sample(question["choices"], len(question["choices"]))
            answer = choices.index(question["choices"][0])
            rows.append(question | {"choices": choices, "answer": answer})
    return {
        "task": f"school_{subject}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Answer:" if blind else "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
