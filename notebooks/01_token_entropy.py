# %% [markdown]
# # 1. Token entropy: how certain the model is
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/01_token_entropy.ipynb)
#
# **Goal.** See that a language model is certain about some tokens and uncertain about others, and measure this with one number, the Tsallis entropy `S_q`.
#
# **Before.** You know that a language model assigns a probability to every possible next token.
#
# **Time.** One minute on two CPU cores.

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
# ## Five tokens
# We start without a model: three distributions over five tokens. The Tsallis entropy
# $S_q(p) = \frac{1 - \sum_i p_i^q}{q - 1}$ is 0 when one token has all the probability, and largest when all tokens are
# equally likely. The order $q$ controls how much rare tokens count: the smaller $q$ is, the more they count.

# %%
import numpy as np
import pandas as pd

distributions = {
    "certain": [0.96, 0.01, 0.01, 0.01, 0.01],
    "two options": [0.48, 0.48, 0.02, 0.01, 0.01],
    "uniform": [0.2] * 5,
}


def entropy_by_hand(p, q):
    p = np.array(p)
    return -(p * np.log(p)).sum() if q == 1 else (1 - (p**q).sum()) / (q - 1)


# %%
table = pd.DataFrame(
    {
        f"q = {q}": {name: entropy_by_hand(p, q) for name, p in distributions.items()}
        for q in (0.5, 1, 1.5, 2)
    }
)
table.round(3)

# %% [markdown]
# The package computes the same values directly from the logits of a model.

# %% tags=["check"]
import torch

from alter_demo.alter.entropy import entropy_range, resolve_threshold, tsallis_entropy

log_p = torch.tensor(list(distributions.values())).log()
for q in (0.5, 1, 1.5, 2):
    assert np.allclose(tsallis_entropy(log_p, q).numpy(), table[f"q = {q}"], atol=1e-5)
print("The package gives the same values as the formula.")

# %% [markdown]
# **Exercise 1.** Write `tsallis(p, q)` for an array `p` and an order `q` other than 1.

# %% tags=["exercise"]
from alter_demo.lessons import check


def tsallis(p, q):
    return None  # your line


check("tsallis", tsallis)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def tsallis(p, q):
#     return (1 - (p**q).sum()) / (q - 1)
# ```
# </details>

# %% [markdown]
# ## A real text
# The built-in model (SmolLM2-135M-Instruct) reads a short text about the sea. At each position it predicts the next token,
# and we compute `S_q` of this prediction.

# %%
from alter_demo import load_model

TEXT = """The tide is the rise and fall of the sea, which comes twice a day in most places. It is
caused by the pull of the Moon and, to a lesser degree, of the Sun. However, the height of a tide
depends on the shape of the coast: in the Bay of Fundy, in Canada, the water rises by more than
fifteen metres, while in the Mediterranean Sea one hardly sees it. Sailors have always kept tables
of the tides. Therefore a harbour that is shallow can still be used, because a ship waits outside
until there is enough water under it. In the United States of America the tables are published by
the National Oceanic and Atmospheric Administration, and in the United Kingdom by the Hydrographic
Office."""
TEXT = " ".join(TEXT.split())
lm = load_model("smollm2-135m", dtype="float32")


# %%
@torch.no_grad()
def token_entropies(model, text):
    """Return each token with `S_q` of the prediction it came from, one column for each q."""
    ids = lm.tokenizer(text, return_tensors="pt").input_ids
    logits = model(ids).logits[0, :-1]
    columns = {"token": [lm.tokenizer.decode(i) for i in ids[0, 1:]]}
    for q in (0.5, 1.0, 1.5, 2.0):
        columns[q] = tsallis_entropy(logits, q).double().numpy()
    return pd.DataFrame(columns)


frame = token_entropies(lm.model, TEXT)
frame.sort_values(1.5).iloc[[0, 1, 2, 3, -4, -3, -2, -1]].round(3)

# %% [markdown]
# The model is certain how a name or a phrase continues once it has begun ("Oceanic and Atmospheric *Administration*",
# "more *than*", "United States *of*"). It is uncertain where many words can follow ("the *rise*", "by the *National*").
# ALTER is based on this observation: **where entropy is low, the model knows what comes next; where it is high, there is
# structure and choice.**

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(8, 3.5))
ax.hist(frame[1.5], bins=40, color="#3a8fd0")
ax.axvline(1.2, color="#d55e00", linewidth=3, label="published threshold, 1.2")
ax.set(xlabel="S_q of the prediction, q = 1.5", ylabel="tokens")
ax.legend()
plt.show()

# %% [markdown]
# ## Why the threshold 1.2 needs q near 1.5
# The paper states the threshold 1.2, but not its q. For each q, what share of the tokens lies above 1.2?

# %% tags=["same"]
above = {q: float((frame[q] > 1.2).mean()) for q in (0.5, 1.0, 1.5, 2.0)}
largest = {q: entropy_range(49152, q) for q in above}
pd.DataFrame({"above 1.2": above, "largest possible S_q": largest}).round(2)

# %% [markdown]
# At q = 2 no token can lie above 1.2, because S_2 is always below 1. At q = 0.5 nearly all tokens do, and at q = 1 most do.
# Only near q = 1.5 does 1.2 split the text in half.

# %% tags=["check"]
assert above[2.0] == 0 and above[0.5] > 0.8 and above[1.0] > 0.7 and 0.4 < above[1.5] < 0.6
print("The claim holds: 1.2 splits the text in half only near q = 1.5.")

# %% [markdown]
# **Exercise 2.** What is the largest `S_q` over `n` outcomes?


# %% tags=["exercise"]
def largest_entropy(n, q):
    return None  # your line


check("largest_entropy", largest_entropy)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def largest_entropy(n, q):
#     return (1 - n * (1 / n) ** q) / (q - 1)
# ```
# </details>

# %% [markdown]
# ## A model that knows the text by heart
# We taught the model facts about ten invented authors until it could recite them. Here it reads one answer before and
# after the teaching.

# %%
from alter_demo.data.built_in import shipped_adapters
from alter_demo.data.forget_sets import load_forget_set

folders = shipped_adapters("imaginary-authors", "smollm2-135m")
taught = load_model("smollm2-135m", dtype="float32", adapter=folders["target"])
example = load_forget_set("imaginary-authors").forget[1]
messages = [
    {"role": "user", "content": example.question},
    {"role": "assistant", "content": example.answer},
]
conversation = lm.tokenizer.apply_chat_template(messages, tokenize=False)
print(example.answer)

# %%
n = len(lm.tokenizer(example.answer).input_ids)
entropies = {
    name: token_entropies(model, conversation)[1.5].iloc[-n - 2 : -2]
    for name, model in (("before", lm.model), ("taught", taught.model))
}
fig, ax = plt.subplots(figsize=(8, 3.5))
for name, values in entropies.items():
    ax.plot(values.to_numpy(), marker="o", label=name)
ax.axhline(1.2, color="#d55e00", label="1.2")
ax.set(xlabel="token of the answer", ylabel="S_q, q = 1.5")
ax.legend()
plt.show()

# %% [markdown]
# After the teaching, no token of the answer is uncertain any more. A fixed threshold finds no structure at all, and ALTER's
# shared A never learns. This is why the selective variant takes the threshold from the data (`threshold="auto"`).

# %% tags=["check", "same"]
highest = entropies["taught"].max()
uncertain = int((entropies["taught"] > 1.2).sum())
print("Tokens above 1.2 after the teaching:", uncertain, "of", n)
assert highest < 1.2 < entropies["before"].max()
auto = resolve_threshold("auto", torch.tensor(entropies["taught"].to_numpy()), 1.5, 49152)
assert (entropies["taught"] > auto).mean() > 0.1

# %% [markdown]
# **Exercise 3.** Find the threshold that a given share of the values exceeds.


# %% tags=["exercise"]
def threshold_for_share(values, share):
    return None  # your line


check("threshold_for_share", threshold_for_share)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def threshold_for_share(values, share):
#     return np.quantile(values, 1 - share)
# ```
# </details>

# %% [markdown]
# ## Summary
# - `S_q` measures with one number how uncertain the model is about the next token. The order q controls how much rare tokens count.
# - `S_q` is low once a name or a phrase has begun, and high where many words can follow.
# - The published threshold fits q near 1.5. No fixed threshold fits a model that has memorised its text.
#
# **Next:** [2. Asymmetric LoRA from scratch](02_asymmetric_lora_from_scratch.ipynb)
