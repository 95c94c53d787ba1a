"""Launches of the scoring kernels; what they compute is said in `sparse_kernels.gpu.score`."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.bits import upload
from sparse_kernels.gpu import interpreter_fault, interpreting

LOG2E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Probe rows and keys of a program; head_dim columns that full-precision products take at a time. tests/triton_compile holds
# these shapes against register spills.
ROWS = KEYS = 64
FULL_PRECISION_COLUMNS = 32
WARPS, STAGES = 8, 2


def unusable(device: torch.device, dtype: torch.dtype, head_dim: int, block: int) -> str | None:
    """None if the kernels can score such inputs here, else the reason they cannot. Never imports Triton."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"they need CUDA tensors, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and (fault := interpreter_fault()):
        return fault
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the compute capability is below 8.0"
    if dtype not in DTYPES:
        return f"{dtype} is not bfloat16, float16 or float32"
    if block < 16 or block & (block - 1):
        return f"block {block} is not a power of two from 16 on"
    if head_dim > 256:
        return f"head_dim {head_dim} is above 256"
    return None


@dataclass(frozen=True, eq=False)
class ProbeScorer:
    """Scores the key blocks held here by some probe rows.

    Args:
        q: [B, R, H, D] the probe rows, window after window, each from its last row backwards.
        k: [B, n, K, D] the keys of whole blocks (the last one may be cut short), H a multiple of K.
        first_key, last_key: int32 [B, R]: a probe row sees the keys at first_key .. last_key (global positions).
        block_ids: int32 [n / b] global ids of the key blocks.
        sizes: rows of each window; they sum to R.
        block: b.
        scale: of the scores.
    """

    q: Tensor
    k: Tensor
    first_key: Tensor
    last_key: Tensor
    block_ids: Tensor
    sizes: tuple[int, ...]
    block: int
    scale: float

    @property
    def width(self) -> int:
        """b + sum over windows of (b + m - 1), numbers per key block."""
        return self.block + sum(self.block + m - 1 for m in self.sizes)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(maxima, sums), float32 [B, H, tiles, R]: per tile of keys each row's largest score in base 2 (-inf: it sees none of
        them) and its sum of 2^(score - that)."""
        from sparse_kernels.gpu import score

        batch, rows, heads, _ = self.q.shape
        tiles, row_tile = self._tiles, _power(rows)
        maxima, sums = (
            torch.empty(batch, heads, tiles, rows, dtype=torch.float32, device=self.q.device) for _ in range(2)
        )
        grid = (tiles, batch * heads, -(-rows // row_tile))
        start(score.statistics_kernel, grid, maxima=maxima, sums=sums, BM=row_tile, **self._shared())
        return maxima, sums

    def scores(self, peak: Tensor, factor: Tensor, per: int) -> Tensor:
        """Fixed-point scores of each key block, int64 [B, H / per, n / b, width].

        The first b of the last dimension are column scores. Then come b + m - 1 of each window: slot t of block J belongs to the
        distance e - (J * b + t), e being the window's last row; neighbouring blocks overlap by m - 1 slots, to be added.

        Args:
            peak: float32 [B, H, R], what is subtracted from a row's scores (base 2).
            factor: float32 [B, H, R]: 2^(score - peak) times this is cut to an integer, and added over rows.
            per: add so many neighbouring heads.
        """
        from sparse_kernels.gpu import score

        batch, rows, heads, _ = self.q.shape
        windows = self._windows()
        blocks = self.block_ids.numel()
        out = torch.zeros(batch, heads // per, blocks, self.width, dtype=torch.int64, device=self.q.device)
        start(
            score.scores_kernel, (self._tiles, batch * heads, len(windows)),
            peak=peak.contiguous(), factor=factor.contiguous(), out=out,
            windows=upload(torch.tensor(windows, dtype=torch.int32), self.q.device), num_blocks=blocks,
            width=self.width, PER=per, BM=_power(max(size for _, size, _ in windows)), **self._shared(),
        )  # fmt: skip
        return out

    @property
    def _tiles(self) -> int:
        return self.block_ids.numel() * (self.block // min(self.block, KEYS))

    def _windows(self) -> list[tuple[int, int, int]]:
        """(first row, rows, place in ``width``) of each window, those above `ROWS` rows in pieces: row r of a window lies r slots
        further, so a piece is a window that begins so much later."""
        pieces, row, place = [], 0, self.block
        for m in self.sizes:
            pieces += [(row + low, min(ROWS, m - low), place + low) for low in range(0, m, ROWS)]
            row, place = row + m, place + self.block + m - 1
        return pieces

    def _shared(self) -> dict[str, Any]:
        q, k = self.q, self.k
        padded = max(16, 1 << (q.shape[3] - 1).bit_length())
        full = q.dtype == torch.float32
        return {
            "q": q, "k": k, "first_key": self.first_key, "last_key": self.last_key, "block_ids": self.block_ids,
            "num_heads": q.shape[2], "num_rows": q.shape[1], "key_rows": k.shape[1], "scale2": self.scale * LOG2E,
            "q_batch": q.stride(0), "q_row": q.stride(1), "q_head": q.stride(2),
            "k_batch": k.stride(0), "k_row": k.stride(1), "k_head": k.stride(2),
            "G": q.shape[2] // k.shape[2], "D": q.shape[3], "DP": padded,
            "BD": min(padded, FULL_PRECISION_COLUMNS) if full else min(padded, 128),
            "PB": self.block, "BN": min(self.block, KEYS),
            # The interpreter multiplies the bits of bfloat16 as integers.
            "UPCAST": q.device.type == "cpu" and q.dtype == torch.bfloat16,
            "PRECISION": "tf32x3" if full else "tf32",
            "num_warps": WARPS, "num_stages": STAGES,
        }  # fmt: skip


def _power(rows: int) -> int:
    """Rows of a program for so many rows: the next power of two, from 16 (the least of a tensor-core product) to `ROWS`."""
    return min(ROWS, max(16, 1 << (rows - 1).bit_length()))


def start(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
    """Launch a kernel on the device of its tensors."""
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    on_device: AbstractContextManager[Any] = nullcontext()
    if tensor.device.type == "cuda":
        on_device = torch.cuda.device(tensor.device)
    with on_device:
        kernel[grid](**arguments)
