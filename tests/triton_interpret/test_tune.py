"""The tuning script, with the interpreter in the place of a GPU: times mean nothing there, results do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts import tune_kernels
from scripts.kernel_bench import measure
from scripts.kernel_bench.cases import Shape
from scripts.tune_kernels import Target, tile_of
from sparse_kernels.gpu import config
from sparse_kernels.gpu.config import Tile

CPU, TARGET = torch.device("cpu"), Target(90, 64, "bf16", 32)
SETTINGS = measure.Settings(Shape(2, 1, 64, 32), 128, [0.6], CPU, True, False, 0.0)


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_a_row_is_tuned_and_the_table_comes_back(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: dict(rows) for name, rows in config.TABLE.items()}
    held, other = TARGET.in_force(kernel), Tile(16, 32, 4, 1)
    monkeypatch.setattr(tune_kernels, "misfit", lambda *_: None)  # compiling takes a process that does not interpret
    monkeypatch.setattr(tune_kernels, "neighbours", lambda *_: iter([other]))
    monkeypatch.setattr(measure, "usable", lambda *_: None)  # compiles before it is timed
    used = []
    launch_tile = config.tile_for
    monkeypatch.setattr(
        "sparse_kernels.gpu.launch.tile_for", lambda *a: used.append((a[0], launch_tile(*a))) or used[-1][1]
    )
    given = "--head-dim 64 --block 32 --heads 2 --kv-heads 1 --lengths 128 --seconds 0 --densities 0.6".split()
    options = tune_kernels.arguments(given)
    text = "\n".join(tune_kernels.tune(kernel, TARGET, options, CPU))
    assert {tile for name, tile in used if name == kernel} == {held, other}
    assert {tile for name, tile in used if name != kernel} == {
        TARGET.in_force(n) for n in {n for n, _ in used} - {kernel}
    }
    assert "(in force)" in text and tune_kernels.text_of(other) in text and "ready to paste: `" in text
    assert config.TABLE == before


def test_a_wrong_result_drops_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = TARGET.in_force("dq")
    assert tune_kernels.wrong("dq", TARGET, tile, SETTINGS) is None
    right = measure.contestants.ours

    def spoiled(pattern: Any) -> Any:
        return lambda q, k, v: right(pattern)(q, k * 1.05, v)

    monkeypatch.setattr(measure.contestants, "ours", spoiled)
    found = tune_kernels.wrong("dq", TARGET, tile, SETTINGS)
    assert found is not None and "largest error" in found


def test_neighbours_differ_in_one_number() -> None:
    base = Tile(64, 32, 8, 2)
    for tile in list(tune_kernels.neighbours(base, 2, 64))[1:]:
        assert sum(a != b for a, b in zip(vars(tile).values(), vars(base).values(), strict=True)) == 1
        assert max(tile.m, tile.n) <= 64 and tile_of(tune_kernels.text_of(tile)) == tile


def test_the_row_to_paste_keeps_the_tiles_of_other_blocks() -> None:
    row = config.TABLE["forward"][(config.HOPPER, 64, 2)]
    assert tune_kernels.row_with("forward", Target(90, 64, "bf16", 64), Tile(64, 32, 4, 2)) == (
        row[0],
        Tile(64, 32, 4, 2),
    )
    large = Target(90, 64, "bf16", 128)
    assert tune_kernels.row_with("forward", large, Tile(128, 32, 4, 2)) == (Tile(128, 32, 4, 2), row[1])
    assert (
        eval(
            tune_kernels.pasted("forward", large, row[0]).split(": ", 1)[1].strip()[:-1].split(": ", 1)[1], vars(config)
        )
        == row
    )
