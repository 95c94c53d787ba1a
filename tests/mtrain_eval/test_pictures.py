"""Pictures: panels, scales, hatched cells, and that what is drawn is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrain_eval import pictures
from mtrain_eval.results import build
from mtrain_eval.sample import Figure
from mtrain_eval.statistics import mean_figures
from mtrain_eval.store import Cell, Store
from tests.mtrain_eval.hand_made import TASKS, HandTask, make_run, row


def results_of(output: Path, tasks: Any = TASKS) -> dict[str, Any]:
    return build(json.loads((output / "run.json").read_text()), output, tasks)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(make_run(tmp_path_factory.mktemp("pictures") / "run"))


def panels(picture: Any) -> list[Any]:
    """Axes that are no colour bars."""
    return [axis for axis in picture.axes if axis.get_label() != "<colorbar>"]


def hatched(axis: Any) -> list[tuple[float, float]]:
    """Corners of the cells that are hatched."""
    return [patch.get_xy() for patch in axis.patches if patch.get_hatch() == pictures.HATCH]


def test_needle_map(results: dict[str, Any]) -> None:
    axes = panels(pictures.needle_map(results, "grid"))
    assert [axis.get_title() for axis in axes] == ["dense", "sparse", "sparse - dense"]
    assert [axis.collections[0].get_clim() for axis in axes] == [(0, 100), (0, 100), (-100, 100)]
    grids = [np.ma.filled(axis.collections[0].get_array(), np.nan) for axis in axes]
    np.testing.assert_array_equal(grids[0], [[100, 100], [100, 100], [np.nan, 100]])
    np.testing.assert_array_equal(grids[1], [[0, 0], [100, 100], [np.nan, 100]])
    np.testing.assert_array_equal(grids[2], [[-100, -100], [0, 0], [np.nan, 0]])
    assert [text.get_text() for text in axes[2].texts] == ["-100", "-100", "0", "0", "0"]
    assert [hatched(axis) for axis in axes] == [[(0, 2)]] * 3
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["1K", "4K\u2020"]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["0 %", "50 %", "100 %"]
    assert axes[0].yaxis_inverted()  # the start of the text on top


def test_one_attention_has_one_panel(tmp_path: Path) -> None:
    one = results_of(make_run(tmp_path / "run", ("dense",)))
    assert len(panels(pictures.needle_map(one, "grid"))) == 1
    assert len(panels(pictures.task_map(one))) == 1


def test_real_depths_fall_into_bins() -> None:
    assert [
        pictures.depth_of_row({"depth": depth, "meta": {}}) for depth in (0.0, 0.09, 0.1, 0.999, 1.0)
    ] == pytest.approx([0.05, 0.05, 0.15, 0.95, 0.95])
    assert pictures.depth_of_row({"depth": 0.9, "meta": {"depth_asked": 1.0}}) == 1.0


def test_task_map(results: dict[str, Any]) -> None:
    axes = panels(pictures.task_map(results))
    assert len(axes) == 3
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["grid", "keys", "prose*"]
    np.testing.assert_allclose(
        np.ma.filled(axes[1].collections[0].get_array(), np.nan), [[50, 400 / 6], [50, 50], [np.nan, 50]]
    )
    assert [hatched(axis) for axis in axes] == [[(0, 2)]] * 3


def test_perplexity_curve(results: dict[str, Any]) -> None:
    (axis,) = pictures.perplexity_curve(results, "books").axes
    lines = {container.get_label(): container.lines[0] for container in axis.containers}
    np.testing.assert_allclose(lines["dense"].get_xydata(), [[1024, 9.25], [4096, 8.5]])
    np.testing.assert_allclose(lines["sparse"].get_xydata()[:, 1], [9.75, 9.0])
    assert axis.get_xscale() == "log" and axis.get_ylabel() == "perplexity"
    assert axis.get_title() == "books (synthetic, n=4)"


def test_a_curve_of_one_sample_says_so(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))
    store = Store(output)
    store.append(Cell("dense", "books", 512), row(TASKS[3], 512, 0, 7.0))
    alone = HandTask("alone", "pg19", metric="perplexity")
    store.append(Cell("dense", "alone", 512), row(alone, 512, 0, 7.0))
    store.close()
    found = results_of(output, [*TASKS, alone])
    titles = [pictures.perplexity_curve(found, name).axes[0].get_title() for name in ("books", "alone")]
    assert titles == ["books (synthetic, n=1-4)", "alone (generated, n=1)"]


def test_a_difference_that_rounds_to_zero_has_no_sign(results: dict[str, Any]) -> None:
    values = {"a": np.array([[0.5, 0.5, 0.5]]), "b": np.array([[0.497, 0.503, 0.52]])}
    axes = panels(pictures._panels(results, values, [1024, 2048, 4096], ["x"], "t", ""))
    assert [text.get_text() for text in axes[2].texts] == ["0", "0", "+2"]


class Positions(HandTask):
    """Losses by position beside the perplexity."""

    def aggregate(self, rows: Any) -> dict[str, Figure]:
        return mean_figures(rows, shares=False) | {"nll_to_512": Figure(2.5, 4), "nll_to_1024": Figure(2.0, 4)}


def test_loss_by_position(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run")
    found = results_of(output, [Positions("books", "pg19", metric="perplexity", source="synthetic")])
    (axis,) = pictures.position_curve(found, "books").axes
    assert [line.get_label() for line in axis.lines] == ["dense", "sparse"]
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[512, 2.5], [1024, 2.0]])
    assert axis.get_title() == "books (synthetic, n=4) at 4K: loss by position"
    drawn = pictures.draw_all(found, tmp_path)
    assert set(drawn) >= {"books.png", "books_positions.png"}
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)


def test_the_same_picture_is_the_same_file(results: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        pictures.save(pictures.task_map(results), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not list(tmp_path.glob(".*"))
