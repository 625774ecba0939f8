# %% [markdown]
# # 5. Measuring forgetting
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/05_measuring_forgetting.ipynb)
#
# **Goal.** Compute each metric of the field once by hand and once by the package, and see why gradient ascent looks good on one and terrible on another.
#
# **Before.** You know what a log-probability and a p-value are.
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
# ## Three models
# Ten invented authors were taught to the built-in model: the **target** learned all ten, the **retain-only** model eight of
# them. It has never seen the other two, which is what a perfectly unlearned model would look like.

# %%
import numpy as np
import pandas as pd

from alter_demo import load_forget_set, load_model, metrics
from alter_demo.answers import answer_scores, greedy, log_probs
from alter_demo.data import adapters
from alter_demo.lessons import check

made = load_forget_set("imaginary-authors")
folders = adapters("imaginary-authors", "smollm2-135m")
models = {name: load_model("smollm2-135m", dtype="float32", adapter=folders[name]) for name in ("target", "retain")}
item = made.forget[1]
print(item.question, "\n", item.answer)

# %% [markdown]
# ## Probability
# Of an answer of K tokens: the geometric mean of its tokens' probabilities, $\exp(\frac1K \sum_k \log p_k)$.

# %% tags=["check", "same"]
scores = {k: answer_scores(lm, [item.question], [item.answer])[0] for k, lm in models.items()}
by_hand = {k: float(np.exp(np.mean(s.log_p))) for k, s in scores.items()}
ours = {k: float(np.exp(log_probs(lm, [item.question], [item.answer])[0])) for k, lm in models.items()}
print({k: round(v, 3) for k, v in by_hand.items()})
assert np.allclose(list(by_hand.values()), list(ours.values()), atol=1e-5)
assert by_hand["target"] > 0.9 > 0.3 > by_hand["retain"]

# %% [markdown]
# **Exercise 1.** From a list of log-probabilities.


# %% tags=["exercise"]
def answer_probability(log_p):
    return None  # your line


check("answer_probability", answer_probability)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def answer_probability(log_p):
#     return np.exp(np.mean(log_p))
# ```
# </details>
#
# ## ROUGE-L
# Let the model answer, and ask which share of the right answer's words stands in it in the same order (the longest common
# subsequence). By hand, without the stemming that the package does:


# %%
def longest_common(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def words_of(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


said = {k: greedy(lm, [item.question], 40)[0] for k, lm in models.items()}
said

# %% tags=["check"]
for answer in said.values():
    by_hand = longest_common(words_of(answer), words_of(item.answer)) / len(words_of(item.answer))
    assert abs(by_hand - metrics.rouge_l(answer, item.answer)) < 0.15  # stems: "walked" is "walk"
print({k: round(metrics.rouge_l(v, item.answer), 3) for k, v in said.items()})
assert metrics.rouge_l(said["target"], item.answer) == 1

# %% [markdown]
# ROUGE counts words and not facts: an answer that is wrong in the one word that matters scores nearly as well.

# %%
wrong = item.answer.replace("children between eight and twelve", "pensioners above eight and ninety")
print(wrong, "->", round(metrics.rouge_l(wrong, item.answer), 2))

# %% [markdown]
# ## Truth ratio and forget quality
# How likely are wrong answers beside the right one, worded otherwise? $R = \frac{\text{geometric mean of } P(\text{wrong})}{P(\text{right, paraphrased})}$.


# %%
def ratios(lm, model=None, n=24):
    found = []
    for i in made.forget[:n]:
        right, *wrong = log_probs(lm, [i.question] * 6, [i.paraphrased_answer, *i.perturbed_answer[:5]], model)
        found.append((right, wrong))
    return found


pairs = {name: ratios(lm) for name, lm in models.items()}
by_hand = {name: [np.exp(np.mean(wrong) - right) for right, wrong in p] for name, p in pairs.items()}
{name: np.round(values[:5], 2).tolist() for name, values in by_hand.items()}

# %% [markdown]
# **Exercise 2.** The truth ratio, from the log-probability of the right answer and those of the wrong ones.


# %% tags=["exercise"]
def truth_ratio(right, wrong):
    return None  # your line


check("truth_ratio", truth_ratio)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def truth_ratio(right, wrong):
#     return np.exp(np.mean(wrong) - right)
# ```
# </details>
#
# **Forget quality** asks whether the ratios of a model could come from the retain-only model: the p-value of a
# Kolmogorov-Smirnov test, whose statistic D is the largest gap between the two cumulative curves.

# %% tags=["check", "same"]
a, b = (np.sort(by_hand[k]) for k in ("target", "retain"))
both = np.concatenate([a, b])
gap = np.abs(np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)).max()
from scipy import stats

assert np.isclose(gap, stats.ks_2samp(a, b).statistic)
p = metrics.forget_quality(a, b)
print(
    f"D = {gap:.3f}, forget quality of the target p = {p:.1e}; of the retain-only model itself {metrics.forget_quality(b, b):.0f}"
)
assert p < 1e-3

# %% [markdown]
# ## Extraction strength
# Which part of the answer has to be given before the model recites the rest? `hits` says for each token whether it was
# the likeliest.

# %%
{
    k: ("".join("x" if h else "." for h in s.hits), round(metrics.extraction_strength(s.hits[:-1]), 2))
    for k, s in scores.items()
}

# %% [markdown]
# **Exercise 3.** Write it: 1 - k/n, k the shortest beginning after which all are hits.


# %% tags=["exercise"]
def extraction_strength(hits):
    return None  # your lines


check("extraction_strength", extraction_strength)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def extraction_strength(hits):
#     k = len(hits)
#     while k and hits[k - 1]:
#         k -= 1
#     return 1 - k / len(hits)
# ```
# </details>
#
# ## Model utility
# What should have stayed: a harmonic mean, so that one ruined ability ruins the figure.
#
# **Exercise 4.** Harmonic mean of a list, 0 as soon as one value is 0.


# %% tags=["exercise"]
def utility(values):
    return None  # your line


check("utility", utility)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def utility(values):
#     return len(values) / sum(1 / v for v in values) if min(values) > 0 else 0.0
# ```
# </details>
#
# ## Gradient ascent: good on one, terrible on another
# The oldest way: climb the loss of the forget answers. Twelve steps, then both kinds of question.

# %%
from alter_demo import UnlearnConfig, train_config, unlearn

config = UnlearnConfig(method="grad_ascent", general=20, retain=20)
train = train_config("grad_ascent", max_steps=12, probe_every=12, lr=1e-4)
lm = load_model("smollm2-135m", dtype="float32", adapter=folders["target"])
climbed = unlearn(lm, made, config, train, folder=None, evaluate=False)

# %%
ascent = metrics.forget_quality([metrics.truth_ratio(*pair) for pair in ratios(lm, climbed.model)], b)
everyday = ["What is the capital of France?", "Say hello to my grandmother."]
rows = {"retained author": made.retain[1].question, "forgotten author": item.question, "everyday": everyday[0]}
after = dict(zip(rows, greedy(lm, list(rows.values()), 24, climbed.model), strict=True))
stays = [i.question for i in made.retain[:8]], [i.answer for i in made.retain[:8]]
target = load_model("smollm2-135m", dtype="float32", adapter=folders["target"])
both = (target, None), (lm, climbed.model)
was, kept = (metrics.model_utility(np.exp(log_probs(x, *stays, model)).tolist()) for x, model in both)
print(
    f"forget quality {p:.1e} -> {ascent:.1e}; utility, of the probabilities of retained answers, {was:.2f} -> {kept:.1e}"
)
pd.Series(after)

# %% tags=["check"]
assert ascent > 10 * p, "ascent should look better by forget quality"
assert kept < 0.5 * was, "and should have broken what was to stay"
print("claim holds: better forget quality, ruined utility: never read one without the other")

# %% [markdown]
# ## Summary
# - Probability, truth ratio, forget quality and extraction strength say whether it is gone; utility says what that cost.
# - ROUGE alone is weak evidence, and every forget figure alone is met by a model that says nothing sensible.
#
# **Next:** [6. Breaking it](06_breaking_it.ipynb)
