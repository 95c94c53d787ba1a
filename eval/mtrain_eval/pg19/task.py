"""Perplexity at full length in one pass, and over rolling windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrain.errors import EvalError
from mtrain_eval.pg19.books import Books
from mtrain_eval.pg19.figures import nll_sums, perplexity, perplexity_figures
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_rng

_SHORTEST = 16
# With fewer books as long as this, books are joined: one book alone says nothing about the error.
_ENOUGH = 3


class BooksTask:
    """What both tasks share: how a sample is scored and what is made of many."""

    suite = "pg19"
    metric = "perplexity"
    name: str

    def __init__(self, options: SuiteOptions, books: Books | None = None) -> None:
        self.options = options
        self.books = books or Books(options)
        self.source = self.books.source

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """The sums of `nll_sums`, ``words`` and ``bytes`` of the scored text, and ``perplexity`` of it."""
        if prediction.logprobs is None or len(prediction.logprobs) != len(sample.ids) - 1:
            raise EvalError(f"{self.name}: expected the log-probabilities of {len(sample.ids) - 1} tokens")
        sums = nll_sums(prediction.logprobs, sample.meta["scored_from"])
        return {
            "perplexity": perplexity(sums["nll_sum"], sums["tokens"]),
            **sums,
            "words": float(sample.meta["words"]),
            "bytes": float(sample.meta["bytes"]),
        }

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """See `perplexity_figures`."""
        return perplexity_figures(rows)

    def _sample(self, length: int, index: int, ids: np.ndarray, scored_from: int, meta: dict[str, Any]) -> Sample:
        decode = self.options.tokenizer.decode
        text = str(decode(ids[scored_from:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        counts = {"scored_from": scored_from, "words": len(text.split()), "bytes": len(text.encode())}
        return Sample(self.name, length, index, ids, kind="score", meta={**meta, **counts, "corpus": self.source})

    def _check(self, length: int, index: int, count: int) -> None:
        if not 0 <= index < count:
            raise EvalError(f"{self.name}: there is no sample {index} at length {length}, only {count}")


class BooksWhole(BooksTask):
    """The first ``length`` tokens of every book that has as many, each in one pass.

    With fewer than 3 such books, books are joined in their order, an end token between two, into pieces of this length;
    ``meta.joined`` says how many.
    """

    name = "pg19"

    def __init__(self, options: SuiteOptions, books: Books | None = None) -> None:
        super().__init__(options, books)
        self._known: dict[int, list[list[int]]] = {}

    def count(self, length: int) -> int | None:
        """See Task: 0 never, because a length that no text fills does not fit."""
        return len(self._pieces(length))

    def sample(self, length: int, index: int) -> Sample:
        """See Task."""
        pieces = self._pieces(length)
        self._check(length, index, len(pieces))
        documents = pieces[index]
        names = [self.books.named[number][0] for number in documents]
        meta = {
            "document": documents[0],
            "titles": names[:4],
            "joined": len(documents),
            "long_enough": int((self.books.lengths >= length).sum()),
        }
        return self._sample(length, index, self.books.join(documents)[:length], 1, meta)

    def _pieces(self, length: int) -> list[list[int]]:
        """Which documents make up each sample."""
        if length not in self._known:
            self._known[length] = self._divide(length)
        return self._known[length]

    def _divide(self, length: int) -> list[list[int]]:
        lengths = self.books.lengths
        enough = np.flatnonzero(lengths >= length).tolist()
        if len(enough) >= _ENOUGH and length >= _SHORTEST:
            return [[number] for number in enough]
        pieces: list[list[int]] = []
        piece: list[int] = []
        size = 0
        for number in range(len(lengths)):
            size += int(lengths[number]) + (self.books.seam(number) if piece else 0)
            piece.append(number)
            if size >= length:
                pieces.append(piece)
                piece, size = [], 0
        if not pieces or length < _SHORTEST:
            raise DoesNotFitError(
                f"{self.name}: all {len(lengths)} texts together are {int(lengths.sum())} tokens long, {length} were asked for; "
                f"it takes at least {_SHORTEST} tokens and at most what there is (more books: --data-dir or --online)",
                _SHORTEST if length < _SHORTEST else None,
            )
        return pieces


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` .. ``end`` - 1 of a document; those from ``scored`` on have not been scored by another window."""

    document: int
    begin: int
    end: int
    scored: int


class BooksRolling(BooksTask):
    """Windows of ``length`` tokens over every book; each token but a book's first is scored once.

    ``stride`` new tokens per window after the first (default: half the length, so every one of them sees at least that much);
    length - 1 makes the windows disjoint but for one token of context. The order of the windows is shuffled by the seed, so
    that a limit takes a sample of all books.
    """

    name = "pg19_rolling"

    def __init__(self, options: SuiteOptions, books: Books | None = None, stride: int | None = None) -> None:
        super().__init__(options, books)
        self.stride = stride
        self._windows: dict[int, list[Window]] = {}

    def count(self, length: int) -> int | None:
        """See Task: all windows."""
        return len(self._all(length))

    def sample(self, length: int, index: int) -> Sample:
        """See Task."""
        windows = self._all(length)
        self._check(length, index, len(windows))
        window = windows[index]
        name, ids = self.books.named[window.document]
        meta = {"document": window.document, "titles": [name], "begin": window.begin, "end": window.end}
        return self._sample(length, index, ids[window.begin : window.end], window.scored - window.begin, meta)

    def _all(self, length: int) -> list[Window]:
        stride = self.stride if self.stride is not None else length // 2
        if length < _SHORTEST or not 0 < stride < length:
            raise DoesNotFitError(
                f"{self.name}: windows of {length} tokens with {stride} new ones each; expected a length of at least {_SHORTEST} "
                "and a stride from 1 to the length - 1",
                _SHORTEST,
            )
        if length not in self._windows:
            made = [window for number in range(len(self.books.lengths)) for window in self._of(number, length, stride)]
            order = sample_rng(self.options.seed, self.name, length, 0, "order").permutation(len(made))
            self._windows[length] = [made[i] for i in order]
        return self._windows[length]

    def _of(self, document: int, length: int, stride: int) -> list[Window]:
        size = int(self.books.lengths[document])
        if size < 2:
            return []
        windows = [Window(document, 0, min(length, size), 1)]
        while windows[-1].end < size:
            scored = windows[-1].end
            end = min(scored + stride, size)
            windows.append(Window(document, max(0, end - length), end, scored))
        return windows
