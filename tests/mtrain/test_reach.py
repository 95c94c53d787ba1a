"""The share of pairs inside a mask by distance, against the mask itself."""

from __future__ import annotations

import pytest
import torch

from mtrain.errors import MtrainError
from mtrain.metrics import read_lines
from mtrain.patterns import a_shape_pattern, reach_by_distance, scattered_rows
from mtrain.trainer import train
from sparse_kernels import SparsePattern
from tests.mtrain.tiny import tiny_recipe


def by_hand(pattern: SparsePattern, rows, doc_start) -> list[list[float]]:
    mask, size = pattern.to_dense(doc_start).tolist(), pattern.seq_len
    starts = torch.zeros(pattern.batch, size).long() if doc_start is None else doc_start
    result = [[], []]
    for low in (2**n for n in range((size - 1).bit_length())):
        pairs = [
            (b, i, j)
            for b in range(pattern.batch)
            for i in rows
            for j in range(int(starts[b, i]), i + 1)
            if low <= i - j < 2 * low
        ]
        held = [[mask[b][h][i][j] for h in range(pattern.heads)] for b, i, j in pairs]
        count = len(pairs) or float("nan")
        result[0].append(sum(map(sum, held)) / pattern.heads / count)
        result[1].append(sum(map(any, held)) / count)
    return result


@pytest.mark.parametrize("packed", [False, True])
def test_reach_is_counted_pair_by_pair(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrain.patterns.reach.CHUNK", 32)
    draw = torch.Generator().manual_seed(3)
    blocks = torch.rand(2, 3, 10, 10, generator=draw) < 0.2
    columns = torch.tensor([2, 30, 31, 70, 75], dtype=torch.int32).expand(2, 3, 5)
    diagonals = torch.tensor([[0, 1, 4]] * 3, dtype=torch.int32).expand(2, 3, 3)
    doc_start = torch.tensor([[0] * 40 + [40] * 35, [0] * 7 + [7] * 68]) if packed else None
    pattern = SparsePattern(75, 8, columns=columns, diagonals=diagonals, blocks=blocks)
    for rows in (range(75), [0, 3, 40, 41, 74], scattered_rows(75, 16)):
        found = reach_by_distance(pattern, None if rows == range(75) else rows, doc_start=doc_start)
        torch.testing.assert_close(found, torch.tensor(by_hand(pattern, rows, doc_start)).double(), equal_nan=True)


def test_reach_of_known_masks() -> None:
    assert reach_by_distance(SparsePattern.dense(1, 2, 100, 8)).eq(1).all()
    band = reach_by_distance(a_shape_pattern(1, 2, 1024, 1, sink=0, local=16))
    assert band[0, :4].eq(1).all() and band[0, 5:].eq(0).all() and 0 < band[0, 4] < 0.1
    with pytest.raises(MtrainError, match="from 0 to 99"):
        reach_by_distance(SparsePattern.dense(1, 2, 100, 8), [100])


def test_scattered_rows() -> None:
    rows = scattered_rows(512, 64)
    assert len(rows) == 64 and rows == sorted(set(rows)) and 0 <= rows[0] and rows[-1] < 512
    assert len({row % 8 for row in rows}) == 8
    assert scattered_rows(2, 64) and max(scattered_rows(2, 64)) < 2


@pytest.mark.parametrize("pattern", ["dense", "vertical_slash", "xattention", "moba"])
def test_a_run_logs_its_reach_with_recall(pattern: str, tmp_path) -> None:
    recipe = tiny_recipe(
        tmp_path,
        attention__pattern=pattern,
        attention__stride=4,
        attention__threshold=0.4,
        attention__top_k=2,
        log__recall_every=3,
    )
    train(recipe)
    lines = read_lines(tmp_path / "run" / "run.jsonl")
    assert [line["step"] for line in lines if "reach" in line] == [1, 4]
    for line in lines:
        if "reach" in line:
            pairs = [x for x in zip(line["reach"], line["reach_any_head"], strict=True) if None not in x]
            assert len(line["reach"]) == 7 and all(0 <= one <= some <= 1 for one, some in pairs)
            assert line["reach"][0] == 1  # local: 8
            assert (pattern == "dense") == (min(one for one, _ in pairs) == 1)
