# %% [markdown]
# # 3. Unlearn Harry Potter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/03_unlearn_harry_potter.ipynb)
#
# **Goal.** Run both phases of ALTER on a real model, watch each part of the loss, and see what the model forgets and what breaks nearby.
#
# **Before.** Notebooks 1 and 2.
#
# **Time.** Three minutes on two CPU cores.

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
# ## What to forget
# The forget set has 199 questions about Harry Potter. The model is small and knows only some of the answers, and it can forget
# only those. It must keep the retain examples (other fantasy, owls, trains, ...), their held-out neighbours and everyday prompts.

# %%
import numpy as np
import pandas as pd

from alter_demo import load_forget_set, load_model
from alter_demo.data.probe import split_probe
from alter_demo.models.knowledge import fit_to_model

lm = load_model("smollm2-135m", dtype="float32")
forget_set, _ = split_probe(fit_to_model(load_forget_set("harry-potter"), lm))  # without the probe
print(f"Known questions to forget: {len(forget_set.forget)}")
print(f"Retain examples: {len(forget_set.retain)}; everyday prompts: {len(forget_set.general)}")
rows = [(e.topic, e.question, e.answer) for e in forget_set.forget[::12]]
pd.DataFrame(rows, columns=["topic", "question", "answer"])

# %% [markdown]
# ## Both phases
# **Phase I** runs every sample once through the frozen model. It computes the entropies, the sub-domains and the router.
# **Phase II** trains A and the B's until a probe has fallen far enough, for at most 15 steps. The probe is a set of questions
# that no figure below uses.

# %%
from alter_demo.lessons import load_lesson_run

run = load_lesson_run(train=True)
metrics = run.metrics
seconds = metrics["seconds"]["unlearn"]
print(f"{metrics['steps']} steps, {metrics['stopped']}; {seconds:.0f} s on this machine")

# %%
phase_one = metrics["phase_one"]
router = phase_one["router"]
print("Threshold of S_q:", round(phase_one["threshold"], 3))
print(f"Uncertain tokens: {phase_one['uncertain_share']:.0%}")
print("Forgetting experts:", phase_one["n_experts"])
print("Samples in each sub-domain:", phase_one["sub_domains"])
print(f"Forget samples that open the gate: {router['forget_open_at_answer']:.0%}")
print(f"Retain samples that open it anywhere: {router['retain_open_anywhere']:.0%}")
print("(The threshold of the gate is chosen so that only a few do.)")

# %% [markdown]
# ## The parts of the loss
# - `forget`: the inverted hinge loss on confident forget tokens, summed over the sub-domains.
# - `refusal`: the loss of the refusal that the model learns. Its weight grows as the answer disappears.
# - `retain`: the distance to the frozen model where experts act on text to keep.
# - `structure`: the change of entropy at uncertain tokens.

# %%
import matplotlib.pyplot as plt

history = pd.DataFrame(metrics["history"]).set_index("step")
probe = history["probe"].dropna()
fig, axes = plt.subplots(1, 2, figsize=(10, 3.5))
losses = history[["forget", "refusal", "retain", "structure"]]
losses.plot(ax=axes[0], marker=".", ylabel="parts of the loss")
label = "probe: probability of the answer"
probe.plot(ax=axes[1], marker="o", logy=True, color="#0b5fa5", ylabel=label)
plt.show()

# %% tags=["check"]
assert history["forget"].iloc[-1] < history["forget"].iloc[1]
assert probe.iloc[-1] < 0.05 * probe.iloc[0]
print(f"The probe falls to {probe.iloc[-1] / probe.iloc[0]:.2%} of its initial value.")

# %% [markdown]
# **Exercise 1.** Write the inverted hinge loss of one token. `p` is the distribution, `right` is the index of the right token.

# %% tags=["exercise"]
from alter_demo.lessons import check


def inverted_hinge(p, right):
    return None  # your lines


check("inverted_hinge", inverted_hinge)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def inverted_hinge(p, right):
#     others = [x for i, x in enumerate(p) if i != right]
#     return 1 + p[right] - max(others)
# ```
# </details>
#
# **Exercise 2.** Write the slope of this loss with respect to the logit of the right token. `p_other` is the largest probability
# among the other tokens. What is the slope when `p_true` is near 1, that is, on a memorised token?


# %% tags=["exercise"]
def hinge_slope(p_true, p_other):
    return None  # your line


check("hinge_slope", hinge_slope)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def hinge_slope(p_true, p_other):
#     return p_true * (1 - p_true + p_other)  # 0 at p_true = 1: memorised answers move slowly at first
# ```
# </details>
#
# ## Before and after

# %%
questions = [e.question for e in forget_set.forget_held_out[:4] + forget_set.neighbours[:3]]
questions += [
    "What is the capital of France?",
    "Write one sentence about a cat.",
    "Who wrote The Hobbit?",
]
before, after = (run.generate(questions, adapted, 32) for adapted in (False, True))
pd.set_option("display.max_colwidth", 120)
pd.DataFrame({"question": questions, "before": before, "after": after})

# %% [markdown]
# The same in numbers, on held-out questions:


# %%
def likelihoods(examples, n=24):
    questions, answers = zip(*((e.question, e.answer) for e in examples[:n]), strict=True)
    log_p = [run.log_probs(questions, answers, adapted=adapted) for adapted in (False, True)]
    return [float(np.exp(values).mean()) for values in log_p]


groups = {
    "forget, paraphrased": forget_set.forget_held_out,
    "neighbours": forget_set.neighbours,
    "everyday": forget_set.general_held_out,
}
table = pd.DataFrame({k: likelihoods(v) for k, v in groups.items()}, index=["before", "after"]).T
table.assign(kept=table.after / table.before).round(4)

# %% tags=["check"]
kept = table.after / table.before
assert kept["forget, paraphrased"] < 0.05, "the model did not forget"
assert kept["everyday"] > 0.97 and kept["neighbours"] > 0.9, "the model forgot too much"
print("The claims hold: the forget set is gone, and almost nothing else.")

# %% [markdown]
# ## What breaks nearby
# The gate decides by subject. Where it opens on a neighbour, the answer to this neighbour changes. Which neighbours have a
# different answer now?

# %%
questions = [e.question for e in forget_set.neighbours[:24]]
before, after = (run.generate(questions, adapted, 16) for adapted in (False, True))
changed = [row for row in zip(questions, before, after, strict=True) if row[1] != row[2]]
print(f"{len(changed)} of {len(questions)} neighbours have a different answer")
pd.DataFrame(changed, columns=["question", "before", "after"])

# %% tags=["check"]
everyday = [e.question for e in forget_set.general_held_out[:12]]
before, after = (run.generate(everyday, adapted, 16) for adapted in (False, True))
same = [a == b for a, b in zip(before, after, strict=True)]
print(f"{sum(same)} of {len(same)} everyday prompts have exactly the same answer as before")
assert len(changed) < len(questions) / 3 and sum(same) >= 10

# %% [markdown]
# **Exercise 3.** We measure what the model keeps as a distance between distributions. Write KL(p || q) for two arrays.


# %% tags=["exercise"]
def divergence(p, q):
    return None  # your line


check("divergence", divergence)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def divergence(p, q):
#     return (p * np.log(p / q)).sum()
# ```
# </details>
#
# ## Summary
# - Phase I trains nothing. Phase II trains an adapter beside the frozen weights, which takes a few minutes here.
# - The right answers lose nearly all their probability, also when the question is paraphrased. Everyday answers stay the same word for word.
# - The damage is nearby: it appears where the gate opens by mistake.
#
# **Next:** [4. Which tokens route to A or B](04_which_tokens_route_to_a_or_b.ipynb)
