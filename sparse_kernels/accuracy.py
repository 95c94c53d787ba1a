"""How close is close enough? The truth in float64 for sequences whose mask does not fit in memory, and the two rules for bf16.

Rules: FlashAttention's tests compare the largest error with that of a plain low-precision run
(https://github.com/Dao-AILab/flash-attention), PyTorch's flex_attention tests the mean error (https://github.com/pytorch/pytorch);
either alone can be passed by a kernel that the other one catches, so both must hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.pattern import SparsePattern, pad_doc_start
from sparse_kernels.view import ShardView

MAX_RATIO, MAX_RATIO_GRADIENT, MEAN_RATIO = 2.0, 3.0, 1.2
# Where the plain run happens to be exact, errors of this share of the largest value still pass.
FLOOR = 1e-6


def dense_by_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    pattern: SparsePattern,
    *,
    dtype: torch.dtype,
    doc_start: Tensor | None = None,
    scale: float | None = None,
    blocks_at_once: int = 4,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain masked attention in ``dtype`` with all its gradients, some query blocks at a time: memory O(S), not O(S^2).

    Every operation is done in ``dtype`` and rounded to it, as an ordinary model without a kernel would do; only the sums of dk and
    dv over the pieces are kept in float64.

    Args:
        q, dout: [B, S, H, D]. k, v: [B, S, K, D].
        doc_start: int64 [B, S] or None.

    Returns:
        out [B, S, H, D], lse [B, H, S], dq, dk, dv, float64.
    """
    size, block, group = pattern.seq_len, pattern.block, q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = pad_doc_start(doc_start, pattern)
    every = torch.arange(pattern.num_blocks)
    out, dq = (torch.empty_like(q, dtype=torch.float64) for _ in range(2))
    dk, dv = (torch.zeros_like(k, dtype=torch.float64) for _ in range(2))
    lse = torch.empty(q.shape[0], q.shape[2], size, dtype=torch.float64, device=q.device)
    for first in range(0, pattern.num_blocks, blocks_at_once):
        blocks = every[first : first + blocks_at_once]
        low, high = first * block, min((first + len(blocks)) * block, size)
        own = None if starts is None else starts[:, first * block : (first + len(blocks)) * block]
        keys = every[: first + len(blocks)]  # later keys are in the future
        view = ShardView(pattern, blocks, k_blocks=keys, inline_columns=True, doc_start=own)
        mask = view.mask()[:, :, : high - low, :high]
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q[:, low:high], k[:, :high], v[:, :high])]
        spread = [leaves[0], *(t.repeat_interleave(group, 2) for t in leaves[1:])]
        scores = torch.einsum("bqhd,bkhd->bhqk", spread[0], spread[1]) * scale
        scores = scores.masked_fill(~mask, -torch.inf)
        part = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), spread[2])
        gradients = torch.autograd.grad(part, leaves, dout[:, low:high].to(dtype))
        out[:, low:high], dq[:, low:high] = part.detach().double(), gradients[0].double()
        lse[:, :, low:high] = torch.logsumexp(scores.detach().double(), -1)
        dk[:, :high] += gradients[1].double()
        dv[:, :high] += gradients[2].double()
    return out, lse, dq, dk, dv


def two_rules(found: Tensor, truth: Tensor, plain: Tensor, *, gradient: bool) -> str | None:
    """None if ``found`` is as close to the truth as low precision allows, else what is wrong.

    The largest error may be 2 x (gradients 3 x) and the mean error 1.2 x that of ``plain``, a run of ordinary operations in the
    same low precision on the same mask.
    """
    found = found.detach()
    error, allowed = (found.double() - truth).abs(), (plain.to(found.dtype).double() - truth).abs()
    if not bool(torch.isfinite(found).all()):
        return "it holds NaN or infinity"
    floor = FLOOR * float(truth.abs().max())
    ratio = MAX_RATIO_GRADIENT if gradient else MAX_RATIO
    worst, limit = float(error.max()), ratio * float(allowed.max()) + floor
    if worst > limit:
        return f"largest error {worst:.3g}, allowed {limit:.3g} ({ratio} x that of plain operations)"
    mean, limit = float(error.mean()), MEAN_RATIO * float(allowed.mean()) + floor
    if mean > limit:
        return f"mean error {mean:.3g}, allowed {limit:.3g} ({MEAN_RATIO} x that of plain operations)"
    return None
