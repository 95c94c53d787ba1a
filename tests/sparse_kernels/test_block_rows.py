"""Single blocks as bits of some query blocks, joined with the table of all pairs that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_kernels import BlockRows, PatternError, ShardView, SparsePattern, sparse_attention
from sparse_kernels.bits import pack_bits
from tests.pretend_cuda import pretended_cuda


def random_table(seed: int, size: int, batch: int = 2, heads: int = 3) -> Tensor:
    return torch.rand(batch, heads, size, size, generator=torch.Generator().manual_seed(seed)) < 0.4


def past(table: Tensor) -> Tensor:
    return table & torch.ones(table.shape[2:], dtype=torch.bool).tril()


def some_rows(seed: int, size: int) -> Tensor:
    """Some query blocks out of order, with padding between them."""
    return torch.randperm(size + 3, generator=torch.Generator().manual_seed(seed))[: size // 2 + 2]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 31])
def test_bits_are_the_table_without_the_future(size: int) -> None:
    table = random_table(size, size)
    every = BlockRows.of_table(table)
    assert every.whole and torch.equal(every.table(), past(table))
    assert torch.equal(every.bits, BlockRows.of_table(past(table)).bits)  # equal choices are equal bits
    assert every.bits.shape[2] == sum(m // 8 + 1 for m in range(size))
    for seed in range(4):
        rows = some_rows(seed, size)
        real = rows < size
        given = torch.where(
            real[:, None], table[:, :, rows.clamp(max=size - 1)], True
        )  # what padding says counts for nothing
        mine = BlockRows.of_table(given, rows)
        assert torch.equal(mine.bits, BlockRows.of_packed(pack_bits(given), size, rows).bits)
        assert torch.equal(mine.bits, every.take(rows).bits)
        assert mine.whole == (rows[real].tolist() == list(range(size)))
        assert (
            torch.equal(mine.table()[:, :, real], past(table)[:, :, rows[real]]) and not mine.table()[:, :, ~real].any()
        )
        # Any of them in any order, against any keys; the rest comes out empty when it may.
        few = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))][: len(rows) // 2 + 1]
        keys = torch.randint(size, (11,), generator=torch.Generator().manual_seed(seed))
        wanted = past(table)[:, :, few.clamp(max=size - 1)][..., keys] & (few < size)[:, None]
        assert torch.equal(mine.mask(few, keys), wanted) and torch.equal(mine.take(few).mask(few, keys), wanted)
        spread = mine.take(torch.arange(size), absent=True)
        expected = torch.zeros_like(table)
        expected[:, :, rows[real]] = past(table)[:, :, rows[real]]
        assert torch.equal(spread.table(), expected)


def test_nothing_asks_the_device_for_a_number() -> None:
    table, rows = random_table(2, 17), some_rows(6, 17)
    given = table[:, :, rows.clamp(max=16)]
    with pretended_cuda():
        given = given.cuda()
        torch.cuda.set_sync_debug_mode("error")
        mine = BlockRows.of_table(given, rows)
        found = [mine.bits, mine.take(rows[2:]).bits, mine.take(torch.arange(17), absent=True).bits, mine.table()]
        assert all(x.is_cuda for x in found)
        with pytest.raises(RuntimeError, match="synchronizing"):
            mine.bits.max().item()


def test_rows_that_are_not_here_are_named() -> None:
    mine = BlockRows.of_table(random_table(0, 9)[:, :, :2], torch.tensor([4, 6]))
    for call in (mine.take, lambda rows: mine.mask(rows, torch.arange(9))):
        with pytest.raises(PatternError, match=r"of 2 query blocks, and not those of 1 .*first: 5.*with_rows"):
            call(torch.tensor([4, 5]))


def test_bits_that_are_not_those_of_the_rows_are_refused() -> None:
    every = BlockRows.of_table(random_table(0, 9))
    for bits in (every.bits[..., :-1], every.bits.int(), every.bits[0]):
        with pytest.raises(PatternError, match=r"the rows of these 9 query blocks take uint8 \[B, H, 10\]"):
            every.with_bits(bits)


def test_a_pattern_for_some_queries_serves_them_and_no_others() -> None:
    table, columns = random_table(3, 12), torch.tensor([0, 3, 44], dtype=torch.int32).expand(2, 3, 3)
    whole = SparsePattern(45, 4, columns, blocks=table)
    parts = [
        whole.for_queries(rows) for rows in torch.randperm(13, generator=torch.Generator().manual_seed(1)).chunk(3)
    ]
    keys, starts = torch.arange(12), torch.zeros(2, 48, dtype=torch.int64)
    starts[0, 13:], starts[1, 30:] = 13, 30
    for part in parts:
        rows = part.held
        assert part.for_queries(rows) is part and part.block_rows is not None
        local = starts.unflatten(1, (-1, 4))[:, rows.clamp(max=11)].flatten(1)
        views = [ShardView(p, rows, k_blocks=keys, inline_columns=True, doc_start=local).mask() for p in (whole, part)]
        assert torch.equal(*views)
    documents = starts[:, :45]
    pairs = torch.stack([part.allowed_pairs(documents) for part in parts]).sum(0)
    assert torch.equal((pairs / whole.causal_pairs(documents)).float(), whole.density(documents))
    with pytest.raises(PatternError, match="too few for a density"):
        parts[0].density()
    q = torch.randn(2, 45, 3, 8)
    with pytest.raises(PatternError, match="those of a rank"):
        sparse_attention(q, q, q, parts[0])
    with pytest.raises(PatternError, match="rows of 12 key blocks; expected 6"):
        SparsePattern(45, 8, blocks=whole.block_rows)
    assert SparsePattern(3, 4, blocks=random_table(0, 1)).blocks is None  # one block: its diagonal


def test_a_table_may_be_of_numbers_and_change_afterwards() -> None:
    table = random_table(5, 6)
    pattern = SparsePattern(24, 4, blocks=table.int())
    assert torch.equal(pattern.block_rows.table(), past(table))
    table.zero_()
    assert pattern.block_rows.table().any()
