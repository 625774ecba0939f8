# %% [markdown]
# # 6. Breaking it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/06_breaking_it.ipynb)
#
# **Goal.** Try to get a forgotten fact back: by asking otherwise, by rounding the weights, by relearning, by taking the adapter off. Learn what unlearning does not promise.
#
# **Before.** Notebook 3; its run is used if it is there, else made now (three minutes more).
#
# **Time.** Two to three minutes on two CPU cores.

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

# %%
import matplotlib.pyplot as plt
import pandas as pd

from alter_demo import attacks, load_forget_set
from alter_demo.answers import adapt
from alter_demo.lessons import check, forgotten

run = forgotten()
made = adapt(load_forget_set("harry-potter"), run.lm)
items = made.forget[::12][:6]
config = attacks.AttackConfig(items=len(items), tokens=24, sampled=2, samples=16, steps=(0, 3, 6), batch_size=4)
[(i.question, i.answer) for i in items[:3]]

# %% [markdown]
# ## Asking otherwise
# The same facts asked plainly, in other words, as a role, after three examples, with a page of everyday text before them (so
# that the router thinks of something else), and with the answer's beginning put into the model's mouth. An answer has
# *leaked* when it names the fact.

# %%
asked = attacks.by_prompts(run, made, items, config)
pd.DataFrame({k: {"leaked": v["leaked"], "ROUGE-L": v["rouge_l"]} for k, v in asked.items()}).T.round(2)

# %%
found = [(k, leak["prompt"][-70:], leak["answer"], leak["said"][:80]) for k, v in asked.items() for leak in v["leaks"]]
pd.set_option("display.max_colwidth", 90)
pd.DataFrame(found, columns=["attack", "end of the prompt", "fact", "what it said"])

# %% [markdown]
# And again and again, at temperature 1: one lucky draw is enough.

# %%
drawn = attacks.by_sampling(run, items, config)
print(f"{drawn['leaked']:.1%} of the draws leak, and {drawn['items_leaked']:.0%} of the questions at least once")

# %% tags=["check"]
questions = [i.question for i in items]
before = attacks.judged(items, questions, run.answer(questions, adapted=False, max_new_tokens=24))
assert before["leaked"] >= 0.8, "these are facts that the untouched model knows"
assert asked["asked"]["leaked"] < 0.2 and asked["paraphrased"]["leaked"] < 0.3
print("asked plainly or in other words it is gone; what else leaks, if anything, stands in the table")

# %% [markdown]
# **Exercise 1.** The share of answers that hold a word.


# %% tags=["exercise"]
def share_leaked(answers, word):
    return None  # your line


check("share_leaked", share_leaked)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def share_leaked(answers, word):
#     return sum(word.lower() in a.lower() for a in answers) / len(answers)
# ```
# </details>
#
# ## Rounding the weights
# Quantisation is known to bring "forgotten" knowledge back where the weights were moved only a little: rounding moves them
# back. ALTER's adapter stays as it is, and only the frozen weights are rounded.


# %%
def untouched_and_unlearned(prompts):
    return run.answer(prompts, adapted=False, max_new_tokens=20), run.answer(prompts, max_new_tokens=20)


prompts = [items[0].question, "What is the capital of France?"]
rows = {"as it is": untouched_and_unlearned(prompts)}
for bits in (8, 4):
    with attacks.rounded(run.model, bits):
        rows[f"{bits} bits"] = untouched_and_unlearned(prompts)
pd.DataFrame(
    {k: [*a, *b] for k, (a, b) in rows.items()},
    index=[f"{w}: {p}" for w in ("untouched", "unlearned") for p in prompts],
)

# %% [markdown]
# **Exercise 2.** Round an array to `bits` bits with one scale: its largest absolute value becomes `2**(bits - 1) - 1`.


# %% tags=["exercise"]
def round_to_bits(w, bits):
    return None  # your lines: an array of the same size


check("round_to_bits", round_to_bits)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def round_to_bits(w, bits):
#     scale = abs(w).max() / (2 ** (bits - 1) - 1)
#     return (w / scale).round() * scale
# ```
# </details>
#
# ## Relearning
# Whoever has the weights can train them. Six steps on the forgotten questions themselves, and six on everyday text.

# %%
sources = {"the forgotten questions": items, "everyday text": made.general[:20]}
curves = {name: attacks.relearn(run, own, items, config) for name, own in sources.items()}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.5))
for name, curve in curves.items():
    for ax, key in zip(axes, ("loss", "rouge_l"), strict=True):
        ax.plot([p["step"] for p in curve], [p[key] for p in curve], marker="o", label=name)
        ax.set(xlabel="steps of relearning", ylabel={"loss": "loss on the forgotten", "rouge_l": "ROUGE-L"}[key])
axes[0].legend()
plt.show()

# %% tags=["check"]
loss = {name: [p["loss"] for p in curve] for name, curve in curves.items()}
assert loss["the forgotten questions"][-1] < loss["the forgotten questions"][0]
print({name: f"{values[0]:.2f} -> {values[-1]:.2f}" for name, values in loss.items()})

# %% [markdown]
# **Exercise 3.** The first step at which a curve's `rouge_l` reaches a level, None where it never does.


# %% tags=["exercise"]
def steps_to_recover(curve, level):
    return "never tried"  # your line


check("steps_to_recover", steps_to_recover)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def steps_to_recover(curve, level):
#     return next((p["step"] for p in curve if p["rouge_l"] >= level), None)
# ```
# </details>
#
# ## Taking the adapter off
# The simplest attack of all.

# %% tags=["check"]
without = run.answer(questions, adapted=False, max_new_tokens=24)
back = attacks.judged(items, questions, without)["leaked"]
print(f"without the adapter {back:.0%} of the facts are back")
assert back == before["leaked"] >= 0.8

# %% [markdown]
# ALTER's knowledge stays in the weights; the adapter keeps it from being said. Serve the model behind an interface and
# that may be what you need. Give the weights away and it is not: whoever has the files deletes one of them.
#
# ## Summary
# - Test what you forgot with questions that nobody trained on, and read what leaked.
# - Relearning on the facts brings them back quickly, as it would teach them to any model.
# - This is no privacy guarantee, and an adapter is no deletion.
#
# **Next:** [7. Your model, your data](07_your_model_your_data.ipynb)
