"""Who runs: torch's dense kernels, flash-attn, compiled flex_attention with the equivalent mask, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels import SparsePattern, sparse_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(pattern: SparsePattern) -> Attend:
    """Our kernels, by name: never another backend."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sparse_attention(q, k, v, pattern, backend="triton")
        assert isinstance(out, Tensor)
        return out

    return attend


def dense(device: torch.device) -> dict[str, Attend]:
    """Dense causal kernels that may exist here; each is tried before it is measured."""
    if device.type == "cpu":
        return {"torch SDPA": _sdpa(None)}
    from torch.nn.attention import SDPBackend

    found = {
        "torch SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "torch SDPA cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    }
    try:
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda q, k, v: flash_attn_func(q, k, v, causal=True)
    except ImportError:
        pass
    try:
        from flash_attn_interface import flash_attn_func as flash_attn_3

        found["flash-attn 3"] = lambda q, k, v: _first(flash_attn_3(q, k, v, causal=True))
    except ImportError:
        pass
    return found


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _sdpa(kind: object) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        if kind is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    return attend


def flex(pattern: SparsePattern) -> Attend:
    """Compiled flex_attention under the same mask."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = equivalent_mask(pattern)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return attend


def equivalent_mask(pattern: SparsePattern) -> BlockMask:
    """The pattern as a block mask of flex_attention. That knows no single columns: a block with one is computed and masked."""
    from torch.nn.attention.flex_attention import BlockMask

    block, number = pattern.block, pattern.num_blocks
    every = torch.arange(number)
    tiles = pattern.block_mask(every, every)
    eye = torch.eye(number, dtype=torch.bool, device=pattern.device)
    assert pattern.columns is not None
    is_column = torch.zeros(1, pattern.heads, pattern.seq_len + 1, dtype=torch.bool, device=pattern.device)
    is_column.scatter_(2, pattern.columns.long(), True)
    is_column = is_column[0, :, : pattern.seq_len].contiguous()
    by_block, past = is_column.unflatten(1, (number, block)), torch.ones_like(eye).tril(-1)
    full = (tiles & ~eye) | (by_block.all(2)[None, :, None] & past)
    partial = eye | (by_block.any(2)[None, :, None] & past & ~full)
    offsets = pattern.offset_table()[0].contiguous()

    def mask(_b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = offsets[h, (i // block - j // block).clamp(min=0)]
        return (j <= i) & (near | is_column[h, j])

    lists = [x for chosen in (partial, full) for x in _ordered(chosen)]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=mask)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, indices) of a bool [.., rows, n]: the chosen ones first, ascending."""
    return chosen.sum(-1).int(), chosen.int().argsort(dim=-1, descending=True, stable=True).int()
