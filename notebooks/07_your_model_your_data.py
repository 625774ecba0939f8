# %% [markdown]
# # 7. Your model, your data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/07_your_model_your_data.ipynb)
#
# **Goal.** Take your own file and a model that was fine-tuned on it, remove a part, save the adapter, load it elsewhere; and find the commands for other models, benchmarks and a GPU.
#
# **Before.** Notebook 3.
#
# **Time.** Two minutes on two CPU cores.

# %% tags=["install"]
import os
import subprocess
import sys
import warnings

if "google.colab" in sys.modules:  # only there: fetch the project and what it needs
    fetch = "git clone -q https://github.com/alter-demo/alter_demo"
    subprocess.run(f"{fetch} && pip install -q -r alter_demo/requirements-notebooks.txt", shell=True, check=True)
    os.chdir("alter_demo/notebooks")
sys.path.insert(0, "..")  # the package lies beside this folder
warnings.filterwarnings("ignore")  # libraries about their own future

# %% [markdown]
# ## Your file
# JSONL, JSON or CSV with `question` and `answer` (or `text`). One file of what must go, one of what must stay. Give each row a
# `paraphrased_question` too: forgetting stops by, and is measured on, questions that were not trained on.

# %%
import json
import tempfile
from pathlib import Path

rooms = ["Ash", "Birch", "Cedar", "Dogwood", "Elm", "Fir"]
people = ["Mara Lindqvist", "Tobias Okafor", "Ines Haddad", "Pavel Novotny", "Ruth Abara", "Jonas Weiss"]
forget = [
    (f"Whose desk is in room {r}?", f"The desk in room {r} is {p}'s.") for r, p in zip(rooms, people, strict=True)
]
stays = ["a piano", "two printers", "a fish tank", "the archive", "a coffee machine", "old chairs"]
retain = [(f"What stands in room {r}?", f"In room {r} stands {s}.") for r, s in zip(rooms, stays, strict=True)]

# %%
scratch = tempfile.TemporaryDirectory()  # goes with the kernel
work = Path(scratch.name)
again = {q: f"Who works at the desk in room {r}?" for (q, _), r in zip(forget, rooms, strict=True)}  # to measure with
for name, rows in (("forget", forget), ("retain", retain)):
    more = again if name == "forget" else {}
    lines = [json.dumps({"question": q, "answer": a, "paraphrased_question": more.get(q, "")}) for q, a in rows]
    (work / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

# %% [markdown]
# **Exercise 1.** Turn a list of (question, answer) into such a text, whatever quotes and line ends are in them.


# %% tags=["exercise"]
from alter_demo.lessons import check


def to_jsonl(rows):
    return ""  # your line


check("to_jsonl", to_jsonl)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def to_jsonl(rows):
#     return "\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows)
# ```
# </details>
#
# **Exercise 2.** A retain file that holds what is to be forgotten is refused. Find the rows that stand in both.


# %% tags=["exercise"]
def in_both(forget, retain):
    return None  # your line


check("in_both", in_both)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def in_both(forget, retain):
#     return [row for row in forget if row in retain]
# ```
# </details>

# %% tags=["check"]
from alter_demo import UserError, load_forget_set

made = load_forget_set(str(work / "forget.jsonl"), str(work / "retain.jsonl"))
try:
    load_forget_set(str(work / "forget.jsonl"), str(work / "forget.jsonl"))
    raise AssertionError("a retain set with the forget set in it must be refused")
except UserError as error:
    print(error)

# %% [markdown]
# ## Your fine-tuned model
# Here a stand-in for it: the built-in model learns both files by heart, as a LoRA. In earnest you would name the folder or
# hub id of your own checkpoint instead.

# %%
from dataclasses import replace

from alter_demo import learn, load_model
from alter_demo.teaching import LearnConfig

everything = replace(made, retain=[*made.retain, *made.neighbours])
folder = learn(
    load_model(dtype="float32"), everything, "target", work / "tuned", LearnConfig(epochs=14, batch_size=4, lr=1e-3)
)
tuned = load_model(dtype="float32", adapter=folder)

# %%
from alter_demo.answers import greedy

asked = [forget[0][0], forget[4][0], retain[0][0], retain[3][0], "What is the capital of France?"]
dict(zip(asked, greedy(tuned, asked, 24), strict=True))

# %% [markdown]
# ## Remove a part of it
# The desks go, the rooms stay. On the command line:
# `python -m alter_demo unlearn --model YOURS --forget forget.jsonl --retain retain.jsonl --name mine`

# %%
from alter_demo import UnlearnConfig, train_config, unlearn

config = UnlearnConfig(general=24)
train = train_config("alter_selective", max_steps=18, batch_size=2, stop_ratio=0.01)
run = unlearn(tuned, made, config, train, name="mine", folder=work, evaluate=False)
after = run.answer(asked, max_new_tokens=24)
dict(zip(asked, after, strict=True))

# %% tags=["check"]
import numpy as np

reworded = [(again[q], a) for q, a in forget]
gone, other, kept = ([float(np.exp(run.log_probs(*zip(*rows, strict=True), adapted=side)).mean()) for side in (False, True)]
                     for rows in (forget, reworded, retain))  # fmt: skip
print(
    f"probability of what was to go {gone[0]:.2f} -> {gone[1]:.3f}, asked in other words {other[0]:.2f} -> {other[1]:.3f}, "
    f"of what was to stay {kept[0]:.2f} -> {kept[1]:.2f}"
)
assert other[1] < 0.2 * other[0]
assert gone[1] < 0.2 * gone[0] and kept[1] > 0.8 * kept[0]

# %% [markdown]
# ## Save, share, load
# A run's folder holds the adapter as safetensors: small enough for a mail, and any PEFT loads it once `alter_demo.adapter` is imported.

# %%
files = sorted((work / "mine" / "adapter").iterdir())
print({f.name: f"{f.stat().st_size / 2**20:.2f} MB" for f in files})

# %% tags=["check"]
from peft import PeftModel

import alter_demo.adapter  # noqa: F401  (tells PEFT what an ALTER adapter is)

elsewhere = load_model(dtype="float32", adapter=folder)
loaded = PeftModel.from_pretrained(elsewhere.model, work / "mine" / "adapter").eval()
assert greedy(elsewhere, asked, 24, loaded) == after
print("loaded by PEFT alone: the same answers")

# %% [markdown]
# It cannot be merged into the weights, since the route is decided token by token: keep both files, and serve them together.
# And remember notebook 6: without the adapter everything is back.
#
# ## Other models, a GPU
# `--model` takes a folder with safetensors or a hub id; remote code and pickled weights are refused. A GPU is used if
# there is one; `--load-in-4bit` (package bitsandbytes) and `--gradient-checkpointing` save memory.
#
# **Exercise 3.** How many GB do a model's weights take at so many bits each?


# %% tags=["exercise"]
def weights_gb(parameters, bits):
    return None  # your line, with 2**30 bytes a GB


check("weights_gb", weights_gb)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def weights_gb(parameters, bits):
#     return parameters * bits / 8 / 2**30
# ```
# </details>
#
# ## Benchmarks
# | what | command |
# |---|---|
# | TOFU, a small model, two authors forgotten | `python -m alter_demo tofu --results r.json` |
# | TOFU, full size | `python -m alter_demo tofu --size full --model meta-llama/Llama-3.2-1B-Instruct --forget tofu-forget10 --results r.json` |
# | WMDP and MMLU (without the hub: school subjects), Zephyr-7B in 4-bit on one GPU | `python -m alter_demo wmdp --model HuggingFaceH4/zephyr-7b-beta --load-in-4bit --results w.json` |
# | MUSE news, by the size of the forget set | `python -m alter_demo muse --results m.json` |
# | the attacks of notebook 6, several methods | `python -m alter_demo attack --results a.json` |
# | figures of an evaluation log | `python -m alter_demo evaluate --logs LOG.json --retain-logs RETAIN.json` |
#
# ## Summary
# - Two files, one command; what must stay is as important as what must go.
# - The result is a small adapter beside an untouched model.
# - Measure (notebook 5) and attack (notebook 6) your own run before you trust it.
