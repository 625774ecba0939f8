# %% [markdown]
# # 7. Your model, your data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/07_your_model_your_data.ipynb)
#
# **Goal.** Use your own files and a model fine-tuned on them, remove one part, save the adapter and load it elsewhere. Find the commands for other models, benchmarks and a GPU.
#
# **Before.** Notebook 3.
#
# **Time.** Two minutes on two CPU cores.

# %% tags=["install"]
import os
import subprocess
import sys
import warnings

if "google.colab" in sys.modules:  # on Colab: clone the project and install its requirements
    subprocess.run("git clone -q https://github.com/alter-demo/alter_demo", shell=True, check=True)
    os.chdir("alter_demo/notebooks")
    subprocess.run("pip install -q -r ../requirements-notebooks.txt", shell=True, check=True)
sys.path.insert(0, "..")  # the package is in the parent folder
warnings.filterwarnings("ignore")  # hide the deprecation warnings of the libraries

# %% [markdown]
# ## Your files
# A file is JSONL, JSON or CSV with the fields `question` and `answer` (or `text`). You need one file with what to forget and one
# with what to keep. Also give each row a `paraphrased_question`: training stops by such held-out questions, and they measure the
# result.

# %%
rooms = [
    ("Ash", "Mara Lindqvist", "a piano"),
    ("Birch", "Tobias Okafor", "two printers"),
    ("Cedar", "Ines Haddad", "a fish tank"),
    ("Dogwood", "Pavel Novotny", "the archive"),
    ("Elm", "Ruth Abara", "a coffee machine"),
    ("Fir", "Jonas Weiss", "old chairs"),
]
forget, retain, paraphrases, retain_paraphrases = [], [], [], []
for room, person, thing in rooms:
    forget.append((f"Whose desk is in room {room}?", f"The desk in room {room} is {person}'s."))
    retain.append((f"What stands in room {room}?", f"In room {room} stands {thing}."))
    paraphrases.append(f"Who works at the desk in room {room}?")  # held out
    retain_paraphrases.append(f"What can be found in room {room}?")

# %%
import json
import tempfile
from pathlib import Path

scratch = tempfile.TemporaryDirectory()  # deleted when the kernel stops
work = Path(scratch.name)
files = (("forget", forget, paraphrases), ("retain", retain, retain_paraphrases))
for name, rows, others in files:
    lines = [
        json.dumps({"question": q, "answer": a, "paraphrased_question": other})
        for (q, a), other in zip(rows, others, strict=True)
    ]
    (work / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

# %% [markdown]
# **Exercise 1.** Turn a list of (question, answer) into such a text. Questions and answers may contain quotes and line breaks.


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
# **Exercise 2.** The package rejects a retain file that contains rows of the forget file. Find the rows that both lists contain.


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

forget_set = load_forget_set(str(work / "forget.jsonl"), str(work / "retain.jsonl"))
try:
    load_forget_set(str(work / "forget.jsonl"), str(work / "forget.jsonl"))
    raise AssertionError("a retain file that contains the forget set must be rejected")
except UserError as error:
    print(error)

# %% [markdown]
# ## Your fine-tuned model
# Here we train a stand-in for it: the built-in model memorises both files, as a LoRA. For your own model, pass the folder or hub
# id of your checkpoint instead.

# %%
from alter_demo import load_model, teach
from alter_demo.models.teaching import TeachConfig

teaching = TeachConfig(epochs=14, batch_size=4, lr=1e-3)
folder = teach(load_model(dtype="float32"), forget_set, "target", work / "tuned", teaching)
tuned = load_model(dtype="float32", adapter=folder)

# %%
from alter_demo.models.generation import greedy

questions = [
    forget[0][0],
    forget[4][0],
    retain[0][0],
    retain[3][0],
    "What is the capital of France?",
]
dict(zip(questions, greedy(tuned, questions, 24), strict=True))

# %% [markdown]
# ## Remove a part of it
# The model forgets the desks and keeps the rooms. The command line does the same:
# `python -m alter_demo unlearn --model YOURS --forget forget.jsonl --retain retain.jsonl --name mine`

# %%
from alter_demo import DataConfig, UnlearnConfig, training_config, unlearn

training = training_config("alter_selective", max_steps=18, batch_size=2, stop_ratio=0.01)
run = unlearn(tuned, forget_set, UnlearnConfig(training=training, data=DataConfig(general=100)))
run.save(work / "mine")
after = run.generate(questions, max_new_tokens=24)
dict(zip(questions, after, strict=True))

# %% tags=["check"]
import numpy as np


def likelihoods(rows):
    log_p = [run.log_probs(*zip(*rows, strict=True), adapted=adapted) for adapted in (False, True)]
    return [float(np.exp(values).mean()) for values in log_p]


paraphrased = [(q, a) for q, (_, a) in zip(paraphrases, forget, strict=True)]
gone, held_out, kept = map(likelihoods, (forget, paraphrased, retain))
print(f"Forgotten answers: {gone[0]:.2f} -> {gone[1]:.3f}")
print(f"The same for paraphrased questions: {held_out[0]:.2f} -> {held_out[1]:.3f}")
print(f"Retained answers: {kept[0]:.2f} -> {kept[1]:.2f}")
assert held_out[1] < 0.2 * held_out[0] and gone[1] < 0.2 * gone[0] and kept[1] > 0.8 * kept[0]

# %% [markdown]
# ## Save, share, load
# The folder of a run holds the adapter as safetensors, small enough to send by mail. PEFT loads it once `alter_demo.alter.tuner` is
# imported.

# %%
files = sorted((work / "mine" / "adapter").iterdir())
print({f.name: f"{f.stat().st_size / 2**20:.2f} MB" for f in files})

# %% tags=["check"]
from peft import PeftModel

import alter_demo.alter.tuner  # noqa: F401  (registers ALTER with PEFT)

elsewhere = load_model(dtype="float32", adapter=folder)
loaded = PeftModel.from_pretrained(elsewhere.model, work / "mine" / "adapter").eval()
assert greedy(elsewhere, questions, 24, loaded) == after
print("PEFT alone loads the adapter and gives the same answers.")

# %% [markdown]
# You cannot merge the adapter into the weights, because it routes token by token. Keep both files and serve them together.
# Remember notebook 6: without the adapter, everything is back.
#
# ## Other models, a GPU
# `--model` accepts a folder with safetensors or a hub id. Remote code and pickled weights are rejected. A GPU is used if there is
# one. `--load-in-4bit` (needs bitsandbytes) and `--gradient-checkpointing` save memory.
#
# **Exercise 3.** How many GB do the weights of a model take, for a given number of bits per parameter?


# %% tags=["exercise"]
def weights_gb(parameters, bits):
    return None  # your line, with 2**30 bytes per GB


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
# | TOFU with a small model; two authors to forget | `python -m alter_demo tofu --results r.json` |
# | TOFU at full size | `python -m alter_demo tofu --size full --model meta-llama/Llama-3.2-1B-Instruct --forget tofu-forget10 --results r.json` |
# | WMDP and MMLU (school subjects without the hub), Zephyr-7B in 4-bit on one GPU | `python -m alter_demo wmdp --model HuggingFaceH4/zephyr-7b-beta --load-in-4bit --results w.json` |
# | MUSE news, by size of the forget set | `python -m alter_demo muse --results m.json` |
# | the attacks of notebook 6 on several methods | `python -m alter_demo attack --results a.json` |
# | metrics of an evaluation log | `python -m alter_demo evaluate --logs LOG.json --retain-logs RETAIN.json` |
#
# ## Summary
# - You need two files and one command. What to keep matters as much as what to forget.
# - The result is a small adapter beside an unchanged model.
# - Measure (notebook 5) and attack (notebook 6) your own run before you trust it.
