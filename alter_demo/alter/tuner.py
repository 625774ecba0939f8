"""ALTER as a PEFT tuner: the router, and the model that `peft.get_peft_model` builds."""

import functools
import types
from typing import ClassVar

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import PeftType, register_peft_method
from torch import nn

from ..errors import UserError
from .bank import BANK_PARTS, Bank, FrozenTokens, plan_tokens
from .config import AlterConfig
from .experts import AlterLinear, RoutingState
from .inference import routed_forward
from .routing import RoutingPlan


class TokenRouter(nn.Module, BaseTunerLayer):
    """The gate g = softmax(W_g^T x / tau), and its bank of stored prompts if there is one.

    Phase one fits both; no optimizer trains them.
    """

    adapter_layer_names = ("alter_gate", *(f"alter_gate_{part}" for part in BANK_PARTS))
    other_param_names = ("configs",)

    def __init__(self, state: RoutingState):
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, AlterConfig] = {}
        self.state = state
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, adapter_name: str, config: AlterConfig, base_config, device) -> None:
        """Zeros in the shapes that the config gives, for one adapter."""
        hidden, parts = base_config.hidden_size, {}
        size = 1 if config.router_input == "entropy" else hidden
        if config.gate == "bank":
            size = config.bank_dim
            parts = {"token_weights": (base_config.vocab_size,), "projection": (size, hidden + 1),
                     "forget": (config.bank_forget, size),
                     "retain": (config.bank_retain, size)}  # fmt: skip
        shapes = {"alter_gate": (1 + config.n_experts, size + 1)}  # last column: bias
        for name, shape in (shapes | {f"alter_gate_{k}": v for k, v in parts.items()}).items():
            zeros = torch.zeros(shape, device=device)
            getattr(self, name)[adapter_name] = nn.Parameter(zeros, requires_grad=False)
        self.configs[adapter_name] = config

    def fill(self, adapter_name: str, gate: torch.Tensor, bank: Bank | None) -> None:
        """Set what phase one has fitted."""
        self.alter_gate[adapter_name].data.copy_(gate)
        for part in BANK_PARTS if bank else ():
            getattr(self, f"alter_gate_{part}")[adapter_name].data.copy_(getattr(bank, part))

    def bank(self) -> Bank | None:
        """The bank of the active adapter, None for the softmax gate."""
        name = self.active_adapters[0]
        if self.configs[name].gate != "bank":
            return None
        return Bank(*(getattr(self, f"alter_gate_{part}")[name] for part in BANK_PARTS))

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=True)

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, False)

    @property
    def config(self) -> AlterConfig:
        return self.configs[self.active_adapters[0]]

    def plan(self, tokens: FrozenTokens, carry=None) -> tuple[RoutingPlan, tuple | None]:
        """`plan_tokens` for the active adapter."""
        gate = self.alter_gate[self.active_adapters[0]]
        return plan_tokens(self.config, gate, self.bank(), tokens, self.state.force, carry)


class AlterModel(BaseTuner):
    """Builds the layers and the router into a transformers causal language model."""

    prefix = "alter_"
    tuner_layer_cls = (AlterLinear, TokenRouter)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _pre_injection_hook(self, model, config, adapter_name) -> None:
        if not hasattr(model, "token_router"):
            # PEFT takes the router for an adapter and would leave the base trainable
            model.requires_grad_(False)
            model.token_router = TokenRouter(RoutingState())
            model.token_router.inner_forward = model.__dict__.get("forward")
            # generate() reads the signature to choose what it passes, so the wrapper keeps it
            wrapper = functools.wraps(type(model).forward)(
                lambda *args, **kwargs: routed_forward(*args, **kwargs)
            )
            model.forward = types.MethodType(wrapper, model)

    def _prepare_model(self, peft_config, model) -> None:
        """Runs at every injection, also of a second adapter: give it a gate."""
        router = model.token_router
        for name, config in self.peft_config.items():
            if name not in router.configs:
                text_config = model.config.get_text_config()
                router.add(name, config, text_config, next(model.parameters()).device)
        router.set_adapter(self.active_adapters)

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if isinstance(target, AlterLinear):
            target.update_layer(adapter_name, config)
            return
        if _get_in_out_features(target)[0] is None:
            kind = type(target).__name__
            raise UserError(f"ALTER adapts linear layers, but {target_name} is a {kind}.")
        layer = AlterLinear(target, adapter_name, config, self.model.token_router.state)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_and_unload(self, *args, **kwargs):
        raise NotImplementedError(
            "ALTER cannot be merged into the weights: experts are chosen per token. Keep the "
            "adapter beside the model, or call unload() to get the base model back."
        )

    merge_adapter = merge_and_unload

    def unload(self):
        model = super().unload()
        router = model.token_router
        del model.token_router, model.forward
        if router.inner_forward is not None:
            model.forward = router.inner_forward
        return model


def routing_state(model) -> RoutingState:
    """The RoutingState of a model with an ALTER adapter (a PeftModel or the model inside)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.token_router.state


def has_router(model) -> bool:
    return isinstance(model, PeftModel) and hasattr(model.get_base_model(), "token_router")


if PeftType("ALTER") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(
        name="alter", config_cls=AlterConfig, model_cls=AlterModel, prefix=AlterModel.prefix
    )
