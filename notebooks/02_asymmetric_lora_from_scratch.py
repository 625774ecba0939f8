# %% [markdown]
# # 2. An asymmetric LoRA from scratch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/alter-demo/alter_demo/blob/main/notebooks/02_asymmetric_lora_from_scratch.ipynb)
#
# **Goal.** Build ALTER's layer in plain PyTorch: first a LoRA, then one A with several B's, then a gate that picks a B for each token. See why A is shared.
#
# **Before.** Notebook 1. You have used a linear layer in PyTorch.
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
# ## A LoRA
# A linear layer computes $W_0 x$. A LoRA freezes $W_0$ and adds the product of two thin matrices: $W_0 x + B A x$. `A`
# (r × in) reads, `B` (out × r) writes. B starts at 0, so at first the LoRA changes nothing.

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
print("An untrained LoRA changes nothing.")

# %% [markdown]
# ## One A, several B's
# ALTER shares one `A` and gives each task its own `B`: $B_r$ retains, and each $B_{f_d}$ forgets one sub-domain (Eq. 1).
# $$y = W_0 x + \sum_e w_e B_e A x$$
# The weights $w$ have one row for each token: `(n, experts)`.


# %%
class AsymmetricLora(Lora):
    def __init__(self, base, r, experts):
        super().__init__(base, r)
        self.B = nn.Parameter(torch.zeros(experts, base.out_features, r))

    def forward(self, x, w):  # (n, in), (n, experts)
        h = x @ self.A.T  # (n, r): A x, computed once for all experts
        return self.base(x) + torch.einsum("ne,eor,nr->no", w, self.B, h)


layer = AsymmetricLora(base, 2, 3)
nn.init.normal_(layer.B)
w = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.3, 0.5]])
layer(x, w).shape

# %% [markdown]
# The package's layer does the same, and also takes masks that select who learns. The two layers must agree: outputs to 1e-6,
# gradients to 1e-4.

# %% tags=["check"]
from alter_demo.alter.experts import ExpertDelta

package_y = layer.base(x) + ExpertDelta.apply(x, layer.A, layer.B, w, None, None)
assert torch.allclose(package_y, layer(x, w), atol=1e-6)
grads = torch.autograd.grad(layer(x, w).square().sum(), [layer.A, layer.B])
package_grads = torch.autograd.grad(package_y.square().sum(), [layer.A, layer.B])
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(grads, package_grads, strict=True))
print("The largest difference of the outputs is", f"{(package_y - layer(x, w)).abs().max():.0e}.")

# %% [markdown]
# **Exercise 1.** How many parameters does such a layer train: one A, one B_r, and `n` B_f's?

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
# **Exercise 2.** Write only the update, without the base layer, in any way you like.


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
# ## Who learns from which token
# In one backward pass, `A` learns only from uncertain tokens, and each `B` only from confident tokens of its own. So the
# gradient of a weight is masked token by token. The gradient that flows back to earlier layers stays complete.

# %% tags=["check"]
a_grad_mask = torch.tensor([[True], [False], [False], [False]])  # only token 0 is uncertain
b_grad_mask = torch.zeros(4, 3, dtype=torch.bool)
b_grad_mask[1, 1] = True  # only token 1 teaches expert 1
y = ExpertDelta.apply(x, layer.A, layer.B, w, a_grad_mask, b_grad_mask)
grad_a, grad_b = torch.autograd.grad(y.sum(), [layer.A, layer.B])
y0 = ExpertDelta.apply(x[:1], layer.A, layer.B, w[:1], None, None)
assert torch.allclose(grad_a, torch.autograd.grad(y0.sum(), layer.A)[0], atol=1e-5)
assert grad_b[1].any() and not grad_b[[0, 2]].any()
print("A learns from token 0 only, and B_1 from token 1 only.")

# %% [markdown]
# ## The gate
# Which expert acts? A gate gives each expert a score `z` for the token. An uncertain token mixes the best three experts
# (softmax at temperature 0.8). A confident token takes the best one.


# %%
def gate(z, uncertain, tau=0.8, k=3):  # (n, experts), (n,) bool
    top, index = (z / tau).topk(min(k, z.shape[-1]), -1)
    mixed = torch.zeros_like(z).scatter(-1, index, top.softmax(-1))
    single = nn.functional.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    return torch.where(uncertain[:, None], mixed, single)


z = torch.tensor([[2.0, 1.0, 0.5, -1.0], [2.0, 1.0, 0.5, -1.0]])
gate(z, torch.tensor([True, False]))

# %% tags=["check"]
from alter_demo.alter.config import AlterConfig
from alter_demo.alter.routing import fuse_experts

z, uncertain = torch.randn(50, 4), torch.rand(50) > 0.5
package_weights = fuse_experts(z, uncertain, AlterConfig(n_experts=4))
assert torch.allclose(gate(z, uncertain), package_weights, atol=1e-6)
print("The gate gives the same weights as the package.")

# %% [markdown]
# **Exercise 3.** Write the gate for one token: `z` has shape `(experts,)`, and `uncertain` is True or False.


# %% tags=["exercise"]
def gate_weights(z, uncertain):
    return None  # your lines


check("gate_weights", gate_weights)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def gate_weights(z, uncertain):
#     w = torch.zeros_like(z)
#     if uncertain:
#         best = z.topk(3).indices
#         w[best] = (z[best] / 0.8).softmax(-1)
#     else:
#         w[z.argmax()] = 1
#     return w
# ```
# </details>

# %% [markdown]
# ## Why A is shared and B is not (a small version of the paper's Fig. 1)
# We fine-tune one LoRA on each of four invented authors and one on all four together. All five start from the same weights.
# Then we compare what the A's and the B's have learned, that is, A and B minus their initial values.

# %%
from alter_demo import load_model
from alter_demo.experiments.heterogeneity import domains, fine_tuned, projected, similarity

lm = load_model("smollm2-135m", dtype="float32")
weights = fine_tuned(lm, domains(4), steps=8, layers=2)
cosines = similarity(weights)
cosines.groupby("matrix")["similarity"].agg(["mean", "min"]).round(2)

# %%
import matplotlib.pyplot as plt

fig, axes = plt.subplots(1, 2, figsize=(9, 4))
for ax, (matrix, points) in zip(axes, projected(weights).groupby("matrix"), strict=True):
    for (domain, group), marker in zip(points.groupby("domain"), "osD^v", strict=True):
        ax.scatter(group.x, group.y, label=domain, marker=marker, alpha=0.7)
    title = f"what {matrix} learned: one point for each of its 8 directions"
    ax.set(title=title, xlabel="1st component", ylabel="2nd component")
axes[0].legend(fontsize=8)
plt.show()

# %% tags=["check", "same"]
mean = cosines.groupby("matrix")["similarity"].mean()
assert mean["A"] > mean["B"]
print(f"The mean cosine similarity is {mean['A']:.2f} for A and {mean['B']:.2f} for B.")

# %% [markdown]
# Complete A's look nearly equal whatever they learn, because they all start from the same random matrix. So we compare only
# what the training added. This is more similar for A than for B. It is a reason to share A and to give each sub-domain its
# own B, but no proof that one A serves all.
#
# ## Summary
# - $y = W_0 x + \sum_e w_e B_e A x$: one matrix reads, several matrices write, and each token has its own row of weights.
# - Gradients are masked by token, so that each part learns only its own task.
# - Uncertain tokens mix experts, confident tokens take one.
#
# **Next:** [3. Unlearn Harry Potter](03_unlearn_harry_potter.ipynb)
