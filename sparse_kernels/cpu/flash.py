"""Unstructured attention on small dense tensors: torch's CPU flash operator, or the same mathematics in plain torch.

Both halves share one convention: q [N, h, m, D], k and v [N, h, n, D], one floating dtype (float32 or float64), any strides with
a contiguous last dimension; ``mask`` is added to the scaled scores (broadcastable to [N, h, m, n]); ``causal`` aligns query row i
with key row i. The result is out [N, h, m, D] and lse [N, h, m]. The backward takes the *final* out and lse of each row, which
may cover more keys than are given here: the gradients are then exactly the share of these keys (Dao et al., "FlashAttention",
arXiv 2205.14135, section 3.1 and appendix B).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Large enough to vanish against any score and small enough to stay finite: a row whose keys are all masked then gives numbers,
# not NaN, whatever the torch version, and its lse tells it apart (below EMPTY_LSE).
MASKED = -1e30
EMPTY_LSE = -1e29

# The plain path works on this many query rows at a time, so that its scores stay O(n).
PLAIN_ROWS = 128


@cache
def has_flash_operator() -> bool:
    """Does this torch have the CPU flash pair, with the signature we call and the answers we expect?

    The operators are private to torch (``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward), so they are tried
    once on a case with a mask and final statistics of more keys than given, and held against the plain path.
    """
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return False
    q, k, v, dout = torch.linspace(-1, 1, 4 * 2 * 24 * 8, dtype=torch.float64).sin().view(4, 1, 2, 24, 8)
    mask = torch.zeros(1, 1, 1, 24, dtype=torch.float64)
    mask[..., 20:] = MASKED
    mask = mask.expand(1, 1, 24, 24)
    try:
        out, lse = plain_forward(q, k, v, mask, False, 0.3)
        wanted = (out, lse, *plain_backward(dout, q, k, v, out, lse + 0.5, mask, False, 0.3))
        found = (
            *_operator_forward(q, k, v, mask, False, 0.3),
            *_operator_backward(dout, q, k, v, out, lse + 0.5, mask, False, 0.3),
        )
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return False
    return all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(wanted, found, strict=True))


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [N, h, m, D], lse [N, h, m]); see the module docstring."""
    call = _operator_forward if has_flash_operator() else plain_forward
    return call(q, k, v, mask, causal, scale)


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for final out and lse; a row with lse = +inf takes no part. See the module docstring."""
    call = _operator_backward if has_flash_operator() else plain_backward
    return call(dout, q, k, v, out, lse, mask, causal, scale)


def fold(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_states` for one layout, out [..., D] and lse [...], with one pass over out: the share of the new part is a sigmoid.

    lse = -inf marks an empty side. Where both are empty, any share of 0 and 0 is 0.
    """
    share = torch.sigmoid((new_lse - lse).nan_to_num_())
    return torch.lerp(out, new, share[..., None]), torch.logaddexp(lse, new_lse)


def _operator_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _operator_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return dq, dk, dv


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_forward` in plain torch, in strips of `PLAIN_ROWS` queries."""
    outs, sums = [], []
    for low in range(0, q.shape[2], PLAIN_ROWS):
        scores, seen = _scores(q, k, mask, causal, scale, low)
        lse = torch.logsumexp(scores, -1)
        outs.append(scores.sub_(lse[..., None]).exp_() @ v[:, :, :seen])
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_backward` in plain torch, in strips of `PLAIN_ROWS` queries: dS = P * (dP - rowsum(dout * out))."""
    dk, dv = torch.zeros(k.shape, dtype=k.dtype), torch.zeros(v.shape, dtype=v.dtype)
    dqs = []
    for low in range(0, q.shape[2], PLAIN_ROWS):
        rows = slice(low, low + PLAIN_ROWS)
        scores, seen = _scores(q, k, mask, causal, scale, low)
        probs = scores.sub_(lse[:, :, rows, None]).exp_()
        delta = (dout[:, :, rows] * out[:, :, rows]).sum(-1, keepdim=True)
        dv[:, :, :seen] += probs.transpose(2, 3) @ dout[:, :, rows]
        dscores = (dout[:, :, rows] @ v[:, :, :seen].transpose(2, 3)).sub_(delta).mul_(probs).mul_(scale)
        dqs.append(dscores @ k[:, :, :seen])
        dk[:, :, :seen] += dscores.transpose(2, 3) @ q[:, :, rows]
    return torch.cat(dqs, 2), dk, dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, low: int) -> tuple[Tensor, int]:
    """Masked scores of one strip of queries and how many leading keys it can see at all."""
    high = min(low + PLAIN_ROWS, q.shape[2])
    seen = min(high, k.shape[2]) if causal else k.shape[2]
    scores = (q[:, :, low:high] @ k[:, :, :seen].transpose(2, 3)).mul_(scale)
    if causal:
        future = torch.arange(seen) > torch.arange(low, high)[:, None]
        scores.masked_fill_(future, MASKED)
    if mask is not None:
        scores += mask[..., low:high, :seen]
    return scores, seen
