"""The door to transformers: an attention and a mask function under one name, chosen per model, nothing patched.

transformers calls the attention function of every layer with rotated q, k and v; everything else it needs to know
(whose shards, which documents, which index) arrives in a `MicroBatch` that `attach` sends along as a keyword argument
of the forward. Because the argument is part of the call, activation-checkpoint recompute gets the very same object,
however many micro-batches are in flight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mtrain.errors import ModelError
from mtrain.models.context import MicroBatch
from mtrain.models.refuse import refuse_call

NAME = "mtrain"
KEYWORD = "mtrain_batch"
# Stands for "no mask" in a forward over whole sequences. transformers hands a 4-D mask through as it is; for None it
# would first look for packed documents in position_ids, which waits for the device, and would take the order of a
# layout for documents.
NO_MASK = torch.empty(0, 0, 0, 0)


def sparse_ring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    mtrain_batch: MicroBatch | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One attention layer, in the signature of transformers' `AttentionInterface`.

    Args:
        module: the layer; its ``layer_idx`` picks the pattern.
        query: [B, H, N, D] after RoPE.
        key, value: [B, K, M, D]; M > N when they come from a key-value cache.
        attention_mask: None, or the boolean [B, 1, N, M] that `mask` made for a cache.
        scaling: of the scores; default D^-0.5.
        dropout, sliding_window: what the layer wants; anything but "no" is refused.
        mtrain_batch: put there by `attach`.

    Returns:
        (out [B, N, H, D], None).
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    refuse_call(sliding_window, dropout, layer)
    if mtrain_batch is None:
        raise ModelError(
            f"a model with attn_implementation={NAME!r} runs only after mtrain.models.attach.attach(model, ...)"
        )
    query, key, value = _one_dtype(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        if query.shape[2] != key.shape[2]:
            return _cached_attention(query, key, value, attention_mask, scaling), None
        if attention_mask is not None and attention_mask.numel():
            raise ModelError(
                f"an attention mask of shape {tuple(attention_mask.shape)} is not modelled by the pattern; documents "
                "are given as doc_start (for every token the first position of its document)"
            )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return mtrain_batch.attend(layer, q, k, v, scaling), None


def mask(q_length: int, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of a forward: none for whole sequences (never N x N), the exact boolean one for a key-value cache."""
    if q_length == kv_length:
        return attention_mask
    kwargs["allow_is_causal_skip"] = False
    built = sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    assert isinstance(built, Tensor)
    return built


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three: under autocast q and k leave RoPE in float32, while v has the autocast dtype already."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _cached_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scaling: float | None) -> Tensor:
    """Dense and exact, for decoding: a few queries against a cache. [B, H, N, D] -> [B, N, H, D]."""
    if keep is None:
        raise ModelError(
            f"{query.shape[2]} queries met {key.shape[2]} keys without a mask: a key-value cache works through "
            "model.generate or past_key_values; training passes whole sequences"
        )
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, sparse_ring_attention)
AttentionMaskInterface.register(NAME, mask)
