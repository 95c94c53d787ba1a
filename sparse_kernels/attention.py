"""`sparse_attention`: one process, the whole sequence, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.ops import attention, flatten
from sparse_kernels.pattern import SparsePattern, check_doc_start


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparsePattern,
    *,
    doc_start: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention restricted to a `SparsePattern`; differentiable in q, k and v.

    Args:
        q: [B, S, H, D] in float32, bfloat16, float16 or float64.
        k, v: [B, S, K, D], H a multiple of K.
        pattern: which keys each query may see; its batch, heads and seq_len must be those of q.
        doc_start: int64 [B, S], first position of each query's document; None: one document.
        scale: of the scores, above 0; default D^-0.5.
        backend: "auto", or a name of `backends()`.
        return_lse: also return lse [B, H, S], natural log, float32 (no gradient flows through it).

    Returns:
        out [B, S, H, D] in the dtype of q, or (out, lse).

    Autocast has no say here: the inputs keep their dtype and the scores are accumulated in float32. Gradients of gradients are
    refused.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    check_shapes(q, k, v, pattern)
    check_scale(scale)
    check_doc_start(doc_start, pattern)
    if doc_start is not None and doc_start.device != q.device:
        raise ValueError(f"doc_start is on {doc_start.device} and q on {q.device}; use doc_start.to({str(q.device)!r})")
    index, sizes = flatten(pattern, doc_start)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    missing = pattern.num_blocks * pattern.block - pattern.seq_len
    if missing:
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing)) for t in (q, k, v))
    out, lse, _ = attention(q, k, v, index, sizes, scale, backend)
    out = out[:, : pattern.seq_len]
    return (out, lse[:, :, : pattern.seq_len]) if return_lse else out


def check_shapes(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern) -> None:
    """ValueError unless q, k, v are the whole sequence of the pattern."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; each must be [B, S, heads, D] (a batch of one is q[None])"
        )
    batch, length, heads, head_dim = q.shape
    if (batch, length, heads) != (pattern.batch, pattern.seq_len, pattern.heads):
        raise ValueError(
            f"q is [batch {batch}, tokens {length}, heads {heads}] but the pattern was made for [batch {pattern.batch}, "
            f"tokens {pattern.seq_len}, heads {pattern.heads}]; q, k, v are [B, S, heads, D]"
        )
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != head_dim or heads % k.shape[2]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be [{batch}, {length}, num_kv_heads, {head_dim}] with "
            f"num_kv_heads dividing {heads}"
        )
    if len({t.dtype for t in (q, k, v)}) > 1 or len({t.device for t in (q, k, v)}) > 1:
        kinds = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{kinds}; all three must have one dtype and be on one device (use .to(q))")


def check_scale(scale: float | None) -> None:
    """ValueError unless the scale is None or above 0: at 0 and below, dense kernels turn a causal mask of -inf into NaN."""
    if scale is not None and not scale > 0:
        raise ValueError(
            f"scale multiplies the attention scores and must be above 0, got {scale}; leave it out for D^-0.5"
        )
