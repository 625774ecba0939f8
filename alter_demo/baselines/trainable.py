"""What a method trains: all weights, three MLPs, a LoRA, or ALTER's adapter."""

import torch
from peft import LoraConfig, get_peft_model

from ..alter import tuner
from ..alter.config import AlterConfig
from ..alter.frozen import PhaseOneResult
from ..errors import UserError
from ..models.loading import LM
from ..options import check_value
from .methods import get_method


class FullWeights:
    """All weights, in float32."""

    changes_weights = True  # the model itself is saved, and 4-bit weights cannot be trained
    routed = False

    def steering_layer(self, lm: LM) -> int | None:
        """The hidden state that the loss steers, RMU's."""
        return None

    def prepare(self, lm: LM, phase_one: PhaseOneResult, config, experts=None):
        """The model with everything that trains switched on."""
        return cast_parameters(lm.model, torch.float32).requires_grad_(True)

    def finish(self, lm: LM, model):
        """The model after training."""
        return cast_parameters(model, getattr(torch, lm.dtype))


class MlpWeights(FullWeights):
    """The MLPs of three layers up to the steered one (RMU)."""

    def steering_layer(self, lm: LM) -> int | None:
        return round(lm.model.config.get_text_config().num_hidden_layers / 3)

    def prepare(self, lm: LM, phase_one: PhaseOneResult, config, experts=None):
        model, last = cast_parameters(lm.model, torch.float32), phase_one.steering_layer
        # hidden_states[layer] is the output of the layer before
        layers = {f".{i}." for i in range(max(0, last - 3), last)}
        parameters = [
            p for n, p in model.named_parameters() if ".mlp." in n and any(x in n for x in layers)
        ]
        if not parameters:
            raise UserError(f"RMU trains layers named mlp, but {lm.name} has none.")
        for parameter in parameters:
            parameter.requires_grad_(True)
        return model


class LoraAdapter:
    """A LoRA on all linear layers."""

    changes_weights = False
    routed = False

    def steering_layer(self, lm: LM) -> int | None:
        return None

    def prepare(self, lm: LM, phase_one: PhaseOneResult, config, experts=None):
        r = config.adapter.r
        lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(lm.model, lora)

    def finish(self, lm: LM, model):
        return model


class AlterAdapter(LoraAdapter):
    """A shared A, the experts and the router."""

    routed = True

    def prepare(self, lm: LM, phase_one: PhaseOneResult, config, experts=None):
        """`experts`: A and B of an earlier round to start from (`next_round`)."""
        try:
            model = get_peft_model(lm.model, phase_one.alter)
        except ValueError:
            layers = config.adapter.layers
            raise UserError(
                f"{lm.name} has no layers named as `layers={layers}` expects. Use layers=all."
            ) from None
        router = model.get_base_model().token_router
        router.fill("default", phase_one.gate, phase_one.bank)
        for name, old in (experts or {}).items():
            # all of A; of the B's those that were there, new ones stay at zero
            model.get_parameter(name).data[: len(old)] = old
        return model

    def finish(self, lm: LM, model):
        tuner.routing_state(model).plan = None
        return model


TRAINABLE = {
    "full": FullWeights(),
    "mlp": MlpWeights(),
    "lora": LoraAdapter(),
    "alter": AlterAdapter(),
}


def cast_parameters(model, dtype: torch.dtype):
    """Parameters only: buffers such as rotary frequencies stay in float32, as after loading."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.grad = None
    return model.requires_grad_(False)


def initial_alter_config(lm: LM, config, layer: int | None) -> AlterConfig:
    """The AlterConfig before the threshold and the number of experts are known."""
    text_config, adapter = lm.model.config.get_text_config(), config.adapter
    layers = text_config.num_hidden_layers
    method = get_method(config.method)
    gate = method.gate
    if adapter.router_input == "entropy":
        gate = "softmax"  # a bank stores contexts
    if gate == "bank":
        layer = max(1, round(layers / 5))  # low: what a prompt asks about, before it is answered
    if adapter.feature_layer is not None and method.trainable.routed:
        check_value("feature_layer", adapter.feature_layer, {"min": 0, "max": layers})
        layer = adapter.feature_layer
    return AlterConfig(
        gate=gate,
        bank_dim=min(AlterConfig.bank_dim, text_config.hidden_size),
        r=adapter.r,
        q=adapter.q,
        threshold=1e-6,
        router_input=adapter.router_input,
        task_type="CAUSAL_LM",
        feature_layer=round(layers * 5 / 6) if layer is None else layer,
        **layer_selection(adapter.layers, layers),
    )


def layer_selection(layers: str, count: int) -> dict:
    """AlterConfig values for one of `config.LAYERS` in a model of `count` layers."""
    return {
        "all": {},
        "attention": {"target_modules": r".*att.*_proj"},
        "mlp": {"target_modules": r".*mlp.*_proj"},
        "first_third": {"layers_to_transform": list(range(count // 3))},
        "last_third": {"layers_to_transform": list(range(count - count // 3, count))},
    }[layers]
