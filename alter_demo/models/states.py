"""The hidden states of one layer, without running the layers above it."""

import torch


class LayerReached(Exception):
    """Ends a forward pass at the layer that was asked for."""


@torch.no_grad()
def hidden_states(model, inputs: dict, layer: int) -> torch.Tensor:
    """`hidden_states[layer]` (B, T, D) without running the layers from there on."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    layers, states = next(lists, ()), None
    if layer >= len(layers):
        return model(**inputs, output_hidden_states=True, use_cache=False).hidden_states[layer]

    def keep(module, args, kwargs):
        nonlocal states
        states = args[0] if args else kwargs["hidden_states"]
        raise LayerReached

    handle = layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except LayerReached:
        return states
    finally:
        handle.remove()
    raise AssertionError(f"layer {layer} did not run")
