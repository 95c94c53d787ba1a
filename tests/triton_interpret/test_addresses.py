"""No kernel looks outside the tensors that it was given, not even at what it then does not use: on a GPU that is a crash.

Loops read list entries and column states a step ahead, so a wrong bound would show in no result.
"""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from sparse_kernels import ShardView
from sparse_kernels.gpu import general, launch
from sparse_kernels.gpu import index as index_module
from sparse_kernels.gpu.config import Tile
from tests.sparse_kernels.cpu_cases import Case, make_case


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels launched so far; a load or store of an address in none of a kernel's tensors raises."""
    builder, executor, launched = interpreter.InterpreterBuilder, interpreter.GridExecutor, []
    held: list[tuple[int, int]] = []
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def look(pointers: Any, mask: Any) -> None:
        address = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape) != 0].astype(numpy.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = numpy.zeros(address.shape, bool)
        for first, end in held:
            inside |= (address >= first) & (address + size <= end)
        assert inside.all(), f"{launched[-1]} looks outside its tensors"

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        look(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def watched_run(self: Any, *arguments: Any, **named: Any) -> None:
        launched.append(self.fn.__name__)
        held[:] = [extent(x) for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.numel()]
        run(self, *arguments, **named)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(executor, "__call__", watched_run)
    return launched


def extent(x: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


# No columns; one; as many as a tile holds and one more. Every diagonal, so that the last list ends where its tensor does.
OPTIONS = [
    {"full": True},
    {"columns": 1, "diagonals": 2, "documents": 0.05},
    {"columns": 16, "blocks": True, "documents": 0.05},
    {"columns": 17, "blocks": True, "group": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tile", [(16, 32), (32, 16)])
def test_nothing_is_read_or_written_outside(
    options: dict, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch, watched: list[str]
) -> None:
    shape = Tile(*tile, 4, 1)
    monkeypatch.setattr(general, "INTERPRETER_TILE", shape)
    monkeypatch.setattr(launch, "tile_for", lambda *_: shape)
    case = make_case(5, 75, 32, kv_heads=1, head_dim=16, **options)
    number = case.pattern.num_blocks
    every, some, padding = case.every, torch.tensor([number - 1, number + 5, 0]), torch.tensor([number])
    for queries, keys in ((every, every), (some, torch.tensor([1, number, 0])), (padding, every)):
        pattern, doc_start = case.pattern.for_queries(queries), starts(case, queries)
        view = ShardView(pattern, queries, keys, inline_columns=True, doc_start=doc_start)
        run(case, view, general if "blocks" in options else launch)
    assert {"forward_kernel", "dq_kernel", "dkdv_kernel"} <= set(watched)
    assert ("column_kernel" in watched) == ("columns" in options)


def starts(case: Case, blocks: Tensor) -> Tensor | None:
    """Document starts of some query blocks; padding takes those of the last block."""
    if case.doc_start is None:
        return None
    return case.doc_start.unflatten(1, (-1, 32))[:, blocks.clamp(max=case.pattern.num_blocks - 1)].flatten(1)


def run(case: Case, view: ShardView, kernels: Any) -> None:
    assert view.k_blocks is not None
    shapes = [(view.q_blocks, case.q), (view.k_blocks, case.k), (view.k_blocks, case.v), (view.q_blocks, case.dout)]
    q, k, v, dout = (torch.randn(x.shape[0], len(ids) * 32, *x.shape[2:]) for ids, x in shapes)
    out, lse = kernels.forward(q, k, v, view, case.scale, None)
    kernels.backward(dout, q, k, v, out, lse, view, case.scale)


def test_the_watch_sees_a_list_that_is_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it blind, the test above could not fail."""
    case = make_case(1, 64, 32, head_dim=16, columns=4)
    start = index_module.start

    def shortened(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
        if "positions" in arguments:
            arguments["positions"] = arguments["positions"].flatten()[:1].clone()
        start(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "start", shortened)
    with pytest.raises(interpreter.InterpreterError, match="forward_kernel looks outside its tensors"):
        launch.forward(case.q.float(), case.k.float(), case.v.float(), case.whole(), case.scale, None)
