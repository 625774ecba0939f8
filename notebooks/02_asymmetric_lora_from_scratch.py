# %% [markdown]
# # 2. An asymmetric LoRA from scratch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/02_asymmetric_lora_from_scratch.ipynb)
#
# **Goal.** Build ALTER's layer in plain PyTorch: a LoRA, then one A with several B's, then a gate that picks a B for each token; and see why A is shared.
#
# **Before.** Notebook 1. You have seen a linear layer in PyTorch.
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
# ## A LoRA
# A linear layer computes $W_0 x$. A LoRA leaves $W_0$ alone and adds a product of two thin matrices: $W_0 x + B A x$. `A`
# (r × in) reads, `B` (out × r) writes. With B = 0 the layer starts as it was.

# %%
import torch
from torch import nn

torch.manual_seed(0)


class Lora(nn.Module):
    def __init__(self, base, r):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):  # (n, in)
        return self.base(x) + x @ self.A.T @ self.B.T


# %% tags=["check"]
base, x = nn.Linear(12, 7, bias=False), torch.randn(4, 12)
assert torch.equal(Lora(base, 2)(x), base(x))
print("an untrained LoRA changes nothing")

# %% [markdown]
# ## One A, several B's
# ALTER keeps one `A` for all, and gives each job its own `B`: $B_r$ keeps, each $B_{f_d}$ forgets one sub-domain (Eq. 1).
# $$y = W_0 x + \sum_e w_e B_e A x$$
# The weights $w$ are one row for each token: `(n, experts)`.


# %%
class AsymmetricLora(Lora):
    def __init__(self, base, r, experts):
        super().__init__(base, r)
        self.B = nn.Parameter(torch.zeros(experts, base.out_features, r))

    def forward(self, x, w):  # (n, in), (n, experts)
        h = x @ self.A.T  # (n, r): A x, once for all experts
        return self.base(x) + torch.einsum("ne,eor,nr->no", w, self.B, h)


layer = AsymmetricLora(base, 2, 3)
nn.init.normal_(layer.B)
w = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5]])
layer(x, w).shape

# %% [markdown]
# The package's layer does the same with masks for who may learn. Both must agree: outputs to 1e-6, gradients to 1e-4.

# %% tags=["check"]
from alter_demo.adapter import ExpertDelta

ours = layer.base(x) + ExpertDelta.apply(x, layer.A, layer.B, w, None, None)
assert torch.allclose(ours, layer(x, w), atol=1e-6)
mine = torch.autograd.grad(layer(x, w).square().sum(), [layer.A, layer.B])
theirs = torch.autograd.grad(ours.square().sum(), [layer.A, layer.B])
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))
print("largest difference of the outputs:", f"{(ours - layer(x, w)).abs().max():.0e}")

# %% [markdown]
# **Exercise 1.** How many numbers does such a layer train: one A, one B_r, `n` B_f's?

# %% tags=["exercise"]
from alter_demo.lessons import check


def adapter_size(r, n_in, n_out, n):
    return None  # your line


check("adapter_size", adapter_size)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def adapter_size(r, n_in, n_out, n):
#     return r * n_in + (1 + n) * n_out * r
# ```
# </details>
#
# **Exercise 2.** Write the update alone, without the base layer, in any way you like.


# %% tags=["exercise"]
def update(x, A, B, w):
    return None  # your line: (n, in), (r, in), (experts, out, r), (n, experts) -> (n, out)


check("update", update)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def update(x, A, B, w):
#     return sum(w[:, e, None] * (x @ A.T @ B[e].T) for e in range(len(B)))
# ```
# </details>

# %% [markdown]
# ## Who may learn
# In one backward pass `A` shall learn from uncertain tokens only, and each `B` from confident tokens of its own. So the
# gradient of a weight is masked token by token, while the gradient that flows on to earlier layers stays whole.

# %% tags=["check"]
high = torch.tensor([[True], [False], [False], [False]])  # only token 0 is uncertain
own = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]).bool()  # only token 1, for expert 1
y = ExpertDelta.apply(x, layer.A, layer.B, w, high, own)
grad_a, grad_b = torch.autograd.grad(y.sum(), [layer.A, layer.B])
alone = ExpertDelta.apply(x[:1], layer.A, layer.B, w[:1], None, None)
assert torch.allclose(grad_a, torch.autograd.grad(alone.sum(), layer.A)[0], atol=1e-5)
assert grad_b[1].any() and not grad_b[[0, 2]].any()
print("A learned from token 0 alone, B_1 from token 1 alone")

# %% [markdown]
# ## The gate
# Which expert acts? A gate gives each expert a score `z` for the token. An uncertain token mixes the best three (softmax
# at temperature 0.8); a confident one takes the single best.


# %%
def gate(z, high, tau=0.8, k=3):  # (n, experts), (n,) bool
    top, index = (z / tau).topk(min(k, z.shape[-1]), -1)
    mixed = torch.zeros_like(z).scatter(-1, index, top.softmax(-1))
    single = nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    return torch.where(high[:, None], mixed, single)


z = torch.tensor([[2.0, 1.0, 0.5, -1.0], [2.0, 1.0, 0.5, -1.0]])
gate(z, torch.tensor([True, False]))

# %% tags=["check"]
from alter_demo.adapter import AlterConfig
from alter_demo.routing import fuse

z, high = torch.randn(50, 4), torch.rand(50) > 0.5
assert torch.allclose(gate(z, high), fuse(z, high, AlterConfig(n_experts=4)), atol=1e-6)
print("the same gate as the package's")

# %% [markdown]
# **Exercise 3.** Write it for one token: `z` (experts,), `high` True or False.


# %% tags=["exercise"]
def gate_weights(z, high):
    return None  # your lines


check("gate_weights", gate_weights)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gate_weights(z, high):
#     w = torch.zeros_like(z)
#     if high:
#         best = z.topk(3).indices
#         w[best] = (z[best] / 0.8).softmax(-1)
#     else:
#         w[z.argmax()] = 1
#     return w
# ```
# </details>

# %% [markdown]
# ## Why A is shared and B is not (the paper's Fig. 1, in small)
# We fine-tune one LoRA on each of four invented authors and one on all four mixed, all from the same start, and look at how
# alike that is which the A's and the B's have learned (A and B less where they began).

# %%
from alter_demo import load_model
from alter_demo.heterogeneity import domains, fine_tuned, projected, similarity

lm = load_model("smollm2-135m", dtype="float32")
weights = fine_tuned(lm, domains(4), steps=8, layers=2)
found = similarity(weights)
found.groupby("matrix")["similarity"].agg(["mean", "min"]).round(2)

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 2, figsize=(9, 4))
for ax, (matrix, points) in zip(axes, projected(weights).groupby("matrix"), strict=True):
    for (domain, own), marker in zip(points.groupby("domain"), "osD^v", strict=True):
        ax.scatter(own.x, own.y, label=domain, marker=marker, alpha=0.7)
    ax.set(
        title=f"what {matrix} learned: one point for each of its 8 directions",
        xlabel="1st component",
        ylabel="2nd component",
    )
axes[0].legend(fontsize=8)
plt.show()

# %% tags=["check", "same"]
mean = found.groupby("matrix")["similarity"].mean()
assert mean["A"] > mean["B"]
print(f"likeness of what the A's learned {mean['A']:.2f}, of what the B's learned {mean['B']:.2f}")

# %% [markdown]
# Whole A's would look nearly equal whatever they learned, since all start from the same random matrix; so we compare what
# was added. It is more alike in A than in B: a reason to share A and to give each sub-domain a B, and no proof that one A
# serves all.
#
# ## Summary
# - $y = W_0 x + \sum_e w_e B_e A x$: one reader, several writers, one row of weights for each token.
# - Gradients are masked by token, so that each part learns only its own job.
# - Uncertain tokens mix experts, confident ones take one.
#
# **Next:** [3. Unlearn Harry Potter](03_unlearn_harry_potter.ipynb)
