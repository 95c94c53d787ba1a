"""The helpers of the GPU tests and the GPU benchmark, on tiny cases: what cannot run here must not be broken when it first can."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_kernels
from scripts.kernel_bench import cases as bench_cases
from scripts.kernel_bench import contestants
from sparse_kernels import SparsePattern
from sparse_kernels.accuracy import dense_by_rows, two_rules
from tests.gpu.cases import (
    complaints,
    differing_runs,
    far_apart,
    harmed_by_padding,
    make_case,
    run,
    unselected_gradient,
)
from tests.patterns import as_blocks


@pytest.mark.parametrize("blocks", [0.0, 0.4])
def test_the_two_rules_pass_our_kernels_and_catch_others(blocks: float) -> None:
    case = make_case("cpu", 1, 150, 64, block=64, columns=20, diagonals=1, blocks=blocks, documents=2)
    found = run(case)
    assert not complaints(case, found)
    wrong = (found[0], found[1] + 1e-3, found[2] * 1.02, *found[3:])
    assert [c.split(":")[0] for c in complaints(case, wrong)] == ["lse", "dq"]


def test_dense_by_rows_is_reference_attention() -> None:
    from sparse_kernels import reference_attention

    case = make_case("cpu", 2, 150, 16, block=16, columns=20, diagonals=2, blocks=0.2, documents=3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (case.q, case.k, case.v)]
    out, lse = reference_attention(*leaves, case.pattern.to_dense(case.doc_start))
    wanted = (out, lse, *torch.autograd.grad(out, leaves, case.dout))
    arguments = (case.q, case.k, case.v, case.dout, case.pattern)
    found = dense_by_rows(*arguments, dtype=torch.float64, doc_start=case.doc_start, blocks_at_once=3)
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in zip(found, wanted, strict=True))


def test_two_rules_look_at_the_worst_and_at_the_mean() -> None:
    truth = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = (truth + 1e-3).float()
    assert two_rules(plain, truth, plain, gradient=False) is None
    one = plain.clone()
    one[3] += 2e-3
    assert "largest" in str(two_rules(one, truth, plain, gradient=False))
    assert "mean" in str(two_rules((truth + 1.5e-3).float(), truth, plain, gradient=True))
    one[4] = float("nan")
    assert "NaN" in str(two_rules(one, truth, plain, gradient=False))


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum over a row of padding
def test_padding_is_harmless() -> None:
    assert not harmed_by_padding(make_case("cpu", 3, 100, 64, block=64, columns=9, diagonals=0))


def test_repeats_strides_and_unselected_keys() -> None:
    case = make_case("cpu", 3, 128, 64, block=64, columns=9, diagonals=0, blocks=0.3)
    assert differing_runs(case, 1) == 0
    assert unselected_gradient(case) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(run(far_apart(case, 1 << 12)), run(case), strict=True))


def test_structured_and_general_kernels_agree() -> None:
    """Two implementations, one mask: diagonals as they are, and written out as single blocks."""
    for seed, documents in ((4, 0), (5, 3)):
        case = make_case(
            "cpu",
            seed,
            230,
            64,
            block=32,
            columns=30,
            diagonals=4,
            documents=documents,
            dtype=torch.float32,
            kv_heads=1,
        )
        structured = run(case)
        case.pattern = as_blocks(case.pattern)
        for a, b in zip(run(case), structured, strict=True):
            assert float((a - b).abs().max()) <= 2e-6 * max(1.0, float(b.abs().max()))


def test_cells_of_the_benchmark_are_the_pairs_of_the_mask() -> None:
    shape = bench_cases.Shape(3, 1, 64, 16)
    for density in (1.0, 0.5, 0.3):
        pattern, cells = bench_cases.vertical_slash(shape, 512, density)
        assert cells == int(pattern.to_dense().sum())
        if density < 1:
            assert abs(cells / bench_cases.causal_cells(shape, 512) - density) < 0.05


def test_flex_attention_gets_the_same_mask() -> None:
    pattern, _ = bench_cases.vertical_slash(bench_cases.Shape(2, 1, 64, 16), 256, 0.4)
    mask = contestants.equivalent_mask(pattern)
    h, i, j = torch.arange(2)[:, None, None], torch.arange(256)[:, None], torch.arange(256)
    wanted = pattern.to_dense()
    assert torch.equal(mask.mask_mod(None, h, i, j)[None], wanted)
    tiles = wanted.unflatten(2, (-1, 16)).unflatten(4, (-1, 16))
    assert torch.equal(mask.to_dense().bool(), tiles.any(5).any(3))
    full = tiles.all(5).all(3)
    assert torch.equal(mask.full_kv_num_blocks, full.sum(-1).int())
    for q in range(16):
        listed = mask.full_kv_indices[0, 1, q, : int(mask.full_kv_num_blocks[0, 1, q])]
        assert torch.equal(listed, full[0, 1, q].nonzero().flatten().int())


def smoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--smoke", *arguments])
    return bench_kernels.main()


def test_the_benchmark_runs_and_writes_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(monkeypatch, "--lengths", "128", "--out", str(tmp_path / "kernels")) == 0
    shown = capsys.readouterr().out
    assert "Smoke run" in shown and "FLOP = 4 x D x cells" in shown
    assert (tmp_path / "kernels.json").exists() and "| ours | 100.0% |" in (tmp_path / "kernels.md").read_text()


def test_no_speed_is_shown_for_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = contestants.ours

    def wrong(pattern: SparsePattern) -> contestants.Attend:
        return lambda q, k, v: right(pattern)(q, k, v) * 1.03

    monkeypatch.setattr(contestants, "ours", wrong)
    assert smoke(monkeypatch, "--lengths", "128", "--densities", "0.5") == 1
    shown = capsys.readouterr().out
    assert "WRONG RESULTS" in shown and "forward ms" not in shown


def test_without_cuda_the_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main() == 2
    assert "--smoke" in capsys.readouterr().err
