"""What the tuning script drops without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import tune_kernels
from scripts.tune_kernels import Target
from sparse_kernels.gpu.config import Tile

TARGET = Target(90, 128, "bf16", 128)


def test_what_is_in_force_fits_and_what_cannot_fit_says_why() -> None:
    assert tune_kernels.misfit("dq", TARGET, TARGET.in_force("dq")) is None
    assert "spills" in str(tune_kernels.misfit("dq", TARGET, Tile(128, 128, 8, 1)))
    assert "shared memory" in str(tune_kernels.misfit("forward", TARGET, Tile(128, 64, 8, 8)))
    assert "does not compile" in str(tune_kernels.misfit("forward", TARGET, Tile(128, 48, 8, 3)))  # no power of two


def test_a_list_of_what_fits_is_kept_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_kernels, "misfit", lambda kernel, target, tile: "too wide" if tile.warps == 16 else None)
    common, file = ["--kernels", "dq", "--capability", "90"], tmp_path / "fits"
    assert tune_kernels.main([*common, "--dry-run", "--compile-all", "--out", str(file)]) == 0
    options = tune_kernels.arguments([*common, "--fits", str(file)])
    every = tune_kernels.candidates_of("dq", TARGET, tune_kernels.arguments(common))
    assert tune_kernels.candidates_of("dq", TARGET, options) == [tile for tile in every if tile.warps < 16] != every
    assert "too wide" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="make it anew"):
        tune_kernels.candidates_of("dq", Target(80, 128, "bf16", 128), options)


def test_a_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune_kernels.main(["--dry-run", "--kernels", "dkdv", "--capability", "80", "--head-dim", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "compiles without spills" in lines[1] and len(lines) > 10
