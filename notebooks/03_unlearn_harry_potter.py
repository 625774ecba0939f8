# %% [markdown]
# # 3. Unlearn Harry Potter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/03_unlearn_harry_potter.ipynb)
#
# **Goal.** Run both phases of ALTER on a real model, watch the loss part by part, and see what is gone and what broke nearby.
#
# **Before.** Notebooks 1 and 2.
#
# **Time.** Three minutes on two CPU cores.

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
# ## What is to be forgotten
# 199 questions about Harry Potter. The model is small and knows only some of the answers; only those can be forgotten.
# Neighbours (other fantasy, owls, trains, ...) and everyday prompts are to stay.

# %%
import numpy as np
import pandas as pd

from alter_demo import load_forget_set, load_model
from alter_demo.answers import adapt
from alter_demo.runs import split_probe

lm = load_model("smollm2-135m", dtype="float32")
_, made = split_probe(adapt(load_forget_set("harry-potter"), lm))  # without the questions that training looks at
print(
    f"known and to be forgotten: {len(made.forget)}; near it, to be kept: {len(made.retain)}; everyday: {len(made.general)}"
)
pd.DataFrame([(i.topic, i.question, i.answer) for i in made.forget[::12]], columns=["topic", "question", "answer"])

# %% [markdown]
# ## Both phases
# **Phase I** looks at every sample once through the frozen model: entropies, sub-domains, the router. **Phase II** trains A
# and the B's until a probe of questions (none of those that we report) has fallen far enough, or 15 steps are done.

# %%
from alter_demo.lessons import forgotten

run = forgotten(train=True)
print(
    f"{run.metrics['steps']} steps, {run.metrics['stopped']}; {run.metrics['seconds']['unlearn']:.0f} s on this machine"
)

# %%
phase = run.metrics["phase_one"]
print("threshold of S_q:", round(phase["threshold"], 3), " uncertain tokens:", f"{phase['uncertain_share']:.0%}")
print("forgetting experts:", phase["n_experts"], " samples of each sub-domain:", phase["sub_domains"])
print("held-out forget samples that open the gate:", f"{phase['router']['forget_open_at_answer']:.0%}")
print(
    "others that open it anywhere (its threshold is set so that few do):",
    f"{phase['router']['retain_open_anywhere']:.0%}",
)

# %% [markdown]
# ## The loss, part by part
# `forget` is the inverted hinge loss on confident forget tokens, summed over the sub-domains; `refusal` what the model
# learns to say instead (its weight grows as the answer goes); `retain` the distance to the frozen model where experts act on
# text to be kept; `structure` the change of entropy of uncertain tokens.

# %%
import matplotlib.pyplot as plt

history = pd.DataFrame(run.metrics["history"]).set_index("step")
fig, axes = plt.subplots(1, 2, figsize=(10, 3.5))
history[["forget", "refusal", "retain", "structure"]].plot(ax=axes[0], marker=".", ylabel="loss by part")
history["probe"].dropna().plot(
    ax=axes[1], marker="o", logy=True, color="#0b5fa5", ylabel="probe: probability of the answer"
)
plt.show()

# %% tags=["check"]
assert history["forget"].iloc[-1] < history["forget"].iloc[1]
assert history["probe"].dropna().iloc[-1] < 0.05 * history["probe"].iloc[0]
print(f"the probe fell to {history['probe'].dropna().iloc[-1] / history['probe'].iloc[0]:.2%} of where it began")

# %% [markdown]
# **Exercise 1.** The inverted hinge loss of one token: `p` is the distribution, `right` the index of the right token.

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
# **Exercise 2.** Its slope on the right token's logit. What does it become where `p_true` is near 1, on a memorised token?


# %% tags=["exercise"]
def hinge_slope(p_true, p_rival):
    return None  # your line


check("hinge_slope", hinge_slope)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def hinge_slope(p_true, p_rival):
#     return p_true * (1 - p_true + p_rival)  # 0 at p_true = 1: the first steps on a memorised answer are slow
# ```
# </details>
#
# ## Before and after

# %%
asked = [i.question for i in made.forget_held_out[:4]] + [i.question for i in made.neighbours[:3]] + [
    "What is the capital of France?", "Write one sentence about a cat.", "Who wrote The Hobbit?"
]  # fmt: skip
before, after = (run.answer(asked, adapted, 32) for adapted in (False, True))
pd.set_option("display.max_colwidth", 120)
pd.DataFrame({"question": asked, "before": before, "after": after})

# %% [markdown]
# In numbers, on questions that were not trained on:


# %%
def likelihoods(items, n=24):
    items = items[:n]
    pair = [i.question for i in items], [i.answer for i in items]
    return [float(np.exp(run.log_probs(*pair, adapted=side)).mean()) for side in (False, True)]


groups = {
    "forget, asked differently": made.forget_held_out,
    "neighbours": made.neighbours,
    "everyday": made.general_held_out,
}
table = pd.DataFrame({k: likelihoods(v) for k, v in groups.items()}, index=["before", "after"]).T
table.assign(kept=table.after / table.before).round(4)

# %% tags=["check"]
kept = table.after / table.before
assert kept["forget, asked differently"] < 0.05, "it was not forgotten"
assert kept["everyday"] > 0.97 and kept["neighbours"] > 0.9, "it forgot too much"
print("claims hold: gone, and nearly only that")

# %% [markdown]
# ## What broke nearby
# The gate decides by subject. Where it opens on a neighbour, that neighbour is bent. Which of the neighbours answer otherwise now?

# %%
questions = [i.question for i in made.neighbours[:24]]
before, after = (run.answer(questions, adapted, 16) for adapted in (False, True))
changed = [row for row in zip(questions, before, after, strict=True) if row[1] != row[2]]
print(f"{len(changed)} of {len(questions)} neighbours answer otherwise")
pd.DataFrame(changed, columns=["question", "before", "after"])

# %% tags=["check"]
everyday = [i.question for i in made.general_held_out[:12]]
same = [a == b for a, b in zip(*(run.answer(everyday, side, 16) for side in (False, True)), strict=True)]
print(f"{sum(same)} of {len(same)} everyday prompts are answered word for word as before")
assert len(changed) < len(questions) / 3 and sum(same) >= 10

# %% [markdown]
# **Exercise 3.** What is kept is measured as a distance between distributions. Write KL(p || q) for two arrays.


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
# - Phase I only looks; phase II trains an adapter beside the frozen weights, a matter of a few minutes here.
# - The right answers lose nearly all their probability, in other words too; everyday answers stay word for word.
# - What breaks is near: it is where the gate opens by mistake.
#
# **Next:** [4. Which tokens route to A or B](04_which_tokens_route_to_a_or_b.ipynb)
