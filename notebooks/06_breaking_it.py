# %% [markdown]
# # 6. Breaking it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/06_breaking_it.ipynb)
#
# **Goal.** Try to get a forgotten fact back: rephrase the question, round the weights, relearn, remove the adapter. Learn what unlearning does not promise.
#
# **Before.** Notebook 3. This notebook loads its run, or trains it first if it does not exist (three more minutes).
#
# **Time.** Two to three minutes on two CPU cores.

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

# %%
import matplotlib.pyplot as plt
import pandas as pd

from alter_demo import load_forget_set
from alter_demo.experiments import attacks
from alter_demo.lessons import check, load_lesson_run
from alter_demo.models.knowledge import fit_to_model

run = load_lesson_run()
forget_set = fit_to_model(load_forget_set("harry-potter"), run.lm)
examples = forget_set.forget[::12][:6]
config = attacks.AttackConfig(
    items=len(examples), tokens=24, sampled=2, samples=16, steps=(0, 3, 6), batch_size=4
)
[(e.question, e.answer) for e in examples[:3]]

# %% [markdown]
# ## Rephrasing the question
# We ask for the same facts in six ways: plainly, paraphrased, in a role play, after three examples, after a page of everyday text
# (which misleads the router), and with the beginning of the answer already given. An answer *leaks* when it states the fact.

# %%
results = attacks.attack_by_prompts(run, forget_set, examples, config)
rows = {name: {"leaked": r["leaked"], "ROUGE-L": r["rouge_l"]} for name, r in results.items()}
pd.DataFrame(rows).T.round(2)

# %%
leaks = [
    (name, leak["prompt"][-70:], leak["answer"], leak["said"][:80])
    for name, result in results.items()
    for leak in result["leaks"]
]
pd.set_option("display.max_colwidth", 90)
pd.DataFrame(leaks, columns=["attack", "end of the prompt", "fact", "answer of the model"])

# %% [markdown]
# Next, we ask repeatedly at temperature 1. One lucky draw is enough.

# %%
drawn = attacks.attack_by_sampling(run, examples, config)
print(f"{drawn['leaked']:.1%} of the draws leak")
print(f"{drawn['items_leaked']:.0%} of the questions leak at least once")

# %% tags=["check"]
questions = [e.question for e in examples]
answers = run.generate(questions, adapted=False, max_new_tokens=24)
before = attacks.score_answers(examples, questions, answers)
assert before["leaked"] >= 0.8, "the base model should know these facts"
assert results["asked"]["leaked"] < 0.2 and results["paraphrased"]["leaked"] < 0.3
print("Asked plainly or paraphrased, the facts are gone. The table lists any other leak.")

# %% [markdown]
# **Exercise 1.** Compute the share of answers that contain a word.


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
# Quantisation is known to bring "forgotten" knowledge back when unlearning moves the weights only a little: rounding moves them
# back. ALTER's adapter keeps its precision; we round only the frozen weights.


# %%
def generate_both(prompts):
    """Answers of the base model, then of the unlearned model."""
    return [
        *run.generate(prompts, adapted=False, max_new_tokens=20),
        *run.generate(prompts, max_new_tokens=20),
    ]


prompts = [examples[0].question, "What is the capital of France?"]
columns = {"not rounded": generate_both(prompts)}
for bits in (8, 4):
    with attacks.rounded_weights(run.model, bits):
        columns[f"{bits} bits"] = generate_both(prompts)
pd.DataFrame(columns, index=[f"{model}: {p}" for model in ("base", "unlearned") for p in prompts])

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
# Anyone who has the weights can train them. We take six steps on the forgotten questions themselves, and six on everyday text.

# %%
sources = {"the forgotten questions": examples, "everyday text": forget_set.general[:20]}
curves = {name: attacks.relearn(run, own, examples, config) for name, own in sources.items()}
fig, axes = plt.subplots(1, 2, figsize=(10, 3.5))
labels = {"loss": "loss on the forgotten questions", "rouge_l": "ROUGE-L"}
for name, curve in curves.items():
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        ax.plot([p["step"] for p in curve], [p[key] for p in curve], marker="o", label=name)
        ax.set(xlabel="steps of relearning", ylabel=label)
axes[0].legend()
plt.show()

# %% tags=["check"]
loss = {name: [p["loss"] for p in curve] for name, curve in curves.items()}
assert loss["the forgotten questions"][-1] < loss["the forgotten questions"][0]
print({name: f"{values[0]:.2f} -> {values[-1]:.2f}" for name, values in loss.items()})

# %% [markdown]
# **Exercise 3.** Find the first step at which the `rouge_l` of a curve reaches a level. Return None if it never does.


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
# ## Removing the adapter
# This is the simplest attack of all.

# %% tags=["check"]
without = run.generate(questions, adapted=False, max_new_tokens=24)
recovered = attacks.score_answers(examples, questions, without)["leaked"]
print(f"Without the adapter, {recovered:.0%} of the facts are back.")
assert recovered == before["leaked"] >= 0.8

# %% [markdown]
# With ALTER, the knowledge stays in the weights, and the adapter keeps the model from saying it. If you serve the model behind
# an interface, this may be enough. If you give the weights away, it is not: anyone who has the files can delete the adapter.
#
# ## Summary
# - Test what the model forgot with questions that training did not use, and read what leaked.
# - Relearning on the facts brings them back quickly, just as it would teach them to any model.
# - This is no privacy guarantee, and an adapter is no deletion.
#
# **Next:** [7. Your model, your data](07_your_model_your_data.ipynb)
