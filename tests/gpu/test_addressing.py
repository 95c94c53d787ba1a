"""Offsets beyond 2^31 numbers: rows of 4096 numbers reach them at exactly 524,288 tokens."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import SparsePattern
from sparse_kernels.accuracy import dense_by_rows
from tests.gpu.cases import Case, far_apart, make_case, run

GIB = 1 << 30


def need_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory, there are {free // GIB}")


@pytest.mark.parametrize("blocks", [0.0, 0.03])
def test_a_view_with_the_strides_of_half_a_million_tokens(blocks: float) -> None:
    """Every 129th row of 4096 numbers: the last row begins behind number 2^31."""
    need_memory(12)
    case = make_case("cuda", 2, 4096, 128, kv_heads=2, group=4, columns=200, blocks=blocks)
    wanted = run(case)
    far = far_apart(case, 129 * 4096)
    assert 4095 * 129 * 4096 > 2**31
    assert all(torch.equal(a, b) for a, b in zip(run(far), wanted, strict=True))


def test_half_a_million_tokens_of_4096_numbers() -> None:
    """The real size with a narrow band; the first and the last rows are compared with a short sequence that sees the same keys."""
    need_memory(70)
    size, heads, block = 524_288 + 256, 32, 128
    generator = torch.Generator("cuda").manual_seed(3)
    q, dout = (
        torch.randn(1, size, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2)
    )
    k, v = (torch.randn(1, size, 4, 128, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2))
    diagonals = torch.tensor([0, 1], dtype=torch.int32, device="cuda").expand(1, heads, 2).contiguous()
    columns = torch.arange(5, dtype=torch.int32, device="cuda").expand(1, heads, 5).contiguous()
    found = run(Case(q, k, v, dout, SparsePattern(size, block, columns, diagonals)))
    # The last three blocks see themselves and five sinks; the block before them gives the first of the three its neighbour.
    rows = torch.cat([torch.arange(block), torch.arange(size - 4 * block, size)]).cuda()
    short = SparsePattern(len(rows), block, columns, diagonals)
    parts = [t[:, rows].contiguous() for t in (q, k, v, dout)]
    truth = dense_by_rows(*parts, short, dtype=torch.float64)
    tail = slice(2 * block, None)  # block 1 of the short sequence has another neighbour than in the long one
    for at in (0, 2):  # out and dq
        error = (found[at][:, rows][:, tail].double() - truth[at][:, tail]).abs().max()
        assert float(error) <= 2e-2
    last = slice(3 * block, None)  # keys whose queries are all here
    for at in (3, 4):  # dk and dv
        error = (found[at][:, rows][:, last].double() - truth[at][:, last]).abs().max()
        assert float(error) <= 6e-2 * max(1.0, float(truth[at].abs().max()))
