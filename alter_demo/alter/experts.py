"""The layer: a shared A with stacked experts beside a frozen linear layer (ALTER, Eq. 1).

A layer computes (B_r w_r + sum_d w_d B_fd) A x for all experts with two matrix products. Its
backward pass masks the weight gradients per token, which is all that gradient isolation needs.
"""

import math

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from .config import AlterConfig
from .routing import RoutingPlan


class RoutingState:
    """What the layers of one model share during a forward pass; `weights is None`: experts off."""

    def __init__(self):
        self.weights: torch.Tensor | None = None  # (B, T, 1 + N), column 0 is B_r
        self.a_grad_mask: torch.Tensor | None = None  # (B, T, 1) bool
        self.b_grad_mask: torch.Tensor | None = None  # (B, T, 1 + N) bool
        self.plan: RoutingPlan | None = None  # set from outside: use it, skip the frozen pass
        self.last_plan: RoutingPlan | None = None
        self.force: str | int | None = None  # "off", "r", or a forgetting expert from 1

    def follow(self, plan: RoutingPlan | None) -> None:
        """Let the layers follow `plan`; None switches the experts off."""
        self.last_plan = plan
        self.weights = self.a_grad_mask = self.b_grad_mask = None
        if plan is not None:
            self.weights, self.b_grad_mask = plan.weights, plan.b_grad_mask
            if plan.a_grad_mask is not None:
                self.a_grad_mask = plan.a_grad_mask[..., None]


class ExpertDelta(torch.autograd.Function):
    """y = sum_e w_e B_e (A x); weight gradients are masked per token, the input gradient is not.

    x (n, in), A (r, in), B (E, out, r), w (n, E); masks a_grad_mask (n, 1) and b_grad_mask (n, E),
    None for "everywhere".
    """

    @staticmethod
    def forward(ctx, x, a, b, w, a_grad_mask, b_grad_mask):
        h = x @ a.T  # (n, r)
        b_flat = b.transpose(1, 2).reshape(-1, b.shape[1])  # (E r, out)
        g = (w[:, :, None] * h[:, None, :]).flatten(1)  # (n, E r)
        ctx.save_for_backward(x, a, b_flat, w, h, a_grad_mask, b_grad_mask)
        return g @ b_flat

    @staticmethod
    def backward(ctx, dy):
        x, a, b_flat, w, h, a_grad_mask, b_grad_mask = ctx.saved_tensors
        (n, experts), rank = w.shape, h.shape[1]
        dg = (dy @ b_flat.T).view(n, experts, rank)
        dh = (w[:, :, None] * dg).sum(1)  # (n, r)
        dx = dh @ a if ctx.needs_input_grad[0] else None
        da = db = None
        if ctx.needs_input_grad[1]:
            da = (dh if a_grad_mask is None else dh * a_grad_mask).T @ x
        if ctx.needs_input_grad[2]:
            w_b = w if b_grad_mask is None else w * b_grad_mask
            g = (w_b[:, :, None] * h[:, None, :]).flatten(1)
            db = (g.T @ dy).view(experts, rank, -1).transpose(1, 2)
        return dx, da, db, None, None, None


class AlterLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D, 4-bit or 8-bit) with A and its experts beside it."""

    adapter_layer_names = ("alter_A", "alter_B")
    other_param_names = ("scaling",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: AlterConfig, state: RoutingState
    ):
        super().__init__()
        self.base_layer = base_layer
        self.alter_A = nn.ParameterDict()
        self.alter_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.state = state
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AlterConfig) -> None:
        a = torch.empty(config.r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.alter_A[adapter_name] = nn.Parameter(a)
        # zeros: before training the adapted model equals the frozen one bit for bit
        b = torch.zeros(1 + config.n_experts, self.out_features, config.r)
        self.alter_B[adapter_name] = nn.Parameter(b)
        self.scaling[adapter_name] = config.scaling
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        w, state = self.state.weights, self.state
        if w is None or self.disable_adapters:
            return y
        name = self.active_adapters[0]
        if name not in self.alter_A:
            return y
        # parameters are float32; the products run in the precision of the activations
        a, b = self.alter_A[name].to(x.dtype), self.alter_B[name].to(x.dtype)
        w = (w * self.scaling[name]).to(x.dtype)
        parts = (x, w, state.a_grad_mask, state.b_grad_mask)
        x, w, *masks = (None if part is None else part.flatten(0, -2) for part in parts)
        return y + ExpertDelta.apply(x, a, b, w, *masks).view(y.shape).to(y.dtype)

    def merge(self, *args, **kwargs) -> None:
        raise NotImplementedError("ALTER cannot be merged: experts are chosen per token.")

    unmerge = merge
