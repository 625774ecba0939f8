# %% [markdown]
# # 4. Which tokens route to A or B
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/04_which_tokens_route_to_a_or_b.ipynb)
#
# **Goal.** Analyse a text token by token: which tokens are uncertain and go to A, and which are confident and go to an expert? Then switch experts off to see what each one does.
#
# **Before.** Notebook 3. This notebook loads its run, or trains it first if it does not exist (three more minutes).
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

# %%
import matplotlib.pyplot as plt
import pandas as pd

from alter_demo import load_forget_set
from alter_demo.lessons import check, load_lesson_run, word_frame
from alter_demo.models.knowledge import fit_to_model

run = load_lesson_run()
forget_set = fit_to_model(load_forget_set("harry-potter"), run.lm)
config = run.router.config
print("threshold of S_q:", round(config.threshold, 3), " experts:", config.n_experts)

# %% [markdown]
# ## One answer
# A token trace holds what both models predict at one token. `S_q`, route, expert and the most likely next token belong to the
# prediction made there, of the token that follows. `log p` belongs to the token itself, so it comes from the trace before.

# %%
question = "Where does Harry Potter go to school?"
traces = run.trace_tokens("Harry Potter goes to school at Hogwarts.", question)
rows = [
    (t.token, t.entropy, t.route, t.expert, t.log_prob, t.log_prob_after, t.top_after[0][0])
    for t in traces
    if not t.special
]
columns = ["token", "S_q", "route", "expert", "log p", "log p after", "most likely next, after"]
pd.DataFrame(rows, columns=columns).round(2)

# %% [markdown]
# **Exercise 1.** Compute the share of traces whose route is A.


# %% tags=["exercise"]
def share_to_a(traces):
    return None  # your line


check("share_to_a", share_to_a)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def share_to_a(traces):
#     return sum(t.route == "A" for t in traces) / len(traces)
# ```
# </details>
#
# ## Many answers, by part of speech
# We take the model's own answers to forget questions and to everyday prompts, and look at each word of the answers. A tagger
# determines the part of speech.

# %%
examples = {
    "forget": [e for e in forget_set.training if e.answer_prefix][:30],
    "everyday": forget_set.general[:10],
}
texts = {
    name: [run.trace_tokens((e.answer_prefix + e.answer)[:300], e.question) for e in group]
    for name, group in examples.items()
}
frame = pd.concat([word_frame(traces).assign(set=name) for name, traces in texts.items()])
frame.sample(6, random_state=0).round(2)

# %%
by_kind = frame.groupby("kind").agg(
    words=("word", "size"), to_A=("route", lambda r: (r == "A").mean()), S_q=("S_q", "mean")
)
by_kind = by_kind[by_kind.words >= 10].sort_values("to_A")
by_kind.to_A.plot.barh(color="#b8860b", figsize=(7, 3), xlabel="share of words that go to A")
plt.show()
by_kind.round(2)

# %% [markdown]
# `S_q` and the route of a word belong to the prediction that the word came from. They show how certain the model was of the
# word. The paper calls uncertain tokens structural and confident tokens knowledge. Is this true here?

# %% tags=["check", "same"]
name, function, adjective = (by_kind.to_A[k] for k in ("name", "function word", "adjective"))
print(
    f"To A go {name:.0%} of names, {function:.0%} of function words, {adjective:.0%} of adjectives"
)
assert max(name, function) < adjective
frame = frame.reset_index(drop=True)
is_name, after_name = frame.kind == "name", frame.kind.shift() == "name"
first, later = ((frame.route[is_name & place] == "A").mean() for place in (~after_name, after_name))
print(f"First words of a name: {first:.0%}; later words of a name: {later:.0%}")
assert later < 0.5 * first

# %% [markdown]
# Not quite. The model is confident once something has begun: the second word of a name, and most function words. It is
# uncertain where it can continue in several ways: an adjective, or the first word of a name. So on this model, A does not get
# what the paper calls "structural".
#
# ## By sub-domain, and as word clouds

# %% tags=["check"]
acted = frame["expert"].str.startswith("B_f").groupby(frame["set"]).mean()
message = "experts should act on the forget set only"
assert acted["forget"] > 0.6 and acted["everyday"] < 0.05, message
pd.crosstab(frame["set"], frame["expert"])

# %%
from alter_demo.inspection import charts
from alter_demo.inspection.words import word_counts

forget = frame.loc[frame["set"] == "forget", ["word", "S_q", "expert"]]
counts = word_counts(forget.itertuples(index=False), run.router.config.threshold)
fig, axes = plt.subplots(1, len(counts), figsize=(4 * len(counts), 2.6))
for ax, (route, words) in zip(axes, counts.items(), strict=True):
    ax.imshow(charts.cloud(words, route))
    ax.set(title=f"{route}: {sum(words.values())} words", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Sizes are hard to compare in a word cloud, so we also count.
#
# **Exercise 2.** List the words of one route in a frame like the one above, most frequent first, each word once.


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
# We can force the router to send every token the same way.

# %%
question = ["What is the name of Harry Potter's school?"]
routes = {"as routed": None, "no expert (the base model)": "off", "only B_r": "r"}
routes |= {f"only B_f{d}": d for d in range(1, run.router.config.n_experts + 1)}
answers = {}
for label, route in routes.items():
    with run.force_route(route):
        answers[label] = run.generate(question, max_new_tokens=24)[0]
pd.Series(answers).to_frame("answer")

# %% tags=["check"]
base = run.generate(question, adapted=False, max_new_tokens=24)[0]
assert answers["no expert (the base model)"] == base
assert "Hogwarts" in base and "Hogwarts" not in answers["as routed"]
france = ["What is the capital of France?"]
assert run.generate(france) == run.generate(france, adapted=False)
print("Without experts the base model answers. On other subjects the router switches them off.")

# %% [markdown]
# So the method does not erase the knowledge. It is still in the weights, and the experts keep the model from saying it.
#
# **Exercise 3.** Which expert acts for a token with these weights? Column 0 is `B_r`, which acts beside the others. Return 0 if none acts.


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
# - Every token has one routing plan for all layers: entropy, route, expert weights.
# - Tokens are uncertain where an answer can continue in several ways, and confident once something has begun. Function words are mostly confident.
# - The experts act only where the gate detects a subject to forget.
#
# **Next:** [5. Measuring forgetting](05_measuring_forgetting.ipynb)
