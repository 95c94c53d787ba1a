"""The launches of a small problem, recorded instead of run: what the compile tests and the kernel report compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from sparse_kernels.gpu import index, launch
from sparse_kernels.gpu.config import generation
from sparse_kernels.gpu.resources import SHARED_LIMIT, Resources, arguments_of, measure
from sparse_kernels.pattern import SparsePattern
from sparse_kernels.view import ShardView


@dataclass(frozen=True)
class Recorded:
    """One launch of a kernel: its arguments by name, launch options included."""

    kernel: Any
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.fn.__name__)

    @property
    def tile(self) -> str:
        """Tile, warps and stages, for tables."""
        a = self.arguments
        shape = "x".join(str(a[side]) for side in ("BM", "BN") if side in a)
        return f"{shape} w{a.get('num_warps', 4)} s{a.get('num_stages', 3)}"

    def measure(self, capability: int) -> Resources:
        """Compile it for a target."""
        options = self.arguments.get("num_warps", 4), self.arguments.get("num_stages", 3)
        return measure(self.kernel, capability, arguments_of(self.kernel, self.arguments), *options)


def structured_launches(
    capability: int, head_dim: int, dtype: torch.dtype, block: int, *, documents: bool = False, listed: bool = False
) -> Iterator[Recorded]:
    """Forward and backward of a view with diagonals and columns, 8 query and 2 key-value heads, with a carried state.

    With documents, the end of the sequence cuts the last block too: the variant with the most in it.
    """
    found: list[Recorded] = []
    size = 4 * block
    every = torch.arange(4)
    keys = every[torch.tensor([2, 0, 3, 1])] if listed else every
    columns = torch.arange(32, dtype=torch.int32).expand(1, 8, 32).contiguous()
    diagonals = torch.arange(2, dtype=torch.int32).expand(1, 8, 2).contiguous()
    doc_start = torch.zeros(1, size, dtype=torch.int64) if documents else None
    view = ShardView(
        SparsePattern(size - 5 * documents, block, columns, diagonals),
        every,
        keys,
        inline_columns=True,
        doc_start=doc_start,
    )
    q, k = (torch.zeros(1, size, heads, head_dim, dtype=dtype) for heads in (8, 2))
    out, lse = torch.zeros(q.shape), torch.zeros(1, 8, size)

    def record(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
        found.append(Recorded(kernel, {**arguments, "UPCAST": False}))

    with (
        mock.patch.object(launch, "start", record),
        mock.patch.object(index, "start", record),
        mock.patch.object(launch, "generation_of", lambda _: generation(capability // 10, SHARED_LIMIT[capability])),
    ):
        launch.forward(q, k, k, view, 1.0, (out, lse))
        launch.backward(q, q, k, k, out, lse, view, 1.0)
    seen = set()
    for launched in found:
        if launched.name not in seen:
            seen.add(launched.name)
            yield launched
