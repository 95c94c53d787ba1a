"""Rows: fixed-length slices of training data with shifted labels and document starts.

Three arrays say everything about a row of S tokens:

    tokens     the input ids
    labels     labels[i] is the token that position i must predict, or -100
    doc_start  first position of the document that holds position i (the document mask of the attention)

A label never crosses a document: the last token of a document, padding and masked tokens have label -100. A document
that is longer than its row goes on in the next row as a document of its own, so the first token of the continuation is
context there and a target nowhere. That one target per cut is all that packing loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mtrain.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One document, or a piece of one: ``tokens`` int64 [n] and ``targets`` bool [n], True where the token is worth predicting."""

    tokens: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray) -> Sample:
        """A sample whose every token is a target (plain language modelling)."""
        return cls(tokens, np.ones(len(tokens), dtype=bool))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Row:
    """One row of S tokens; ``tokens``, ``labels`` and ``doc_start`` are int64 [S] (meaning: module docstring)."""

    tokens: torch.Tensor
    labels: torch.Tensor
    doc_start: torch.Tensor


def make_row(samples: Sequence[Sample], seq_len: int, pad: int) -> Row:
    """Lay samples side by side in one row; what is left over at the end is padding, a document of its own without labels.

    Raises ValueError when the samples hold more than ``seq_len`` tokens: cutting is the caller's decision.
    """
    tokens = np.full(seq_len, pad, dtype=np.int64)
    targets = np.zeros(seq_len, dtype=bool)
    doc_start = np.empty(seq_len, dtype=np.int64)
    at = 0
    for sample in samples:
        end = at + len(sample)
        if end > seq_len:
            raise ValueError(
                f"samples of {sum(map(len, samples))} tokens do not fit in a row of {seq_len}; cut them first"
            )
        tokens[at:end], targets[at:end], doc_start[at:end] = sample.tokens, sample.targets, at
        at = end
    doc_start[at:] = at
    return Row(
        torch.from_numpy(tokens),
        torch.from_numpy(shifted_labels(tokens, targets, doc_start)),
        torch.from_numpy(doc_start),
    )


def shifted_labels(tokens: np.ndarray, targets: np.ndarray, doc_start: np.ndarray) -> np.ndarray:
    """Labels [S]: the next token where it belongs to the same document and is a target, else -100."""
    labels = np.full(len(tokens), IGNORE, dtype=np.int64)
    keep = (doc_start[1:] == doc_start[:-1]) & targets[1:]
    labels[:-1][keep] = tokens[1:][keep]
    return labels


def fill_row(
    take: Callable[[int], np.ndarray], seq_len: int, pad: int, *, packing: bool = True, piece: int | None = None
) -> Row:
    """One row from ``take(n)``, which returns the next 1..n tokens of the document at hand and then moves on.

    ``packing``: pieces follow each other until the row is full; otherwise the row is one piece, padded.
    ``piece`` (a curriculum's sample length): documents also end at every multiple of it within the row.
    """
    piece = min(piece or seq_len, seq_len)
    samples: list[Sample] = []
    filled = 0
    while filled < seq_len:
        tokens = take(min(seq_len - filled, piece - filled % piece))
        samples.append(Sample.of(tokens))
        filled += len(tokens)
        if not packing:
            break
    return make_row(samples, seq_len, pad)


def sample_lengths(seq_len: int, length: int | None, packing: bool, shortest: int, name: str) -> list[int]:
    """Lengths of the made-to-measure samples that fill one row; a rest too short for the ``shortest`` sample becomes padding."""
    length = min(length or seq_len, seq_len)
    if length < shortest:
        raise DataError(
            f"data: {name}: samples of {length} tokens are too short, its largest take {shortest}; raise `length` "
            "(or train.seq_len) or ask for fewer pairs and questions"
        )
    if not packing:
        return [length]
    rest = seq_len % length
    return [length] * (seq_len // length) + ([rest] if rest >= shortest else [])
