"""The launches of the general kernels on a small problem, recorded instead of run: what tests and the kernel report compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sparse_kernels.gpu import general, general_kernels, lists
from sparse_kernels.gpu.config import generation
from sparse_kernels.gpu.recorded import Recorded
from sparse_kernels.gpu.resources import SHARED_LIMIT
from sparse_kernels.pattern import SparsePattern
from sparse_kernels.view import ShardView


def general_launches(capability: int, head_dim: int, dtype: torch.dtype, block: int) -> Iterator[Recorded]:
    """Lists, forward and backward with all in them: single blocks, columns, documents, carried state, a cut last block; G = 4."""
    found: dict[str, Recorded] = {}

    def recorder(kernel: Any) -> Any:
        class Grid:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*values: Any, **named: Any) -> None:
                    arguments = {**dict(zip(kernel.arg_names, values, strict=False)), **named}
                    arguments.update(
                        {
                            short: arguments[f"BLOCK_{short[1]}"]
                            for short in ("BM", "BN")
                            if f"BLOCK_{short[1]}" in named
                        }
                    )
                    found.setdefault(kernel.fn.__name__, Recorded(kernel, arguments))

                return launch

        return Grid()

    names = [name for name in vars(general_kernels) if name.endswith("_kernel")]
    recorders = SimpleNamespace(**{name: recorder(getattr(general_kernels, name)) for name in names})
    size, every = 4 * block, torch.arange(4)
    columns = torch.arange(32, dtype=torch.int32).expand(1, 8, 32).contiguous()
    pattern = SparsePattern(size - 5, block, columns, blocks=torch.ones(1, 8, 4, 4, dtype=torch.bool))
    documents = torch.zeros(1, size, dtype=torch.int64)
    view = ShardView(pattern, every, k_blocks=every, inline_columns=True, doc_start=documents)
    q, k = (torch.zeros(1, size, heads, head_dim, dtype=dtype) for heads in (8, 2))
    state = torch.zeros(q.shape), torch.zeros(1, 8, size)
    with (
        mock.patch.object(general, "kernels", recorders),
        mock.patch.object(lists, "_fill_kernel", recorder(lists._fill_kernel)),
        mock.patch.object(general, "generation_of", lambda _: generation(capability // 10, SHARED_LIMIT[capability])),
    ):
        general.forward(q, k, k, view, 0.5, state)
        general.backward(q, q, k, k, *state, view, 0.5)
    yield from found.values()
