# %% [markdown]
# # 4. Which tokens route to A or B
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/04_which_tokens_route_to_a_or_b.ipynb)
#
# **Goal.** Take a text apart token by token: which are uncertain and go to A, which are confident and go to an expert; and switch experts off to see what each does.
#
# **Before.** Notebook 3; its run is used if it is there, else made now (three minutes more).
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

# %%
import matplotlib.pyplot as plt
import pandas as pd

from alter_demo import load_forget_set
from alter_demo.answers import adapt
from alter_demo.lessons import check, forgotten, word_frame

run = forgotten()
made = adapt(load_forget_set("harry-potter"), run.lm)
print("threshold of S_q:", round(run.router.config.threshold, 3), " experts:", run.router.config.n_experts)

# %% [markdown]
# ## One answer
# A token record holds what both models thought at a token. `S_q`, route, expert and the likeliest next are of the prediction made
# there, of what follows; `log p` is of the token itself, and so comes from the record before.

# %%
records = run.tokens("Harry Potter goes to school at Hogwarts.", "Where does Harry Potter go to school?")
rows = [
    (r.token, r.entropy, r.route, r.expert, r.log_prob, r.log_prob_after, r.top_after[0][0])
    for r in records
    if not r.special
]
pd.DataFrame(rows, columns=["token", "S_q", "route", "expert", "log p", "after", "likeliest next, after"]).round(2)

# %% [markdown]
# **Exercise 1.** The share of records whose route is A.


# %% tags=["exercise"]
def share_to_a(records):
    return None  # your line


check("share_to_a", share_to_a)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def share_to_a(records):
#     return sum(r.route == "A" for r in records) / len(records)
# ```
# </details>
#
# ## Many answers: by part of speech
# The model's own answers to forget questions and to everyday ones, word by word (of the answers, not of the questions). A
# tagger says what kind of word each is.

# %%
items = {"forget": [i for i in made.training if i.lead][:30], "everyday": made.general[:10]}
texts = {k: [run.tokens((i.lead + i.answer)[:300], i.question) for i in v] for k, v in items.items()}
frame = pd.concat([word_frame(t).assign(set=k) for k, t in texts.items()])
frame.sample(6, random_state=0).round(2)

# %%
by_kind = frame.groupby("kind").agg(
    words=("word", "size"), to_A=("route", lambda r: (r == "A").mean()), S_q=("S_q", "mean")
)
by_kind = by_kind[by_kind.words >= 10].sort_values("to_A")
ax = by_kind.to_A.plot.barh(color="#b8860b", figsize=(7, 3), xlabel="share of words that go to A")
plt.show()
by_kind.round(2)

# %% [markdown]
# `S_q` and route of a word are those of the prediction that it came from: how sure the model was of it. The paper calls
# uncertain tokens structural and confident ones knowledge. Is it so here?

# %% tags=["check", "same"]
name, function, adjective = (by_kind.to_A[k] for k in ("name", "function word", "adjective"))
print(f"to A go {name:.0%} of the names, {function:.0%} of the function words, {adjective:.0%} of the adjectives")
assert max(name, function) < adjective
frame = frame.reset_index(drop=True)
names, goes_on = frame.kind == "name", frame.kind.shift() == "name"
begun, going = ((frame.route[names & on] == "A").mean() for on in (~goes_on, goes_on))
print(f"of names that begin {begun:.0%}, of names after a name {going:.0%}")
assert going < 0.5 * begun

# %% [markdown]
# Not quite. Confident is what has begun: the second part of a name, and most function words. Uncertain is where the model
# could go on in several ways: an adjective, or the first word of a name. So on this model "structural" is not what A gets.
#
# ## By sub-domain, and as clouds

# %% tags=["check"]
acted = frame["expert"].str.startswith("B_f").groupby(frame["set"]).mean()
assert acted["forget"] > 0.6 and acted["everyday"] < 0.05, (
    "experts should act on what is to be forgotten, and there only"
)
pd.crosstab(frame["set"], frame["expert"])

# %%
from alter_demo import charts
from alter_demo.tokens import word_counts

forget = frame.loc[frame["set"] == "forget", ["word", "S_q", "expert"]]
counts = word_counts(forget.itertuples(index=False), run.router.config.threshold)
fig, axes = plt.subplots(1, len(counts), figsize=(4 * len(counts), 2.6))
for ax, (way, own) in zip(axes, counts.items(), strict=True):
    ax.imshow(charts.cloud(own, way))
    ax.set(title=f"{way}: {sum(own.values())} words", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# A cloud shows sizes badly, so count as well.
#
# **Exercise 2.** The words of one route in a frame like the one above, most frequent first, each once.


# %% tags=["exercise"]
def top_words(frame, route):
    return None  # your line: a list


check("top_words", top_words)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def top_words(frame, route):
#     return frame[frame.route == route].word.value_counts().index.tolist()
# ```
# </details>
#
# ## Switch experts off
# The router can be told to send everything one way.

# %%
question = ["What is the name of Harry Potter's school?"]
ways = {"as routed": None, "no expert (the untouched model)": "off", "only B_r": "r"}
ways |= {f"only B_f{d}": d for d in range(1, run.router.config.n_experts + 1)}
said = {}
for label, way in ways.items():
    with run.only(way):
        said[label] = run.answer(question, max_new_tokens=24)[0]
pd.Series(said).to_frame("answer")

# %% tags=["check"]
untouched = run.answer(question, adapted=False, max_new_tokens=24)[0]
assert said["no expert (the untouched model)"] == untouched
assert "Hogwarts" in untouched and "Hogwarts" not in said["as routed"]
france = ["What is the capital of France?"]
assert run.answer(france) == run.answer(france, adapted=False)
print("with the experts off the untouched model answers; elsewhere they are off by themselves")

# %% [markdown]
# So nothing was erased: the knowledge is still in the weights, and the experts keep it from being said.
#
# **Exercise 3.** Which expert acts, given a token's weights (column 0 is `B_r`, which stands beside the others)? 0 for none.


# %% tags=["exercise"]
def acting_expert(weights):
    return None  # your lines


check("acting_expert", acting_expert)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def acting_expert(weights):
#     experts = list(weights[1:])
#     return 1 + experts.index(max(experts)) if any(experts) else 0
# ```
# </details>
#
# ## Summary
# - Every token has one plan for all layers: entropy, route, expert weights.
# - Uncertain is where an answer could go on in several ways, confident what has begun; function words are mostly confident.
# - The experts act only where the gate says that the subject is to be forgotten.
#
# **Next:** [5. Measuring forgetting](05_measuring_forgetting.ipynb)
