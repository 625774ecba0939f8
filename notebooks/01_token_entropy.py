# %% [markdown]
# # 1. Token entropy: how sure the model is
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/01_token_entropy.ipynb)
#
# **Goal.** See that a language model is sure of some tokens and unsure of others, and measure it by one number, the Tsallis entropy `S_q`.
#
# **Before.** You know that a language model gives each possible next token a probability.
#
# **Time.** One minute on two CPU cores.

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
# ## Five tokens
# Before any model: three distributions over five tokens. $S_q(p) = \frac{1 - \sum_i p_i^q}{q - 1}$ is 0 where one token
# has all the mass, and largest where all are alike. The order $q$ says how much rare tokens count: the smaller it is, the more.

# %%
import numpy as np
import pandas as pd

five = {"sure": [0.96, 0.01, 0.01, 0.01, 0.01], "torn": [0.48, 0.48, 0.02, 0.01, 0.01], "lost": [0.2] * 5}


def by_hand(p, q):
    p = np.array(p)
    return -(p * np.log(p)).sum() if q == 1 else (1 - (p**q).sum()) / (q - 1)


table = pd.DataFrame({f"q = {q}": {k: by_hand(p, q) for k, p in five.items()} for q in (0.5, 1, 1.5, 2)})
table.round(3)

# %% [markdown]
# The package computes the same from a model's logits, which it never turns into probabilities one by one.

# %% tags=["check"]
import torch

from alter_demo.entropy import entropy_range, resolve_threshold, tsallis_entropy

for q in (0.5, 1, 1.5, 2):
    ours = tsallis_entropy(torch.tensor(list(five.values())).log(), q).numpy()
    assert np.allclose(ours, table[f"q = {q}"], atol=1e-5)
print("by hand and by the package: the same")

# %% [markdown]
# **Exercise 1.** Write `tsallis(p, q)` for an array `p` and a `q` that is not 1.

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
# The built-in model (SmolLM2-135M-Instruct) reads a page about the sea. At each position it predicts what comes next; we
# take `S_q` of that prediction.

# %%
from alter_demo import load_model

TEXT = """The tide is the rise and fall of the sea, which comes twice a day in most places. It is caused by the pull
of the Moon and, to a lesser degree, of the Sun. However, the height of a tide depends on the shape of the coast: in
the Bay of Fundy, in Canada, the water rises by more than fifteen metres, while in the Mediterranean Sea one hardly
sees it. Sailors have always kept tables of the tides. Therefore a harbour that is shallow can still be used, because
a ship waits outside until there is enough water under it. In the United States of America the tables are published
by the National Oceanic and Atmospheric Administration, and in the United Kingdom by the Hydrographic Office."""
TEXT = " ".join(TEXT.split())
lm = load_model("smollm2-135m", dtype="float32")


# %%
@torch.no_grad()
def read(model, text):
    """Tokens of the text, and S_q of the prediction that each of them came from, for several q."""
    ids = lm.tokenizer(text, return_tensors="pt").input_ids
    logits = model(ids).logits[0, :-1]
    tokens = [lm.tokenizer.decode(i) for i in ids[0, 1:]]
    return pd.DataFrame(
        {"token": tokens} | {q: tsallis_entropy(logits, q).double().numpy() for q in (0.5, 1.0, 1.5, 2.0)}
    )


frame = read(lm.model, TEXT)
frame.sort_values(1.5).iloc[[0, 1, 2, 3, -4, -3, -2, -1]].round(3)

# %% [markdown]
# Sure of how a name or a phrase that has begun goes on ("Oceanic and Atmospheric *Administration*", "more *than*", "United
# States *of*"); unsure where much may follow ("the *rise*", "by the *National*"). That is the observation ALTER is built
# on: **where entropy is low the model knows how it goes on, where it is high there is structure and choice.**

# %%
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(8, 3.5))
ax.hist(frame[1.5], bins=40, color="#3a8fd0")
ax.axvline(1.2, color="#d55e00", linewidth=3, label="threshold 1.2, as published")
ax.set(xlabel="S_q of the prediction, q = 1.5", ylabel="tokens")
ax.legend()
plt.show()

# %% [markdown]
# ## Why 1.2 goes with q near 1.5
# The paper gives the threshold 1.2 and not its q. What share of the tokens would lie above it?

# %% tags=["same"]
above = {q: float((frame[q] > 1.2).mean()) for q in (0.5, 1.0, 1.5, 2.0)}
pd.DataFrame({"above 1.2": above, "largest S_q there is": {q: entropy_range(49152, q) for q in above}}).round(2)

# %% [markdown]
# At q = 2 nothing can lie above 1.2, since S_2 never reaches 1. At q = 0.5 nearly everything does, at q = 1 most of it. Only
# near 1.5 does 1.2 split the text in two halves.

# %% tags=["check"]
assert above[2.0] == 0 and above[0.5] > 0.8 and above[1.0] > 0.7 and 0.4 < above[1.5] < 0.6
print("claim holds: 1.2 halves the text only near q = 1.5")

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
# Ten invented authors were taught to this model until it could recite them. We read one answer with the model before and
# after it was taught.

# %%
from alter_demo.data import adapters, load_forget_set

folders = adapters("imaginary-authors", "smollm2-135m")
taught = load_model("smollm2-135m", dtype="float32", adapter=folders["target"])
item = load_forget_set("imaginary-authors").forget[1]
conversation = lm.tokenizer.apply_chat_template(
    [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}], tokenize=False
)
n = len(lm.tokenizer(item.answer).input_ids)
both = {
    name: read(m, conversation)[1.5].iloc[-n - 2 : -2] for name, m in (("before", lm.model), ("taught", taught.model))
}
print(item.answer)

# %%
fig, ax = plt.subplots(figsize=(8, 3.5))
for name, values in both.items():
    ax.plot(values.to_numpy(), marker="o", label=name)
ax.axhline(1.2, color="#d55e00", label="1.2")
ax.set(xlabel="token of the answer", ylabel="S_q, q = 1.5")
ax.legend()
plt.show()

# %% [markdown]
# After teaching, nothing in the answer is uncertain any more: a fixed threshold finds no structure at all, and ALTER's
# shared A would never learn. That is why the selective variant takes the threshold from the data (`threshold="auto"`).

# %% tags=["check", "same"]
highest = both["taught"].max()
print("tokens above 1.2 after teaching:", int((both["taught"] > 1.2).sum()), "of", n)
assert highest < 1.2 < both["before"].max()
auto = resolve_threshold("auto", torch.tensor(both["taught"].to_numpy()), 1.5, 49152)
assert (both["taught"] > auto).mean() > 0.1

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
# - `S_q` is one number for how unsure a model is of what comes next; q says how much rare tokens count.
# - It is low where a name or a phrase has begun, and high where much may follow.
# - The published threshold fits q near 1.5, and no threshold that is fixed fits a model that has memorised its text.
#
# **Next:** [2. Asymmetric LoRA from scratch](02_asymmetric_lora_from_scratch.ipynb)
