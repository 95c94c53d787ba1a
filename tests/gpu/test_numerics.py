"""Two-rule tolerance of bf16 kernels against float64 truth, over seeds, lengths, head dims and patterns."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cases import complaints, harmed_by_padding, make_case, run, unselected_gradient

LENGTHS = {4096: range(24), 8192: range(24, 34), 16384: range(34, 40), 32768: range(40, 44)}
# What changes from seed to seed, so that every seed is another mixture.
BLOCKS = (0.0, 0.0, 0.02)  # single blocks: the general kernels
GROUPS = ((2, 1), (1, 4), (1, 7), (1, 8))
COLUMNS = (0, 1, 63, 64, 65, 200)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("length", "seed"), [(length, seed) for length, seeds in LENGTHS.items() for seed in seeds])
def test_two_rules(length: int, seed: int, head_dim: int) -> None:
    kv_heads, group = GROUPS[seed % 4] if length < 16384 else (1, 2)
    case = make_case(
        "cuda",
        seed,
        length - 37 * (seed % 5),
        head_dim,
        kv_heads=kv_heads,
        group=group,
        block=(128, 64)[seed % 2],
        columns=COLUMNS[seed % 6],
        diagonals=1 + seed % 7,
        blocks=BLOCKS[seed % 3],
        documents=seed % 4 * 3,
    )
    assert not complaints(case, run(case))


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 128), (torch.bfloat16, 96), (torch.float16, 64)])
@pytest.mark.parametrize("blocks", [0.0, 0.03])
def test_other_dtypes_and_head_dims(dtype: torch.dtype, head_dim: int, blocks: float) -> None:
    case = make_case("cuda", 7, 3000, head_dim, blocks=blocks, documents=3, dtype=dtype)
    assert not complaints(case, run(case))


@pytest.mark.parametrize("blocks", [0.0, 0.03])
def test_float32(blocks: float) -> None:
    """tf32x3 keeps float32's accuracy: far below one tf32 product's 5e-4."""
    from sparse_kernels.accuracy import dense_by_rows

    case = make_case("cuda", 8, 2500, 128, blocks=blocks, dtype=torch.float32)
    truth = dense_by_rows(case.q, case.k, case.v, case.dout, case.pattern, dtype=torch.float64)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(case), truth, strict=True):
        assert float((a.double() - b).abs().max()) <= 3e-5 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("blocks", [0.0, 0.01])
def test_keys_that_nobody_selects_get_exactly_no_gradient(blocks: float) -> None:
    assert unselected_gradient(make_case("cuda", 9, 5000, 128, kv_heads=2, columns=20, blocks=blocks)) == 0.0


def test_large_logits_stay_finite() -> None:
    case = make_case("cuda", 10, 4096, 128, documents=5)
    case.q = case.q * 30
    found = run(case)
    assert all(bool(torch.isfinite(t).all()) for t in found)


@pytest.mark.parametrize("blocks", [0.0, 0.03])
@pytest.mark.parametrize("documents", [0, 3])
def test_padding_may_hold_nan(documents: int, blocks: float) -> None:
    assert not harmed_by_padding(make_case("cuda", 12, 3000, 128, blocks=blocks, documents=documents))


def test_structured_and_general_kernels_agree() -> None:
    """The same mask as diagonals and as a table of blocks: two implementations, one answer."""
    from tests.patterns import as_blocks

    case = make_case("cuda", 11, 4000, 128, kv_heads=2, documents=4)
    structured = run(case)
    case.pattern = as_blocks(case.pattern)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), run(case), structured, strict=True):
        error = float((a.double() - b.double()).abs().max())
        # Both are roundings of sums in float32: out and gradients may differ by one last place of bf16.
        assert error <= (1e-5 if name == "lse" else 2**-7) * max(1.0, float(b.abs().max())), f"{name}: {error}"
