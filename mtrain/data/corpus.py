"""Text as training rows: random access into a token store, and a sequential cursor over a streamed dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.documents import Document, content_hash
from mtrain.data.packing import IGNORE, Row, Sample, fill_row, make_row
from mtrain.data.source import Source, seeded
from mtrain.data.store import HELD_OUT_EVERY, TokenStore
from mtrain.data.tokenizer import encode_texts, pad_id
from mtrain.errors import DataError

_MARKS = 1024


class CorpusSource(Source):
    """Rows cut from the documents of a store.

    Each epoch is the documents in a new order, one after the other. With packing, row r is tokens r*S .. (r+1)*S of that
    endless stream, so no token is ever left out; a document cut by the end of a row goes on in the next row. Without
    packing each row is one piece of at most S tokens of one document, padded; ``full_pieces`` leaves the shorter ones out.
    ``length`` shortens documents (curriculum).
    """

    def __init__(
        self,
        store: TokenStore,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        seed: int,
        seq_len: int,
        documents: np.ndarray | None = None,
        packing: bool = True,
        length: int | None = None,
        shuffle: bool = True,
        full_pieces: bool = False,
    ) -> None:
        self.name, self.seed, self.seq_len, self.shuffle = name, seed, seq_len, shuffle
        self.packing = packing and not full_pieces
        self.piece = min(length or seq_len, seq_len)
        self.store, self.pad = store, pad_id(tokenizer)
        self.documents = np.arange(len(store.hashes)) if documents is None else documents
        lengths = store.lengths()[self.documents]
        pieces = lengths // self.piece if full_pieces else -(-lengths // self.piece)
        self._sizes = lengths if self.packing else pieces
        if int(self._sizes.sum()) == 0:
            raise DataError(f"data: {name} has no document" + (f" of {self.piece} tokens" if full_pieces else ""))
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def row(self, index: int) -> Row:
        """See :meth:`Source.row`; may be asked in any order."""
        if self.packing:
            return fill_row(_Walk(self, index * self.seq_len).take, self.seq_len, self.pad, piece=self.piece)
        epoch, at = divmod(index, int(self._sizes.sum()))
        document, piece = self._locate(epoch, at)
        tokens = self.store.document(document)[piece * self.piece : (piece + 1) * self.piece]
        return make_row([Sample.of(tokens)], self.seq_len, self.pad)

    def state_dict(self, rows: int) -> dict[str, Any]:
        """The fingerprint of the data: rows are a function of their number, as long as the data is the same."""
        return {"fingerprint": self.store.fingerprint(), "documents": len(self.documents)}

    def load_state_dict(self, state: Mapping[str, Any], rows: int) -> None:
        """Refuse to go on with other data."""
        now = self.state_dict(rows)
        if dict(state) != now:
            raise DataError(
                f"data: {self.name} is not the data of the checkpoint ({dict(state)} then, {now} now); restore the files, the "
                "tokenizer, data.validation_rows (0 trains on every document, more leaves the held-out ones out) and, for "
                "python-stdlib, the Python version, or start afresh with checkpoint.resume=never"
            )

    def _locate(self, epoch: int, at: int) -> tuple[int, int]:
        """(document in the store, offset inside it) of unit ``at`` of an epoch."""
        order, ends = self._order(epoch)
        place = int(np.searchsorted(ends, at, side="right"))
        before = int(ends[place - 1]) if place else 0
        return int(self.documents[order[place]]), at - before

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._orders:
            count = len(self.documents)
            order = (
                seeded(self.seed, self.name, "epoch", epoch).permutation(count) if self.shuffle else np.arange(count)
            )
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order, np.cumsum(self._sizes[order])
        return self._orders[epoch]


class _Walk:
    """A reader of the endless stream of a packed corpus, from token ``start`` on."""

    def __init__(self, source: CorpusSource, start: int) -> None:
        self.source = source
        self.total = int(source._sizes.sum())
        self.at = start

    def take(self, limit: int) -> np.ndarray:
        epoch, inside = divmod(self.at, self.total)
        document, offset = self.source._locate(epoch, inside)
        store = self.source.store
        begin = int(store.starts[document]) + offset
        tokens = store.tokens[begin : min(begin + limit, int(store.starts[document + 1]))]
        self.at += len(tokens)
        return tokens.astype(np.int64)


class StreamSource(Source):
    """Rows from documents that can only be read in order (a streamed hub dataset).

    The cursor is (epoch, rows of the dataset passed in this epoch, tokens passed in the open document), taken where a row
    starts. Every process reads the whole stream and keeps its own rows, so the rows do not depend on how many there are.
    Asking for an earlier row goes back to a remembered cursor, or to the beginning.

    ``open_at(epoch, first)`` gives the documents of an epoch from dataset row ``first`` on; an empty text stands for a
    row to pass over, so that counting rows stays exact.
    """

    def __init__(
        self,
        open_at: Callable[[int, int], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        seq_len: int,
        packing: bool = True,
        length: int | None = None,
        held_out: bool | None = None,
    ) -> None:
        self.name, self.seq_len, self.packing = name, seq_len, packing
        self.piece = min(length or seq_len, seq_len)
        self.pad, self.tokenizer, self.open_at, self.held_out = pad_id(tokenizer), tokenizer, open_at, held_out
        self._marks: dict[int, tuple[int, int, int]] = {}
        self._restore(0, (0, 0, 0))

    def row(self, index: int) -> Row:
        """See :meth:`Source.row`; cheap for the next row, reads forward to a later one."""
        self._go_to(index)
        return self._read()

    def state_dict(self, rows: int) -> dict[str, Any]:
        """The cursor at the start of row ``rows``; reads forward when this process has not been there yet."""
        self._go_to(rows)
        epoch, passed, offset = self._cursor()
        return {"epoch": epoch, "passed": passed, "offset": offset}

    def load_state_dict(self, state: Mapping[str, Any], rows: int) -> None:
        """Go to a cursor without reading the rows before it."""
        self._marks = {}
        self._restore(rows, (int(state["epoch"]), int(state["passed"]), int(state["offset"])))

    def _go_to(self, row: int) -> None:
        if row < self._row:
            mark = max((m for m in self._marks if m <= row), default=0)
            self._restore(mark, self._marks.get(mark, (0, 0, 0)))
        while self._row < row:
            self._read()

    def _read(self) -> Row:
        if len(self._marks) >= _MARKS:
            self._marks.pop(next(iter(self._marks)))
        self._marks[self._row] = self._cursor()
        row = fill_row(self._take, self.seq_len, self.pad, packing=self.packing, piece=self.piece)
        self._row += 1
        return row

    def _cursor(self) -> tuple[int, int, int]:
        if len(self._open) == 0:  # a document that ended with the row counts as passed
            return self._epoch, self._passed, 0
        return self._epoch, self._passed - 1, self._offset

    def _restore(self, row: int, cursor: tuple[int, int, int]) -> None:
        self._epoch, self._passed, offset = cursor
        self._row, self._useful = row, self._passed > 0
        self._documents = self.open_at(self._epoch, self._passed)
        self._open, self._offset = np.empty(0, dtype=np.int64), 0
        if offset:
            self._next_document()
            self._open, self._offset = self._open[offset:], offset

    def _take(self, limit: int) -> np.ndarray:
        while len(self._open) == 0:
            self._next_document()
        tokens, self._open = self._open[:limit], self._open[limit:]
        self._offset += len(tokens)
        return tokens

    def _next_document(self) -> None:
        document = next(self._documents, None)
        if document is None:
            if not self._useful:
                raise DataError(
                    f"data: {self.name} holds no text; give a dataset and split with at least one non-empty document"
                )
            self._epoch, self._passed, self._useful = self._epoch + 1, 0, False
            self._documents = self.open_at(self._epoch, 0)
            return
        self._passed += 1
        text = document.text
        if not text.strip():
            return
        if self.held_out is not None and (content_hash(text) % HELD_OUT_EVERY == 7) != self.held_out:
            return
        self._useful = True
        (ids,) = encode_texts(self.tokenizer, [text])
        head, tail = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        frame = ([] if head is None else [head], [] if tail is None else [tail])
        self._open, self._offset = np.concatenate([frame[0], ids, frame[1]]).astype(np.int64), 0


class TailLoss(Source):
    """Another source's rows with the loss on their last ``count`` tokens only.

    The loss is a mean over targets, so a row of text outweighs the few answers of a retrieval row a hundredfold; this
    keeps text in the mixture, all of it as context, at a weight of one's choice.
    """

    def __init__(self, source: Source, count: int) -> None:
        self.name, self.source, self.count = source.name, source, count

    def row(self, index: int) -> Row:
        """See :meth:`Source.row`."""
        row = self.source.row(index)
        labels = row.labels.clone()
        labels[: max(0, len(labels) - self.count - 1)] = IGNORE
        return Row(row.tokens, labels, row.doc_start)

    def state_dict(self, rows: int) -> dict[str, Any]:
        """That of the other source."""
        return self.source.state_dict(rows)

    def load_state_dict(self, state: Mapping[str, Any], rows: int) -> None:
        """To the other source."""
        self.source.load_state_dict(state, rows)
