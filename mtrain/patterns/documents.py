"""Where the packed documents of a sequence begin, and which rows speak for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.placement import Placement
from sparse_kernels.bits import upload

# With packed documents the probe rows come from so many of the longest ones.
PROBED_DOCUMENTS = 4


@dataclass(frozen=True, eq=False)
class Documents:
    """Document starts of the whole sequence, the same on every rank.

    Args:
        seq_len: S.
        start: int64 [B, S], the first position of the document each token belongs to; None: one document.
    """

    seq_len: int
    start: Tensor | None = None

    @classmethod
    def gather(cls, doc_start: Tensor | None, placement: Placement) -> Documents:
        """From every rank's shard int64 [B, n] (padding rows are free). One all-gather of B * n int32 when sharded."""
        if doc_start is None:
            return cls(placement.seq_len)
        if doc_start.dim() != 2 or doc_start.shape[1] != placement.local_len:
            raise MtrainError(
                f"doc_start has shape {tuple(doc_start.shape)}; expected [batch, {placement.local_len}]: for each of "
                "this rank's tokens the first position of its document"
            )
        return cls(placement.seq_len, placement.whole(doc_start.int(), 1).long())

    def sinks(self, count: int, device: torch.device) -> Tensor:
        """bool [B or 1, S]: is the key among the first ``count`` tokens of its document?"""
        position = torch.arange(self.seq_len, device=device)
        return (position - self._start(device)) < count

    def most_sinks(self, count: int) -> int:
        """An upper bound of the sinks in a row, known without asking a device."""
        if self.start is None or count == 0:
            return min(count, self.seq_len)
        if self.start.device.type != "cpu":
            return self.seq_len
        return int(self.sinks(count, self.start.device).sum(1).max())

    def starts_of(self, rows: Tensor) -> Tensor:
        """int64 [B, n]: document starts of the rows [B, n] (clamped into the sequence)."""
        if self.start is None:
            return torch.zeros_like(rows)
        return self.start.gather(1, rows.clamp(0, self.seq_len - 1))

    def last_rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The longest documents: int64 [B, count] their last rows, longest first (ties: earlier first), and int64 [B]
        how many there are, at most ``count``; entries beyond that are meaningless."""
        assert self.start is not None
        start = self.start
        position = torch.arange(self.seq_len, device=start.device)
        following = torch.nn.functional.pad(start[:, 1:], (0, 1), value=-1)
        last = following != start
        length = torch.where(last, position - start + 1, 0)
        order = length.sort(dim=1, descending=True, stable=True).indices
        rows = torch.nn.functional.pad(order[:, :count], (0, max(0, count - self.seq_len)))
        return rows, last.sum(1).clamp(max=count)

    def _start(self, device: torch.device) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.int64, device=device) if self.start is None else self.start.to(device)


@dataclass(frozen=True, eq=False)
class Probes:
    """The query rows whose attention is measured, in windows of consecutive rows.

    Attributes:
        rows: int64 [B, R] global positions, window after window, each from its last row back to its first.
        valid: bool [B, R]: False for a slot that names no row, or a row that an earlier slot names already.
        ends: int64 [B, windows] last row of each window.
        sizes: rows of each window; they sum to R.
    """

    rows: Tensor
    valid: Tensor
    ends: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def place(cls, documents: Documents, batch: int, probe: int, spread: int, device: torch.device) -> Probes:
        """Choose the probe rows; every rank chooses the same.

        One document: the last ``probe`` rows. Packed documents: ``probe`` is split evenly into four windows, dealt in
        turn to the four longest documents of the row, longest first; a document that gets several windows (there are
        fewer documents) has them back to back, from its end backwards. So a row with a single document has exactly the
        last ``probe`` rows. A window longer than its document goes on into the rows before it, which see their own
        document.

        ``spread`` adds so many windows of ``probe`` rows that end at S * g // (spread + 1), g = 1 .. spread.
        """
        size, probe = documents.seq_len, min(probe, documents.seq_len)
        if documents.start is None:
            sizes, ends = [probe], [torch.full((batch,), size - 1, device=device)]
        else:
            sizes, ends = _document_windows(documents, probe)
        for group in range(1, spread + 1):
            sizes.append(probe)
            ends.append(torch.full((batch,), size * group // (spread + 1) - 1, device=device))
        windows = [end[:, None] - torch.arange(n, device=device) for end, n in zip(ends, sizes, strict=True)]
        rows = torch.cat(windows, 1)
        named = rows[:, :, None] == rows[:, None, :]
        valid = (rows >= 0) & ~named.tril(-1).any(2)
        return cls(rows, valid, torch.stack(ends, 1), tuple(sizes))


def _document_windows(documents: Documents, probe: int) -> tuple[list[int], list[Tensor]]:
    count = min(PROBED_DOCUMENTS, probe)
    sizes = [probe // count + (window < probe % count) for window in range(count)]
    last, present = documents.last_rows(count)
    # skipped[d][w]: rows that earlier windows take from the same document when d documents share the windows.
    skipped = [[sum(sizes[w % d : w : d]) for w in range(count)] for d in range(1, count + 1)]
    table = upload(torch.tensor(skipped), last.device)[present - 1]
    turn = torch.arange(count, device=last.device) % present[:, None]
    return sizes, list((last.gather(1, turn) - table).unbind(1))
