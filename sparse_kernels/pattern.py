"""Sparse attention patterns as data: columns, block diagonals and single blocks, per batch row and query head.

Shape letters used in this package: B batch, S tokens, H query heads, K key-value heads, G = H / K, D head dim, b block (tokens),
NB = ceil(S / b) blocks, C column slots, E diagonal slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_kernels.bits import upload
from sparse_kernels.block_rows import BlockRows
from sparse_kernels.errors import PatternError


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """Which keys each query may attend to, without a mask of size S x S.

    Query i of head h may attend to key j iff ``j <= i``, ``doc_start[i] <= j`` and at least one of: j is in ``columns`` of the
    head, the block offset ``i // block - j // block`` is in its ``diagonals``, or ``blocks[i // block, j // block]`` is set.
    The dense mask of one batch row and head, in a few lines::

        i, j = torch.arange(S)[:, None], torch.arange(S)[None, :]
        offset = i // block - j // block
        near = torch.isin(offset, diagonals[b, h]) | blocks[b, h][i // block, j // block]
        mask = (j <= i) & (j >= doc_start[b][:, None]) & (near | torch.isin(j, columns[b, h]))

    Args:
        seq_len: S, tokens in the sequence (any length >= 1).
        block: b, tokens per block.
        columns: int32 [B, H, C], ascending global key positions, padded at the end with ``seq_len``; None: no columns.
        diagonals: int32 [B, H, E], ascending block offsets, padded at the end with -1; offset 0 must be present, so no row is
            ever empty. None: only offset 0.
        blocks: None, or bool [B, H, NB, NB] (query block, key block), kept as `BlockRows`: a bit per pair that is not in the
            future. A rank's pattern may be given the `BlockRows` of its own query blocks only; it serves these.
        full: True promises that every diagonal is present (set by `SparsePattern.dense`), so that a backend may use a dense
            kernel without looking at tensors on the device.
    """

    seq_len: int
    block: int
    columns: Tensor | None = None
    diagonals: Tensor | None = None
    blocks: BlockRows | Tensor | None = None
    full: bool = False

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.block < 1:
            raise PatternError(f"seq_len and block must be at least 1, got seq_len={self.seq_len}, block={self.block}")
        bits = self.blocks.bits if isinstance(self.blocks, BlockRows) else self.blocks
        given = [t for t in (self.columns, self.diagonals, bits) if t is not None]
        if not given:
            raise PatternError(
                "a pattern needs columns, diagonals or blocks to know its batch and heads; for the plain causal mask use "
                "SparsePattern.dense(batch, heads, seq_len, block)"
            )
        batch, heads, device = given[0].shape[0], given[0].shape[1], given[0].device
        for name, tensor, rank in (
            ("columns", self.columns, 3),
            ("diagonals", self.diagonals, 3),
            ("blocks", bits, 4 if isinstance(self.blocks, Tensor) else 3),
        ):
            if tensor is None:
                continue
            if tensor.dim() != rank or tensor.shape[:2] != (batch, heads) or tensor.device != device:
                raise PatternError(
                    f"{name} has shape {tuple(tensor.shape)} on {tensor.device}; expected {rank} dimensions starting with "
                    f"[{batch}, {heads}] on {device}"
                )
        if self.columns is None:
            object.__setattr__(self, "columns", torch.empty(batch, heads, 0, dtype=torch.int32, device=device))
        if self.diagonals is None:
            object.__setattr__(self, "diagonals", torch.zeros(batch, heads, 1, dtype=torch.int32, device=device))
        assert self.columns is not None and self.diagonals is not None
        # Looked at on the CPU only: on a GPU the checks would wait for the device.
        if device.type == "cpu" and (not self.diagonals.shape[2] or bool((self.diagonals[:, :, 0] != 0).any())):
            raise PatternError(
                "offset 0 must come first in the diagonals of every head, so that no row is without keys"
            )
        if device.type == "cpu" and not _ascending(self.columns, self.seq_len):
            raise PatternError(
                f"columns must be key positions from 0, ascending and without repeats in every head, padded at the end with "
                f"seq_len={self.seq_len}; sort them first"
            )
        if isinstance(self.blocks, Tensor):
            if self.blocks.shape[2:] != (self.num_blocks, self.num_blocks):
                raise PatternError(
                    f"blocks has shape {tuple(self.blocks.shape)}; expected [{batch}, {heads}, {self.num_blocks}, "
                    f"{self.num_blocks}] for seq_len={self.seq_len}, block={self.block}"
                )
            object.__setattr__(self, "blocks", BlockRows.of_table(self.blocks.bool()))
        elif self.blocks is not None and self.blocks.num_blocks != self.num_blocks:
            raise PatternError(
                f"blocks has rows of {self.blocks.num_blocks} key blocks; expected {self.num_blocks} for seq_len={self.seq_len}, "
                f"block={self.block}"
            )
        if self.num_blocks == 1:
            object.__setattr__(self, "blocks", None)  # the one block is the diagonal, which is always there

    @classmethod
    def dense(
        cls, batch: int, heads: int, seq_len: int, block: int, device: torch.device | str = "cpu"
    ) -> SparsePattern:
        """The plain causal mask: every block diagonal, no columns."""
        num_blocks = -(-seq_len // block)
        offsets = torch.arange(num_blocks, dtype=torch.int32, device=device).expand(batch, heads, num_blocks)
        return cls(seq_len, block, diagonals=offsets.contiguous(), full=True)

    @property
    def batch(self) -> int:
        """B, batch rows."""
        assert self.diagonals is not None
        return self.diagonals.shape[0]

    @property
    def heads(self) -> int:
        """H, query heads."""
        assert self.diagonals is not None
        return self.diagonals.shape[1]

    @property
    def num_blocks(self) -> int:
        """NB = ceil(seq_len / block)."""
        return -(-self.seq_len // self.block)

    @property
    def device(self) -> torch.device:
        """Where the index lives."""
        assert self.diagonals is not None
        return self.diagonals.device

    @property
    def block_rows(self) -> BlockRows | None:
        """The single blocks."""
        assert not isinstance(self.blocks, Tensor), "made BlockRows by the constructor"
        return self.blocks

    @property
    def held(self) -> Tensor:
        """int64 on the CPU: the query blocks whose keys this pattern knows."""
        return torch.arange(self.num_blocks) if self.block_rows is None else self.block_rows.rows

    def to(self, device: torch.device | str) -> SparsePattern:
        """The same pattern on another device."""
        assert self.columns is not None and self.diagonals is not None
        blocks = None if self.block_rows is None else self.block_rows.with_bits(self.block_rows.bits.to(device))
        return SparsePattern(
            self.seq_len, self.block, self.columns.to(device), self.diagonals.to(device), blocks, self.full
        )

    def select(self, heads: slice) -> SparsePattern:
        """The pattern of a slice of the query heads (views, nothing copied)."""
        assert self.columns is not None and self.diagonals is not None
        blocks = None if self.block_rows is None else self.block_rows.with_bits(self.block_rows.bits[:, heads])
        return SparsePattern(
            self.seq_len, self.block, self.columns[:, heads], self.diagonals[:, heads], blocks, self.full
        )

    def for_queries(self, q_blocks: Tensor) -> SparsePattern:
        """The pattern as far as these query blocks (int64 [n] on the CPU) need it: of single blocks their rows only.

        Raises:
            PatternError: the single blocks of one of them are not held here.
        """
        if self.block_rows is None or torch.equal(self.block_rows.rows, q_blocks):
            return self
        return replace(self, blocks=self.block_rows.take(q_blocks))

    def offset_table(self) -> Tensor:
        """bool [B, H, NB]: is block offset d one of the diagonals?"""
        assert self.diagonals is not None
        table = torch.zeros(self.batch, self.heads, self.num_blocks + 1, dtype=torch.bool, device=self.device)
        # Padding (-1) and offsets beyond the sequence land in the spare last slot.
        slots = self.diagonals.long()
        slots = torch.where((slots < 0) | (slots >= self.num_blocks), self.num_blocks, slots)
        return table.scatter_(2, slots, True)[:, :, : self.num_blocks]

    def block_mask(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        """bool [B, H, nq, nk]: tiles of the block part (diagonals and blocks) between global block ids, future excluded.

        Ids at or beyond NB (padding of a layout) are never selected. ``q_blocks`` are on the CPU.

        Raises:
            PatternError: the single blocks of one of the query blocks are not held here.
        """
        q_ids, k_ids = upload(q_blocks, self.device)[:, None], upload(k_blocks, self.device)[None, :]
        inside = (k_ids <= q_ids) & (q_ids < self.num_blocks)
        offset = torch.where(inside, q_ids - k_ids, 0)
        mask = self.offset_table()[:, :, offset]
        if self.block_rows is not None:
            mask = mask | self.block_rows.mask(q_blocks, k_blocks)
        return mask & inside

    def to_dense(self, doc_start: Tensor | None = None) -> Tensor:
        """The mask itself, bool [B, H, S, S]. For tests and small cases: memory is O(S^2).

        Args:
            doc_start: int64 [B, S], first position of the document each query belongs to; None: one document.
        """
        from sparse_kernels.view import ShardView

        every = torch.arange(self.num_blocks)
        mask = ShardView(
            self, every, k_blocks=every, inline_columns=True, doc_start=pad_doc_start(doc_start, self)
        ).mask()
        return mask[:, :, : self.seq_len, : self.seq_len]

    def density(self, doc_start: Tensor | None = None) -> Tensor:
        """Allowed (query, key) pairs over causal pairs of the same documents, float32 [B, H]. Exact, memory O(S)."""
        if self.block_rows is not None and not self.block_rows.whole:
            raise PatternError(
                f"this pattern knows the single blocks of {len(self.block_rows.rows)} of {self.num_blocks} query blocks, too few "
                "for a density: add up allowed_pairs() over the ranks and divide by causal_pairs()"
            )
        return (self.allowed_pairs(doc_start) / self.causal_pairs(doc_start)).float()

    def causal_pairs(self, doc_start: Tensor | None = None) -> Tensor:
        """float64 [B, 1]: (query, key) pairs of the same document that are not in the future."""
        row = torch.arange(1, self.seq_len + 1, device=self.device).expand(self.batch, -1)
        row = row if doc_start is None else row - doc_start.to(self.device)
        return row.sum(1, dtype=torch.float64)[:, None]

    def allowed_pairs(self, doc_start: Tensor | None = None) -> Tensor:
        """float64 [B, H]: allowed (query, key) pairs of the query blocks that are held here."""
        assert self.columns is not None
        size, b = self.num_blocks, self.block
        start = torch.zeros(self.batch, self.seq_len, dtype=torch.int64, device=self.device)
        if doc_start is not None:
            start = doc_start.to(self.device)
        row = torch.arange(self.seq_len, device=self.device)
        allowed = torch.zeros(self.batch, self.heads, dtype=torch.float64, device=self.device)
        all_keys = torch.arange(size, device=self.device)
        for q_block in self.held[self.held < size].tolist():
            rows = slice(q_block * b, min((q_block + 1) * b, self.seq_len))
            tiles = self.block_mask(torch.tensor([q_block]), all_keys)[:, :, 0]  # [B, H, NB]
            first = torch.maximum(start[:, rows, None], all_keys * b)
            last = torch.minimum(row[rows, None], (all_keys + 1) * b - 1)
            area = (
                (last - first + 1).clamp(min=0).sum(1)
            )  # [B, NB] pairs of each tile that causality and documents allow
            allowed += (tiles * area[:, None]).sum(2)
            column = self.columns.long()
            free = (column < q_block * b) & ~tiles.gather(2, (column // b).clamp(max=size - 1))
            if doc_start is None:
                allowed += free.sum(2) * (rows.stop - rows.start)
            else:
                allowed += (free * (start[:, None, rows, None] <= column[:, :, None]).sum(2)).sum(2)
        return allowed


def _ascending(columns: Tensor, seq_len: int) -> bool:
    """Are the columns [B, H, C] of every head strictly ascending up to the padding (values from seq_len on)?"""
    here, following = columns[:, :, :-1], columns[:, :, 1:]
    return not bool(((following <= here) & (following < seq_len)).any() or (columns < 0).any())


def check_doc_start(doc_start: Tensor | None, pattern: SparsePattern) -> None:
    """PatternError unless doc_start is None or [B, S]."""
    if doc_start is not None and tuple(doc_start.shape) != (pattern.batch, pattern.seq_len):
        raise PatternError(
            f"doc_start has shape {tuple(doc_start.shape)}; expected [{pattern.batch}, {pattern.seq_len}]: "
            "for every query the first position of its document"
        )


def pad_doc_start(doc_start: Tensor | None, pattern: SparsePattern) -> Tensor | None:
    """doc_start int64 [B, S] extended to whole blocks (padding rows see nothing, so the value is free)."""
    if doc_start is None:
        return None
    check_doc_start(doc_start, pattern)
    missing = pattern.num_blocks * pattern.block - pattern.seq_len
    return torch.nn.functional.pad(doc_start, (0, missing))
