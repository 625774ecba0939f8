"""The adapted forward pass: route every token by the frozen model, then run with the experts.

The route comes from the frozen model alone, so there is one plan per token for all layers. Until a
token of the batch meets an expert, the adapted model is the frozen model and the second pass is
skipped.
"""

from __future__ import annotations

import copy
import types

import torch
from transformers import DynamicCache

from .bank import FrozenTokens
from .entropy import tsallis_entropy

# what beam search and the like call to rearrange a cache
REARRANGE = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def routed_forward(model, *args, **kwargs):
    """Stands in for `model.forward`: plan on the frozen model, then run with that plan."""
    router, state = model.token_router, model.token_router.state
    forward = router.inner_forward or types.MethodType(type(model).forward, model)
    off = router.disable_adapters or not router.active_adapters or state.force == "off"
    if off or state.plan is not None:
        state.follow(None if off else state.plan)
        return forward(*args, **kwargs)
    if args:
        kwargs["input_ids"], args = args[0], args[1:]
    frozen_cache = caller_cache(model, kwargs)
    labels = kwargs.pop("labels", None)
    state.follow(None)
    with torch.no_grad():
        out = forward(*args, **frozen_kwargs(kwargs, frozen_cache))
        plan = plan_from(router, out, kwargs, frozen_cache)
    shared = frozen_cache is None or frozen_cache.shared
    if shared and not plan.weights.any() and not torch.is_grad_enabled():
        state.follow(plan)
        state.weights = None
        return requested_output(out, kwargs, labels, model)
    if frozen_cache is not None and frozen_cache.shared:
        frozen_cache.split(kwargs["past_key_values"], out.logits.shape[1])
    state.follow(plan)
    if labels is not None:
        kwargs["labels"] = labels
    return forward(*args, **kwargs)


def caller_cache(model, kwargs: dict) -> FrozenCache | None:
    """The FrozenCache of the caller's KV cache; makes the cache that the model would make."""
    past, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    if past is None and use_cache and not torch.is_grad_enabled():
        past = kwargs["past_key_values"] = DynamicCache(config=model.config)
    if past is not None and getattr(past, "alter_frozen_cache", None) is None:
        past.alter_frozen_cache = FrozenCache(past)
    return None if past is None else past.alter_frozen_cache


def frozen_kwargs(kwargs: dict, frozen_cache: FrozenCache | None) -> dict:
    """Arguments of the frozen pass: all logits, the hidden states, and the right cache."""
    result = kwargs | {"output_hidden_states": True, "logits_to_keep": 0, "return_dict": True}
    if frozen_cache is not None and not frozen_cache.shared:
        result["past_key_values"] = frozen_cache.frozen
    if "inputs_embeds" in kwargs and kwargs.get("input_ids") is None:
        result.pop("input_ids", None)
    return result


def plan_from(router, out, kwargs: dict, frozen_cache: FrozenCache | None):
    """The plan of this call's tokens; moves the running context in `frozen_cache` on."""
    entropy = tsallis_entropy(out.logits, router.config.q)
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        mask = torch.ones(entropy.shape, dtype=torch.long, device=entropy.device)
    hidden = out.hidden_states[router.config.feature_layer]
    mask = mask[:, -entropy.shape[1] :]
    tokens = FrozenTokens(hidden, entropy, mask, kwargs.get("input_ids"))
    plan, carry = router.plan(tokens, frozen_cache and frozen_cache.carry)
    if frozen_cache is not None:
        frozen_cache.carry = carry
    return plan


def requested_output(out, kwargs: dict, labels, model):
    """The frozen pass's output in the form that the caller asked for."""
    keep = kwargs.get("logits_to_keep", 0)
    if labels is not None:
        vocab_size = out.logits.shape[-1]
        out.loss = model.loss_function(logits=out.logits, labels=labels, vocab_size=vocab_size)
    if isinstance(keep, torch.Tensor):
        out.logits = out.logits[:, keep]
    elif keep:
        out.logits = out.logits[:, -keep:]
    if not kwargs.get("output_hidden_states"):
        out.hidden_states = None
    return out.to_tuple() if kwargs.get("return_dict") is False else out


class FrozenCache:
    """The frozen model's KV cache beside the adapted one's, and the gate's running context.

    Both models share the caller's cache as long as they agree on every token so far.
    """

    def __init__(self, past):
        self.carry = None
        croppable = bool(getattr(past, "is_croppable", False))
        self.shared = croppable and not any(past.is_sliding or [False])
        self.frozen = None if self.shared else copy.deepcopy(past)
        for name in REARRANGE:  # both caches must follow
            inner = getattr(past, name)

            def both(index, inner=inner, name=name):
                inner(index)
                self.rearrange(name, index)

            setattr(past, name, both)

    def rearrange(self, name: str, index) -> None:
        """Do to the frozen cache and the context what the caller did to its cache."""
        if self.frozen is not None:
            getattr(self.frozen, name)(index)
        if name == "batch_repeat_interleave":
            self.carry = map_tensors(self.carry, lambda c: c.repeat_interleave(index, 0))
        else:
            self.carry = map_tensors(self.carry, lambda c: c[index.to(c.device)])

    def split(self, past, new_tokens: int) -> None:
        """The models differ from now on: keep a frozen copy, crop the new tokens off `past`."""
        names = ("alter_frozen_cache", *REARRANGE)
        attributes = {k: past.__dict__.pop(k) for k in names if k in past.__dict__}
        self.frozen = copy.deepcopy(past)
        past.__dict__.update(attributes)
        past.crop(-new_tokens)
        self.shared = False


def map_tensors(nested, f):
    """`f` of every tensor in nested tuples; None stays None."""
    if isinstance(nested, tuple):
        return tuple(map_tensors(part, f) for part in nested)
    return None if nested is None else f(nested)
