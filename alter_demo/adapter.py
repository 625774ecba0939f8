"""ALTER as a PEFT tuner: one shared A, stacked experts B_r and B_f1..N, and a router that works token by token.

What is notable:
- a layer computes (B_r w_r + sum_d w_d B_fd) A x for all experts with two matrix products (Eq. 1); its backward pass
  masks the *weight* gradients per token, which is the whole of gradient isolation;
- the route of a token comes from the frozen model alone (its entropy and a contextual feature), so there is one plan
  per token for all layers. `model.forward` is wrapped to run the frozen pass first;
- while no token of a sequence has met an expert, the adapted model *is* the frozen model: the second pass is skipped.

PEFT offers no entry point for outside tuners, hence the enum member added at the end of this file.
"""

from __future__ import annotations

import copy
import functools
import math
import types
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import PeftType, register_peft_method
from torch import nn
from transformers import DynamicCache

from .entropy import PUBLISHED_THRESHOLD, entropy_range, tsallis_entropy
from .errors import UserError
from .routing import Plan, features, route

MAX_EXPERTS = 8


@dataclass
class AlterConfig(PeftConfig):
    """Everything that decides what the adapter computes. Training settings live in `training.TrainConfig`."""

    r: int = field(default=8, metadata={"help": "rank of A and of every B, 1 to 256"})
    scaling: float = field(default=4.0, metadata={"help": "factor on the update, as LoRA's alpha / r"})
    target_modules: list[str] | str | None = field(default="all-linear", metadata={"help": "layers to adapt"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "only these layer numbers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the layer list"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave alone"})
    n_experts: int = field(default=1, metadata={"help": "forgetting experts N, 1 to 8; B_r comes on top"})
    q: float = field(default=1.5, metadata={"help": "order of the Tsallis entropy"})
    threshold: float = field(default=PUBLISHED_THRESHOLD, metadata={"help": "S_q above it: uncertain, through A"})
    gate: str = field(default="two_level", metadata={"help": "two_level (r or not r first) or softmax (published)"})
    gate_threshold: float = field(default=0.5, metadata={"help": "two_level: P(not r) from which experts act"})
    router_input: str = field(default="context", metadata={"help": "context (hidden state) or entropy (published)"})
    feature_layer: int = field(default=-1, metadata={"help": "hidden state that the router reads, -1 is the last"})
    feature_decay: float = field(default=0.97, metadata={"help": "weight of the past in the context, 1 = plain mean"})
    tau_high: float = field(default=0.8, metadata={"help": "temperature of the fusion for uncertain tokens"})
    top_k: int = field(default=3, metadata={"help": "experts fused for an uncertain token"})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.ALTER
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if not 1 <= self.r <= 256:
            raise UserError(f"The rank must lie between 1 and 256, and {self.r} does not.")
        if not 1 <= self.n_experts <= MAX_EXPERTS:
            raise UserError(f"There are 1 to 8 forgetting experts, not {self.n_experts}.")
        if self.gate not in ("two_level", "softmax") or self.router_input not in ("context", "entropy"):
            raise UserError("gate is two_level or softmax, router_input is context or entropy.")
        if not 0 < self.threshold < entropy_range(2**31, self.q):
            raise UserError(f"No S_q at q = {self.q:g} reaches the threshold {self.threshold:g}.")


class RoutingState:
    """What the layers of one model share during a forward pass; `weights is None` means: experts off."""

    def __init__(self):
        self.weights: torch.Tensor | None = None  # (B, T, 1 + N), column 0 is B_r
        self.learn_a: torch.Tensor | None = None  # (B, T, 1) bool
        self.learn_b: torch.Tensor | None = None  # (B, T, 1 + N) bool
        self.plan: Plan | None = None  # set from outside: use this one and skip the frozen pass
        self.last_plan: Plan | None = None
        self.force: str | int | None = None  # "off", "r" or the number of a forgetting expert from 1

    def use(self, plan: Plan | None) -> None:
        self.last_plan = plan
        self.weights = None if plan is None else plan.weights
        self.learn_a = None if plan is None or plan.learn_a is None else plan.learn_a[..., None]
        self.learn_b = None if plan is None else plan.learn_b


class ExpertDelta(torch.autograd.Function):
    """y = sum_e w_e B_e (A x), with weight gradients masked per token and the input gradient left whole.

    x (n, in), A (r, in), B (E, out, r), w (n, E); masks learn_a (n, 1), learn_b (n, E) or None for "everywhere".
    """

    @staticmethod
    def forward(ctx, x, a, b, w, learn_a, learn_b):
        h = x @ a.T  # (n, r)
        b_flat = b.transpose(1, 2).reshape(-1, b.shape[1])  # (E r, out)
        g = (w[:, :, None] * h[:, None, :]).flatten(1)  # (n, E r)
        ctx.save_for_backward(x, a, b_flat, w, h, learn_a, learn_b)
        return g @ b_flat

    @staticmethod
    def backward(ctx, dy):
        x, a, b_flat, w, h, learn_a, learn_b = ctx.saved_tensors
        (n, experts), rank = w.shape, h.shape[1]
        dg = (dy @ b_flat.T).view(n, experts, rank)
        dh = (w[:, :, None] * dg).sum(1)  # (n, r)
        dx = dh @ a if ctx.needs_input_grad[0] else None
        da = db = None
        if ctx.needs_input_grad[1]:
            da = (dh if learn_a is None else dh * learn_a).T @ x
        if ctx.needs_input_grad[2]:
            w_b = w if learn_b is None else w * learn_b
            g = (w_b[:, :, None] * h[:, None, :]).flatten(1)
            db = (g.T @ dy).view(experts, rank, -1).transpose(1, 2)
        return dx, da, db, None, None, None


class AlterLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D, 4- or 8-bit) with a shared A and stacked experts beside it."""

    adapter_layer_names = ("alter_A", "alter_B")
    other_param_names = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AlterConfig, state: RoutingState):
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
        # zeros: before training the adapted model equals the frozen one bit for bit (decision 5)
        self.alter_B[adapter_name] = nn.Parameter(torch.zeros(1 + config.n_experts, self.out_features, config.r))
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
        # weights are float32; the products run in the precision of the activations, as under autocast
        a, b = self.alter_A[name].to(x.dtype), self.alter_B[name].to(x.dtype)
        w = (w * self.scaling[name]).to(x.dtype)
        flat = [None if m is None else m.flatten(0, -2) for m in (x, w, state.learn_a, state.learn_b)]
        delta = ExpertDelta.apply(flat[0], a, b, flat[1], flat[2], flat[3])
        return y + delta.view(y.shape).to(y.dtype)

    def merge(self, *args, **kwargs) -> None:
        raise NotImplementedError("ALTER can't be merged into the weights: which experts act is decided per token.")

    unmerge = merge


class TokenRouter(nn.Module, BaseTunerLayer):
    """The gate of Eq. `g_d = softmax(W_g^T . / tau)`: one linear map, fitted in phase I, not by the optimiser."""

    adapter_layer_names = ("alter_gate",)
    other_param_names = ("configs",)

    def __init__(self, state: RoutingState):
        super().__init__()
        self.alter_gate = nn.ParameterDict()  # name -> (1 + N, F + 1), the last column is the bias
        self.configs: dict[str, AlterConfig] = {}
        self.state = state
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, adapter_name: str, config: AlterConfig, hidden_size: int, like: torch.Tensor) -> None:
        size = 1 if config.router_input == "entropy" else hidden_size
        gate = torch.zeros(1 + config.n_experts, size + 1, device=like.device)
        self.alter_gate[adapter_name] = nn.Parameter(gate, requires_grad=False)
        self.configs[adapter_name] = config

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=True)

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, False)

    @property
    def config(self) -> AlterConfig:
        return self.configs[self.active_adapters[0]]

    def plan(self, hidden: torch.Tensor, entropy: torch.Tensor, mask: torch.Tensor, carry=None):
        """Plan of every token from frozen states (B, T, D), S_q (B, T) and the mask (B, T); carry: see `features`."""
        x, carry = features(hidden, entropy, mask, self.config, carry)
        return route(x, entropy, mask, self.alter_gate[self.active_adapters[0]], self.config, self.state.force), carry


def routed_forward(model, *args, **kwargs):
    """Stands in for `model.forward`: plan on the frozen model, then run with the experts that the plan names."""
    router, state = model.token_router, model.token_router.state
    forward = router.inner_forward or types.MethodType(type(model).forward, model)
    if router.disable_adapters or not router.active_adapters or state.force == "off":
        state.use(None)
        return forward(*args, **kwargs)
    if state.plan is not None:
        state.use(state.plan)
        return forward(*args, **kwargs)
    if args:
        kwargs["input_ids"], args = args[0], args[1:]
    past = kwargs.get("past_key_values")
    cached = kwargs.get("use_cache")
    if past is None and (model.config.use_cache if cached is None else cached) and not torch.is_grad_enabled():
        past = kwargs["past_key_values"] = DynamicCache(config=model.config)  # that the model would make, with a twin
    twin = getattr(past, "alter_twin", None)
    if past is not None and twin is None:
        twin = past.alter_twin = Twin(past)
    labels = kwargs.pop("labels", None)
    # the frozen pass; it uses the caller's cache as long as both models agree on every token so far
    state.use(None)
    frozen_kwargs = kwargs | {"output_hidden_states": True, "logits_to_keep": 0, "return_dict": True}
    if twin is not None:
        frozen_kwargs["past_key_values"] = past if twin.shared else twin.frozen
    if "inputs_embeds" in kwargs and kwargs.get("input_ids") is None:
        frozen_kwargs.pop("input_ids", None)
    with torch.no_grad():
        out = forward(*args, **frozen_kwargs)
        config = router.config
        length = out.logits.shape[1]
        entropy = tsallis_entropy(out.logits, config.q)
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            mask = torch.ones(entropy.shape, dtype=torch.long, device=entropy.device)
        hidden = out.hidden_states[config.feature_layer]
        plan, carry = router.plan(hidden, entropy, mask[:, -length:], twin and twin.carry)
    if twin is not None:
        twin.carry = carry
    idle = not plan.weights.any()
    if (twin is None or twin.shared) and idle and not torch.is_grad_enabled():
        state.use(plan)
        state.weights = None
        return same_answer(out, kwargs, labels, model)
    if twin is not None and twin.shared:
        twin.split(past, length)
    state.use(plan)
    if labels is not None:
        kwargs["labels"] = labels
    return forward(*args, **kwargs)


def same_answer(out, kwargs, labels, model):
    """The frozen pass's output in the form that the caller asked for."""
    keep = kwargs.get("logits_to_keep", 0)
    if labels is not None:
        out.loss = model.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
    if isinstance(keep, torch.Tensor):
        out.logits = out.logits[:, keep]
    elif keep:
        out.logits = out.logits[:, -keep:]
    if not kwargs.get("output_hidden_states"):
        out.hidden_states = None
    return out.to_tuple() if kwargs.get("return_dict") is False else out


class Twin:
    """The frozen model's KV cache beside the adapted one's, and the running context of the router."""

    def __init__(self, past):
        self.carry = None
        self.shared = bool(getattr(past, "is_croppable", False)) and not any(past.is_sliding or [False])
        self.frozen = None if self.shared else copy.deepcopy(past)
        # beam search and the like rearrange the cache: both must follow
        for name in ("reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            inner = getattr(past, name)

            def both(index, inner=inner, name=name):
                inner(index)
                self.follow(name, index)

            setattr(past, name, both)

    def follow(self, name, index):
        if self.frozen is not None:
            getattr(self.frozen, name)(index)
        if self.carry is not None:
            if name == "batch_repeat_interleave":
                self.carry = tuple(c.repeat_interleave(index, 0) for c in self.carry)
            else:
                self.carry = tuple(c[index.to(c.device)] for c in self.carry)

    def split(self, past, new_tokens: int) -> None:
        """From now on the two models differ: keep the frozen cache, take the last tokens off the caller's."""
        hidden = {k: past.__dict__.pop(k) for k in list(past.__dict__) if k in TWIN_ATTRIBUTES}
        self.frozen = copy.deepcopy(past)
        past.__dict__.update(hidden)
        past.crop(-new_tokens)
        self.shared = False


TWIN_ATTRIBUTES = ("alter_twin", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")


class AlterModel(BaseTuner):
    """Builds the layers and the router into a transformers causal LM; used through `peft.get_peft_model`."""

    prefix = "alter_"
    tuner_layer_cls = (AlterLinear, TokenRouter)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        if not hasattr(model, "token_router"):
            # PEFT takes the router for an adapter that is there already, and would leave the base trainable
            model.requires_grad_(False)
            model.token_router = TokenRouter(RoutingState())
            model.token_router.inner_forward = model.__dict__.get("forward")
            # generate() reads the signature to decide what it passes (position_ids), so the wrapper keeps it
            wrapper = functools.wraps(type(model).forward)(lambda *args, **kwargs: routed_forward(*args, **kwargs))
            model.forward = types.MethodType(wrapper, model)

    def _prepare_model(self, peft_config, model) -> None:
        """Runs at every injection, also that of a second adapter: give it a gate."""
        router = model.token_router
        for name, config in self.peft_config.items():
            if name not in router.configs:
                router.add(name, config, model.config.get_text_config().hidden_size, next(model.parameters()))
        router.set_adapter(self.active_adapters)

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if isinstance(target, AlterLinear):
            target.update_layer(adapter_name, config)
            return
        if _get_in_out_features(target)[0] is None:
            raise UserError(f"ALTER adapts linear layers, and {target_name} is a {type(target).__name__}.")
        layer = AlterLinear(target, adapter_name, config, self.model.token_router.state)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_and_unload(self, *args, **kwargs):
        raise NotImplementedError(
            "ALTER can't be merged into the weights: which experts act is decided per token. Keep the adapter beside "
            "the model, or call unload() to get the untouched model back."
        )

    merge_adapter = merge_and_unload

    def unload(self):
        model = super().unload()
        router = model.token_router
        del model.token_router, model.forward
        if router.inner_forward is not None:
            model.forward = router.inner_forward
        return model


def register() -> None:
    """Make PEFT know ALTER, once."""
    if "ALTER" not in PeftType.__members__:
        member = str.__new__(PeftType, "ALTER")
        member._name_, member._value_ = "ALTER", "ALTER"
        PeftType._member_map_["ALTER"] = PeftType._value2member_map_["ALTER"] = member
        PeftType._member_names_.append("ALTER")
        type.__setattr__(PeftType, "ALTER", member)
    if PeftType("ALTER") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="alter", config_cls=AlterConfig, model_cls=AlterModel, prefix=AlterModel.prefix)


register()
