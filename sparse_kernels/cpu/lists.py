"""Which key rows each (batch row, head, query block) of a view reads: lists of about equal length, batched into chunks.

An *item* is one (batch row, head, local query block), numbered ``(b * H + h) * nq + block``. Its list holds rows of the key tensor
seen as [B * R * K, D] (R local key rows): the tokens of its tiles, then its columns that no tile covers. The diagonal tile is left
to a causal call when the view holds it at the same place (`ListPlan.causal_diagonal`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels.cpu.flash import MASKED
from sparse_kernels.cpu.selection import Geometry, Selection, document_bounds, select
from sparse_kernels.view import ShardView, block_positions

# Bytes of gathered keys and values per call: enough to amortise the call, small enough to stay in the cache.
CHUNK_BYTES = 2 << 20
# Multiply-adds that cost about as much as one more call: lists are padded to a common length while that is the cheaper choice.
CALL_MACS = 2 << 20
# Entries of the boolean selection (query blocks x key blocks and columns) looked at in one go.
SELECTION_ENTRIES = 4 << 20


@dataclass(frozen=True)
class Chunk:
    """Items computed by one call.

    items: int64 [N] item numbers.
    query_rows: int64 [N * b] rows of their queries in q seen as [B * nq * b * H, D].
    rows: int32 or int64 [N, n] key rows; entries beyond the length of a list repeat its first row.
    lengths: int64 [N] list lengths; None when every list has n entries.
    bounded: some key of some item is outside the bounds (causal, document) of some of its query rows.
    """

    items: Tensor
    query_rows: Tensor
    rows: Tensor
    lengths: Tensor | None
    bounded: bool


class ListPlan:
    """The chunks of one view. Small lists are kept on the view, so that the backward finds the forward's."""

    def __init__(self, view: ShardView, geometry: Geometry) -> None:
        self.view, self.geometry = view, geometry
        self.causal_diagonal = view.k_blocks is not None and torch.equal(view.q_blocks, view.k_blocks)
        self.bounds = document_bounds(view, geometry)

    def chunks(self) -> Iterator[Chunk]:
        """Every list of the view, each item in exactly one chunk, in a fixed order."""
        # Kept on the view and not in a table of plans: they live as long as the view, and no cycle delays their end.
        geometry, kept = self.view.__dict__.get("_cpu_chunks", (None, []))
        if geometry == self.geometry:
            yield from kept
            return
        number = self.geometry.num_q_blocks
        keys = self.view.pattern.num_blocks if self.view.k_blocks is None else len(self.view.k_blocks)
        columns = self.view.pattern.columns
        assert columns is not None
        per_block = self.geometry.batch * self.geometry.heads * (keys + columns.shape[2])
        step = max(1, SELECTION_ENTRIES // per_block)
        panels = (p for low in range(0, number, step) for p in self._panels(low, min(low + step, number)))
        panel, num_panels = [], 0
        for panel in panels:
            num_panels += 1
            yield from panel
        if num_panels == 1:
            object.__setattr__(self.view, "_cpu_chunks", (self.geometry, panel))

    def bounded_diagonal(self) -> Tensor | None:
        """bool [B, nq]: query blocks in which a document starts, so that their diagonal tile is listed and not causal."""
        if self.view.doc_start is None:
            return None
        return self.bounds.last_open > self.view.q_blocks * self.geometry.block

    def row_mask(self, chunk: Chunk, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores [N, 1, b, n] of a chunk: 0 or `MASKED`; None when every pair counts."""
        if chunk.lengths is None and not chunk.bounded:
            return None
        number, width = chunk.rows.shape
        hidden = torch.zeros(1, 1, 1, dtype=torch.bool)
        if chunk.lengths is not None:
            hidden = (torch.arange(width) >= chunk.lengths[:, None])[:, None]
        if chunk.bounded:
            query, start = self._query_bounds(chunk.items)
            key = self._key_positions(chunk.rows)[:, None]
            hidden = hidden | (key > query[..., None]) | (key < start[..., None])
        mask = hidden * torch.tensor(MASKED, dtype=dtype)
        return mask[:, None].expand(number, 1, self.geometry.block, width)

    def _query_bounds(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N, b] each: global positions and document starts of the query rows of these items."""
        g = self.geometry
        block = items % g.num_q_blocks
        query = self.view.q_blocks[block, None] * g.block + torch.arange(g.block)
        if self.view.doc_start is None:
            return query, torch.zeros_like(query)
        start = self.view.doc_start.view(g.batch, g.num_q_blocks, g.block)
        return query, start[items // (g.num_q_blocks * g.heads), block]

    def _key_positions(self, rows: Tensor) -> Tensor:
        """int64 global positions of flattened key rows."""
        g, view = self.geometry, self.view
        if view.k_blocks is not None:
            return block_positions(view.k_blocks, g.block)[rows.long() // g.kv_heads % g.key_rows]
        assert view.column_positions is not None
        return view.column_positions.transpose(1, 2).flatten()[rows.long()]

    def _panels(self, low: int, high: int) -> Iterator[list[Chunk]]:
        """Chunks of the query blocks low..high, in panels whose lists fit the token budget."""
        selection = select(self.view, self.geometry, self.bounds, low, high, skip_diagonal=self.causal_diagonal)
        lengths = selection.lengths(self.geometry.block)
        if high - low > 1 and int(lengths.sum()) > self.geometry.token_budget:
            middle = (low + high) // 2
            yield from self._panels(low, middle)
            yield from self._panels(middle, high)
        else:
            yield self._build(selection, lengths, low)

    def _build(self, selection: Selection, lengths: Tensor, low: int) -> list[Chunk]:
        """Chunks of one panel: items sorted by length, lists written straight into the padded rows of their chunk."""
        g = self.geometry
        count, flat_bounded = lengths.flatten(), selection.bounded.flatten()
        order = torch.argsort(count + flat_bounded * (int(count.max()) + 1), descending=True, stable=True)
        order = order[count[order] > 0]
        if not len(order):
            return []
        num_bounded = int(flat_bounded.sum())
        spans = _spans(count[order].tolist(), num_bounded, g)
        widths = torch.tensor([width for _, _, width in spans])
        sizes = torch.tensor([high - low for low, high, _ in spans])
        width_of_item = widths.repeat_interleave(sizes)
        ends = width_of_item.cumsum(0)
        base = torch.zeros_like(count)
        base[order] = ends - width_of_item
        rows = self._write_rows(selection, base, int(ends[-1]))
        panel = lengths.shape[2]
        item = order // panel * g.num_q_blocks + order % panel + low
        query_rows = g.query_rows(item)
        chunks, offset = [], 0
        for (start, stop, width), size in zip(spans, sizes.tolist(), strict=True):
            here = rows[offset : offset + size * width].view(size, width)
            offset += size * width
            length: Tensor | None = count[order[start:stop]]
            assert length is not None
            if int(length.min()) == width:
                length = None
            else:
                here = torch.where(torch.arange(width) < length[:, None], here, here[:, :1])
            queries = query_rows[start * g.block : stop * g.block]
            chunks.append(Chunk(item[start:stop], queries, here, length, start < num_bounded))
        return chunks

    def _write_rows(self, selection: Selection, base: Tensor, total: int) -> Tensor:
        """[total]: tile tokens, then columns, of every list, starting at ``base`` [items of the panel]."""
        g, dtype = self.geometry, self.geometry.row_dtype
        rows = torch.zeros(total, dtype=dtype)
        kv_head = torch.arange(g.heads, dtype=dtype) // (g.heads // g.kv_heads)
        origin = torch.arange(g.batch, dtype=dtype)[:, None] * (g.key_rows * g.kv_heads) + kv_head  # [B, H]
        tile_count, column_count = selection.tiles.sum(-1).flatten(), selection.columns.sum(-1).flatten()
        step = torch.arange(g.block, dtype=dtype)
        if selection.tiles.shape[3]:
            tile = torch.arange(selection.tiles.shape[3], dtype=dtype) * (g.block * g.kv_heads)
            value = (origin[:, :, None, None] + tile).expand(selection.tiles.shape)[selection.tiles]
            before = tile_count.cumsum(0) - tile_count
            place = (base - before * g.block).repeat_interleave(tile_count) + torch.arange(len(value)) * g.block
            rows[place[:, None] + step] = value[:, None] + step * g.kv_heads
        if selection.columns.shape[3]:
            column = (origin[:, :, None] + selection.column_rows * g.kv_heads).to(dtype)
            value = column[:, :, None].expand(selection.columns.shape)[selection.columns]
            before = column_count.cumsum(0) - column_count
            place = (base + tile_count * g.block - before).repeat_interleave(column_count) + torch.arange(len(value))
            rows[place] = value
        return rows


def _spans(count: list[int], num_bounded: int, g: Geometry) -> list[tuple[int, int, int]]:
    """(first, last + 1, width) of the chunks over items sorted by length, bounded ones first.

    A chunk ends when its gathered rows are large enough, or when padding the next list to the common width would cost more
    than a call of its own.
    """
    spans, start = [], 0
    while start < len(count):
        stop = num_bounded if start < num_bounded else len(count)
        width = count[start]
        row_bytes = g.itemsize * (2 * g.head_dim + (g.block if start < num_bounded else 0))
        stop = min(stop, start + max(1, CHUNK_BYTES // (width * row_bytes)))
        waste, end = 0, start + 1
        while end < stop:
            waste += (width - count[end]) * g.block * g.head_dim
            if waste > CALL_MACS:
                break
            end += 1
        spans.append((start, end, width))
        start = end
    return spans
