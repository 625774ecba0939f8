# %% [markdown]
# # 5. Measuring forgetting
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/05_measuring_forgetting.ipynb)
#
# **Goal.** Compute each metric of the field once by hand and once with the package, and see why gradient ascent looks good on one metric and terrible on another.
#
# **Before.** You know what a log-probability and a p-value are.
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
# ## The target and the retain-only model
# We taught the built-in model facts about ten invented authors. The **target model** learned all ten. The **retain-only model**
# learned eight of them and never saw the other two, so it shows what a perfectly unlearned model looks like.

# %%
import numpy as np
import pandas as pd

from alter_demo import load_forget_set, load_model
from alter_demo.data.built_in import shipped_adapters
from alter_demo.evaluation import metrics
from alter_demo.lessons import check
from alter_demo.models.generation import greedy
from alter_demo.models.scoring import answer_scores, log_probs

NAME, forget_set = "smollm2-135m", load_forget_set("imaginary-authors")
folders = shipped_adapters("imaginary-authors", NAME)
models = {k: load_model(NAME, dtype="float32", adapter=folders[k]) for k in ("target", "retain")}
example = forget_set.forget[1]
print(example.question, "\n", example.answer)

# %% [markdown]
# ## Probability
# The probability of an answer of K tokens is the geometric mean of the probabilities of its tokens,
# $\exp(\frac1K \sum_k \log p_k)$.

# %% tags=["check", "same"]
pair = [example.question], [example.answer]
scores = {name: answer_scores(lm, *pair)[0] for name, lm in models.items()}
by_hand = {name: float(np.exp(np.mean(s.log_p))) for name, s in scores.items()}
package = {name: float(np.exp(log_probs(lm, *pair)[0])) for name, lm in models.items()}
print({name: round(p, 3) for name, p in by_hand.items()})
assert np.allclose(list(by_hand.values()), list(package.values()), atol=1e-5)
assert by_hand["target"] > 0.9 > 0.3 > by_hand["retain"]

# %% [markdown]
# **Exercise 1.** Compute the probability of an answer from a list of log-probabilities.


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
# The model answers, and we compute the share of the words of the right answer that occur in its answer in the same order (the
# longest common subsequence). By hand, we leave out the stemming that the package does:


# %%
def longest_common(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            skip = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else skip
    return table[-1, -1]


def words_of(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


answers = {name: greedy(lm, [example.question], 40)[0] for name, lm in models.items()}
answers

# %% tags=["check"]
reference = words_of(example.answer)
for answer in answers.values():
    by_hand = longest_common(words_of(answer), reference) / len(reference)
    assert (
        abs(by_hand - metrics.rouge_l(answer, example.answer)) < 0.15
    )  # stems: "walked" is "walk"
print({name: round(metrics.rouge_l(a, example.answer), 3) for name, a in answers.items()})
assert metrics.rouge_l(answers["target"], example.answer) == 1

# %% [markdown]
# ROUGE counts words, not facts. An answer that is wrong only in the words that matter scores nearly as well.

# %%
fact, error = "children between eight and twelve", "pensioners above eight and ninety"
wrong = example.answer.replace(fact, error)
print(wrong, "->", round(metrics.rouge_l(wrong, example.answer), 2))

# %% [markdown]
# ## Truth ratio and forget quality
# How likely are wrong answers compared with a paraphrase of the right one?
# $R = \frac{\text{geometric mean of } P(\text{wrong})}{P(\text{right, paraphrased})}$.


# %%
def answer_log_probs(lm, model=None, n=24):
    pairs = []
    for e in forget_set.forget[:n]:
        answers = [e.paraphrased_answer, *e.perturbed_answer[:5]]
        right, *wrong = log_probs(lm, [e.question] * 6, answers, model)
        pairs.append((right, wrong))
    return pairs


pairs = {name: answer_log_probs(lm) for name, lm in models.items()}
ratios = {name: [np.exp(np.mean(wrong) - right) for right, wrong in p] for name, p in pairs.items()}
{name: np.round(values[:5], 2).tolist() for name, values in ratios.items()}

# %% [markdown]
# **Exercise 2.** Compute the truth ratio from the log-probability of the right answer and those of the wrong answers.


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
# **Forget quality** tests whether the truth ratios of a model could come from the retain-only model. It is the p-value of a
# Kolmogorov-Smirnov test. The statistic D of the test is the largest gap between the two cumulative curves.

# %% tags=["check", "same"]
from scipy import stats

a, b = (np.sort(ratios[name]) for name in ("target", "retain"))
points = np.concatenate([a, b])
curve_a, curve_b = (np.searchsorted(x, points, "right") / len(x) for x in (a, b))
gap = np.abs(curve_a - curve_b).max()
assert np.isclose(gap, stats.ks_2samp(a, b).statistic)
p, p_retain = metrics.forget_quality(a, b), metrics.forget_quality(b, b)
print(f"D = {gap:.3f}. Forget quality: {p:.1e} (target), {p_retain:.0f} (retain-only model itself)")
assert p < 1e-3

# %% [markdown]
# ## Extraction strength
# How much of the answer does the model need before it recites the rest? For each token, `hits` shows whether it was the most
# likely one.

# %%
{
    name: (
        "".join("x" if hit else "." for hit in s.hits),
        round(metrics.extraction_strength(s.hits[:-1]), 2),
    )
    for name, s in scores.items()
}

# %% [markdown]
# **Exercise 3.** Write it: 1 - k/n, where k is the length of the shortest prefix after which all tokens are hits.


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
# Utility measures what should stay. It is a harmonic mean, so one ruined ability ruins the whole figure.
#
# **Exercise 4.** Compute the harmonic mean of a list. It is 0 if any value is 0.


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
# ## Gradient ascent: good on one metric, terrible on another
# Gradient ascent is the oldest method: it increases the loss of the forget answers. We take twelve steps, then look at both
# kinds of questions.

# %%
from alter_demo import DataConfig, UnlearnConfig, training_config, unlearn

training = training_config("grad_ascent", max_steps=12, probe_every=12, lr=1e-4)
config = UnlearnConfig("grad_ascent", training=training, data=DataConfig(general=20, retain=20))
lm = load_model(NAME, dtype="float32", adapter=folders["target"])
run = unlearn(lm, forget_set, config)

# %%
ratios_after = [metrics.truth_ratio(*pair) for pair in answer_log_probs(lm, run.model)]
p_after = metrics.forget_quality(ratios_after, b)
retain = forget_set.retain[:8]
retain_pair = [e.question for e in retain], [e.answer for e in retain]
target = load_model(NAME, dtype="float32", adapter=folders["target"])
before, after = (
    metrics.model_utility(np.exp(log_probs(x, *retain_pair, model)).tolist())
    for x, model in ((target, None), (lm, run.model))
)
print(f"forget quality {p:.1e} -> {p_after:.1e}")
print(f"utility, from the probabilities of retained answers, {before:.2f} -> {after:.1e}")

# %%
rows = {
    "retained author": forget_set.retain[1].question,
    "forgotten author": example.question,
    "everyday": "What is the capital of France?",
}
pd.Series(dict(zip(rows, greedy(lm, list(rows.values()), 24, run.model), strict=True)))

# %% tags=["check"]
assert p_after > 10 * p, "gradient ascent should improve the forget quality"
assert after < 0.5 * before, "gradient ascent should break what must stay"
print("The claim holds: better forget quality, ruined utility. Never read one without the other.")

# %% [markdown]
# ## Summary
# - Probability, truth ratio, forget quality and extraction strength show whether the knowledge is gone. Utility shows what that cost.
# - ROUGE alone is weak evidence. And a model that produces only nonsense does well on every forget metric.
#
# **Next:** [6. Breaking it](06_breaking_it.ipynb)
