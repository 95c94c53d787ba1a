"""Patterns and views: the sentence of the contract, written out in loops, against the tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_kernels import PatternError, ShardView, SparsePattern
from sparse_kernels.view import block_positions


def sample(seq_len: int = 23, block: int = 4, with_blocks: bool = True) -> SparsePattern:
    """Two batch rows, two heads, lists of different lengths."""
    number = -(-seq_len // block)
    columns = torch.tensor([[[0, 3, 17], [5, seq_len, seq_len]], [[seq_len] * 3, [0, 1, 22]]], dtype=torch.int32)
    diagonals = torch.tensor([[[0, 2, -1], [0, -1, -1]], [[0, 1, 5], [0, 3, -1]]], dtype=torch.int32)
    blocks = None
    if with_blocks:
        blocks = torch.rand(2, 2, number, number, generator=torch.Generator().manual_seed(0)) < 0.2
    return SparsePattern(seq_len, block, columns, diagonals, blocks)


def literal_mask(pattern: SparsePattern, doc_start: Tensor | None) -> Tensor:
    """The definition, one pair at a time."""
    size, b = pattern.seq_len, pattern.block
    mask = torch.zeros(pattern.batch, pattern.heads, size, size, dtype=torch.bool)
    assert pattern.columns is not None and pattern.diagonals is not None
    table = None if pattern.block_rows is None else pattern.block_rows.table()
    for row in range(pattern.batch):
        for head in range(pattern.heads):
            columns = set(pattern.columns[row, head].tolist())
            diagonals = set(pattern.diagonals[row, head].tolist())
            for i in range(size):
                start = 0 if doc_start is None else int(doc_start[row, i])
                for j in range(start, i + 1):
                    in_block = table is not None and bool(table[row, head, i // b, j // b])
                    mask[row, head, i, j] = j in columns or i // b - j // b in diagonals or in_block
    return mask


def documents(seq_len: int) -> Tensor:
    starts = torch.zeros(2, seq_len, dtype=torch.int64)
    starts[0, 5:], starts[0, 6:], starts[1, 9:] = 5, 6, 9
    return starts


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("with_blocks", [False, True])
def test_to_dense_is_the_definition(with_blocks: bool, with_documents: bool) -> None:
    pattern = sample(with_blocks=with_blocks)
    doc_start = documents(23) if with_documents else None
    assert torch.equal(pattern.to_dense(doc_start), literal_mask(pattern, doc_start))


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("seq_len", [23, 24])
def test_density_counts_the_dense_mask(seq_len: int, with_documents: bool) -> None:
    pattern = sample(seq_len)
    doc_start = documents(seq_len) if with_documents else None
    row = torch.arange(seq_len)
    start = torch.zeros(2, seq_len, dtype=torch.int64) if doc_start is None else doc_start
    causal = (row - start + 1).sum(1)
    wanted = pattern.to_dense(doc_start).sum((2, 3)) / causal[:, None]
    torch.testing.assert_close(pattern.density(doc_start), wanted, rtol=1e-6, atol=0)


def test_dense_is_the_causal_mask() -> None:
    pattern = SparsePattern.dense(1, 2, 13, 4)
    assert pattern.full
    assert torch.equal(pattern.to_dense()[0, 1], torch.ones(13, 13).tril().bool())
    assert torch.equal(pattern.density(), torch.ones(1, 2))


def test_missing_parts_get_defaults() -> None:
    only_columns = SparsePattern(10, 4, columns=torch.tensor([[[2, 10]]], dtype=torch.int32))
    assert only_columns.diagonals is not None and only_columns.diagonals.tolist() == [[[0]]]
    assert only_columns.num_blocks == 3 and only_columns.batch == only_columns.heads == 1
    only_diagonals = SparsePattern(10, 4, diagonals=torch.tensor([[[0, 1]]], dtype=torch.int32))
    assert only_diagonals.columns is not None and only_diagonals.columns.shape == (1, 1, 0)


def test_select_is_a_slice_of_the_heads() -> None:
    pattern = sample()
    assert torch.equal(pattern.select(slice(1, 2)).to_dense(), pattern.to_dense()[:, 1:])
    assert torch.equal(pattern.to("cpu").to_dense(), pattern.to_dense())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0, "block": 4}, "at least 1"),
        ({"seq_len": 8, "block": 4}, "SparsePattern.dense"),
        ({"seq_len": 8, "block": 4, "columns": torch.zeros(1, 2)}, "columns has shape"),
        (
            {"seq_len": 8, "block": 4, "columns": torch.zeros(1, 2, 3), "diagonals": torch.zeros(1, 1, 3)},
            "diagonals has shape",
        ),
        ({"seq_len": 8, "block": 4, "blocks": torch.zeros(1, 2, 3, 3, dtype=torch.bool)}, "expected .1, 2, 2, 2."),
        ({"seq_len": 8, "block": 4, "diagonals": torch.tensor([[[1, -1]]])}, "offset 0"),
        ({"seq_len": 8, "block": 4, "diagonals": torch.zeros(1, 1, 0)}, "offset 0"),
        ({"seq_len": 8, "block": 4, "columns": torch.tensor([[[1, 3, 8], [3, 1, 8]]])}, "ascending"),
        ({"seq_len": 8, "block": 4, "columns": torch.tensor([[[3, 3]]])}, "without repeats"),
        ({"seq_len": 8, "block": 4, "columns": torch.tensor([[[3, 8, 5]]])}, "padded at the end with seq_len=8"),
        ({"seq_len": 8, "block": 4, "columns": torch.tensor([[[-1, 3]]])}, "positions from 0"),
    ],
)
def test_bad_patterns_say_what_is_wrong(arguments: dict, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        SparsePattern(**arguments)


def test_doc_start_of_another_length_is_refused() -> None:
    with pytest.raises(PatternError, match="doc_start has shape"):
        sample().to_dense(torch.zeros(2, 22, dtype=torch.int64))


def test_block_mask_takes_any_ids_and_no_padding() -> None:
    pattern = sample()
    every = torch.arange(pattern.num_blocks)
    whole = pattern.block_mask(every, every)
    q_ids, k_ids = torch.tensor([5, 9, 0, 3]), torch.tensor([3, 0, 6, 5])
    mask = pattern.block_mask(q_ids, k_ids)
    for i, q in enumerate(q_ids.tolist()):
        for j, k in enumerate(k_ids.tolist()):
            inside = q < pattern.num_blocks and k <= q
            expected = whole[:, :, q, k] if inside else torch.zeros(2, 2, dtype=torch.bool)
            assert torch.equal(mask[:, :, i, j], expected), (q, k)


def test_views_partition_the_mask() -> None:
    """Block views without columns plus the gathered column view: every pair of the global mask exactly once."""
    pattern = sample()
    doc_start = torch.nn.functional.pad(documents(23), (0, 1))
    whole = torch.nn.functional.pad(pattern.to_dense(documents(23)), (0, 1, 0, 1)).int()
    q_blocks = torch.tensor([4, 1, 7, 5, 0])
    rows = block_positions(q_blocks, 4)
    local_start = doc_start[:, rows.clamp(max=23)]
    count = torch.zeros(2, 2, len(rows), 24, dtype=torch.int32)
    for k_blocks in (torch.tensor([5, 0]), torch.tensor([3, 6, 1]), torch.tensor([2, 4])):
        keys = block_positions(k_blocks, 4)
        mask = ShardView(pattern, q_blocks, k_blocks=k_blocks, doc_start=local_start).mask()
        count[..., keys[keys < 24]] += mask[..., keys < 24].int()
    # One key-value head: the union of the columns of both query heads.
    positions = torch.tensor([[[0, 3, 5, 17, 23]], [[0, 1, 22, 23, 23]]])
    mask = ShardView(pattern, q_blocks, column_positions=positions, doc_start=local_start).mask()
    index = positions.clamp(max=23)[:, :, None].expand(2, 2, len(rows), 5)
    count.scatter_add_(3, index, mask.int())
    inside = rows < 24
    assert torch.equal(count[:, :, inside], whole[:, :, rows[inside]])
    assert int(count[:, :, ~inside].sum()) == 0


def test_a_view_needs_one_kind_of_keys() -> None:
    with pytest.raises(AssertionError, match="either blocks or gathered columns"):
        ShardView(sample(), torch.tensor([0]))
