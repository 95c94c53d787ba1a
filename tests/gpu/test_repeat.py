"""Deterministic means the same bits, 200 times."""

from __future__ import annotations

import pytest

from tests.gpu.cases import differing_runs, make_case


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("blocks", [0.0, 0.02])
def test_two_hundred_runs_give_the_same_bits(head_dim: int, blocks: float) -> None:
    case = make_case(
        "cuda", 1, 8000, head_dim, kv_heads=2, group=4, columns=500, diagonals=8, blocks=blocks, documents=5
    )
    assert differing_runs(case, 200) == 0
