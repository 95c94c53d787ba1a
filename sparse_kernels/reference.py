"""The truth: dense masked attention in plain torch, and the merge of partial results. Everything else is tested against this."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else accumulates in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention under a boolean mask; differentiable, memory O(S^2).

    Args:
        q: [B, Sq, H, D], any float dtype.
        k, v: [B, Sk, K, D] with H a multiple of K (grouped-query attention: head h reads key-value head h // (H / K)).
        mask: bool, broadcastable to [B, H, Sq, Sk]; True where the query may attend.
        scale: multiplies the scores after the dot product; default D^-0.5.

    Returns:
        out [B, Sq, H, D] in the dtype of q, and lse [B, H, Sq] (natural log, float32; float64 for float64 inputs).
        A row without keys gives out 0, lse -inf and gradients exactly 0.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key-value heads: give a multiple of num_kv_heads"
        )
    acc = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = heads // kv_heads
    keys, values = (t.to(acc).repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(acc), keys) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1, keepdim=True).expand(scores.shape[:-1] + (1,))
    # An empty row gets finite scores first: softmax of nothing but -inf would put NaN into the gradients.
    probs = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), -1).masked_fill(empty[..., 0], -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", probs, values)
    return out.to(q.dtype), lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two softmax-attention results over disjoint key sets.

    The merge of partial softmaxes is the one of ring-flash-attention (https://github.com/zhuzilin/ring-flash-attention) and of
    Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867).

    Args:
        out_a, out_b: [B, S, H, D].
        lse_a, lse_b: [B, H, S]; -inf marks an empty side, which is the identity of the merge.

    Returns:
        (out, lse) in float32 (float64 for float64 inputs).
    """
    acc = accumulation_dtype(out_a.dtype)
    out_a, out_b, lse_a, lse_b = (t.to(acc) for t in (out_a, out_b, lse_a, lse_b))
    high = torch.maximum(lse_a, lse_b)
    safe = high.masked_fill(high == -torch.inf, 0.0)  # both sides empty: exp(-inf - 0) = 0, never NaN
    weight_a, weight_b = torch.exp(lse_a - safe), torch.exp(lse_b - safe)
    total = weight_a + weight_b
    lse = safe + torch.log(total)
    share = (weight_b / total.masked_fill(total == 0, 1.0)).transpose(1, 2)[..., None]
    keep = (weight_a / total.masked_fill(total == 0, 1.0)).transpose(1, 2)[..., None]
    return out_a * keep + out_b * share, lse
