"""`attach`: sparse ring attention for any supported Hugging Face causal language model, in anybody's training loop."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mtrain.comm import Ring
from mtrain.errors import ModelError
from mtrain.layout import RingLayout
from mtrain.models.context import RingContext
from mtrain.models.hf_attention import KEYWORD, NAME, NO_MASK
from mtrain.models.refuse import refuse
from mtrain.models.rope import check_rope
from mtrain.recipe.schema import AttentionRecipe

__all__ = ["RingContext", "attach", "detach"]


def attach(model: PreTrainedModel, attention: AttentionRecipe, ring: Ring, layout: RingLayout) -> PreTrainedModel:
    """Give every attention layer of a model sparse ring attention.

    Call it before DDP, FSDP or accelerator.prepare wrap the model. Each rank then calls the model with its own shard,
    ``layout.shard(tokens, ring.rank, dim=1)``, and labels that were shifted before sharding. ``position_ids`` are
    filled in from the layout. Packed documents are given as ``doc_start=`` (int64 [B, local_len], this rank's shard).
    Alone (ring of one) the model also takes any other length, left-padded batches, and ``generate``; decoding steps are
    dense and exact.

    Args:
        model: a causal language model of a supported family, from `mtrain.models.build.load_model` or transformers
            itself.
        attention: pattern, budget, schedule, backend.
        ring: the ranks that share one sequence.
        layout: who owns which tokens; its block is the recipe's.

    Returns:
        The same model; ``model.mtrain_context`` is its `RingContext`. Attaching again replaces the earlier attachment.

    Raises:
        ModelError: a model whose layers do more than the pattern models, or a layout that fits neither ring nor recipe.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"attach needs the transformers model itself, not {type(model).__name__}: attach first, wrap afterwards"
        )
    refuse(model.config, ring.world_size)
    if layout.ranks != ring.world_size or layout.block != attention.block:
        raise ModelError(
            f"the layout is for {layout.ranks} ranks in blocks of {layout.block} tokens, but the ring has "
            f"{ring.world_size} ranks and the recipe blocks of {attention.block}"
        )
    check_rope(model)
    detach(model)
    own_config(model)
    model.set_attn_implementation(NAME)
    context = RingContext(attention, ring, layout, int(model.config.num_hidden_layers))
    decoder: Any = model.base_model
    hooks = [decoder.register_forward_pre_hook(_enter, with_kwargs=True)]
    if decoder is not model:
        hooks.append(model.register_forward_pre_hook(_check_labels, with_kwargs=True))
    for module in {model, decoder}:
        module.mtrain_context = context
    model.mtrain_hooks = hooks  # type: ignore[assignment]
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`: plain dense attention of transformers again. A model that is not attached is left as it is."""
    if hasattr(model, "mtrain_context"):
        for hook in model.mtrain_hooks:  # type: ignore[union-attr]
            hook.remove()
        for module in {model, model.base_model}:
            del module.mtrain_context
        del model.mtrain_hooks
        model.set_attn_implementation("sdpa")
    return model


@contextlib.contextmanager
def borrowed(model: PreTrainedModel, context: RingContext) -> Iterator[None]:
    """Inside it, forwards of an attached model belong to another context (its pattern, layout, kept estimates, statistics).

    For an evaluation in the middle of a training: the model's own context does not notice. A backward pass or a recompute of
    these forwards may come later, as each micro-batch knows its context.
    """
    modules, own = {model, model.base_model}, model.mtrain_context
    try:
        for module in modules:
            module.mtrain_context = context  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            module.mtrain_context = own


def own_config(model: PreTrainedModel) -> None:
    """A config of the model's own: two models built from one config object would switch attention together."""
    copies: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
            module.config = copies[id(config)]  # type: ignore[assignment]


def _enter(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the decoder: begins the micro-batch and completes the arguments."""
    context: RingContext = decoder.mtrain_context
    call = dict(kwargs)
    if args:
        call.update(zip(inspect.signature(decoder.forward).parameters, args, strict=False))
    tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if tokens is None:
        return args, kwargs  # transformers says what is missing
    batch, length = tokens.shape[:2]
    alone = context.ring.world_size == 1
    _check_cache(call, alone)
    if call.get("use_cache") is None and (decoder.training or not alone):
        call["use_cache"] = False  # the default of most configs, True, would copy every key and value
    doc_start = call.pop("doc_start", None)
    if call.get("attention_mask") is not None and _is_whole(call, length):
        padded = _documents_of(call.pop("attention_mask"), length, alone)
        if padded is not None and doc_start is not None:
            raise ModelError("give either a padding mask or doc_start, not both: doc_start can express left padding")
        doc_start = padded if doc_start is None else doc_start
    if _is_whole(call, length):
        call[KEYWORD] = context.take(batch, length, doc_start, decoder.training)
        call["attention_mask"] = NO_MASK
        _fill_positions(call, context, length, tokens.device, decoder.training)
    else:
        call[KEYWORD] = context.latest
    return (), call


def _check_labels(model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the whole model: a shard cannot shift its labels, the next token may be on another rank."""
    sharded = model.mtrain_context.ring.world_size > 1
    if sharded and kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ModelError(
            "labels= are shifted inside the model, which is wrong on a shard: shift the labels of the whole row, "
            "shard them like the tokens, and pass shift_labels= (see mtrain.models.loss.install_loss_head)"
        )


def _check_cache(call: dict[str, Any], alone: bool) -> None:
    if not alone and (call.get("use_cache") or call.get("past_key_values") is not None):
        raise ModelError(
            "a key-value cache (use_cache, past_key_values, generate) needs the whole sequence on one rank: attach "
            "the model to a ring of one"
        )


def _is_whole(call: dict[str, Any], length: int) -> bool:
    """Is this forward a whole sequence, rather than tokens that continue a key-value cache?"""
    cache = call.get("past_key_values")
    return cache is None or cache.get_mask_sizes(length, 0)[0] == length


def _documents_of(mask: Tensor, length: int, alone: bool) -> Tensor | None:
    """A 2-D padding mask as document starts, int64 [B, length]; None when nothing is masked.

    Left padding is a document of its own before the text. Right padding needs nothing: causality hides it from the
    text.
    """
    if mask.dim() != 2 or mask.shape[1] != length:
        raise ModelError(
            f"an attention mask of shape {tuple(mask.shape)} is not modelled by the pattern; give documents as "
            f"doc_start, padding as [B, {length}]"
        )
    keep = mask.bool()
    if bool(keep.all()):
        return None
    if not alone:
        raise ModelError(
            "padding masks are not sharded: leave attention_mask out; the layout pads the end of the sequence itself"
        )
    position = torch.arange(length, device=mask.device)
    first = torch.where(keep, position, length).amin(1, keepdim=True)
    last = torch.where(keep, position, -1).amax(1, keepdim=True)
    if not bool((keep == ((position >= first) & (position <= last))).all()):
        raise ModelError(
            "an attention mask with holes is not modelled by the pattern; only padding at the left or right end is"
        )
    return torch.where(position >= first, first, position)


def _fill_positions(
    call: dict[str, Any], context: RingContext, length: int, device: torch.device, training: bool
) -> None:
    """position_ids [1, length]: those given, or the layout's."""
    micro, given = call[KEYWORD], call.get("position_ids")
    if given is None:
        call["position_ids"] = context.positions(micro.layout, device)[None, :length]
    elif training and micro.doc_start is None:
        context.check_positions(micro.layout, given)
