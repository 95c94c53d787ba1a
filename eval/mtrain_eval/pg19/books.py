"""The books: PG-19's test set where it is at hand, else library source that mtrain never trains on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from mtrain.data.documents import Document, content_hash, hf_documents, open_hf, read_stdlib
from mtrain.data.store import TokenStore
from mtrain.errors import DataError, EvalError
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.texts import read_texts, texts_of
from mtrain_eval.tokens import encode_prompt

FOLDER = "pg19"
_HUB = "emozilla/pg19-test"


class Books:
    """Tokenised documents in a fixed order, read when first asked for.

    ``source`` is ``local`` for texts from DATA_DIR/pg19, ``published`` for the hub's, ``synthetic`` for the stand-in: the
    twentieth of Python's standard library that mtrain's own sources hold out.

    Raises:
        EvalError: a folder of books without any.
    """

    def __init__(self, options: SuiteOptions) -> None:
        self.options = options
        self.files = texts_of(options, FOLDER, "the books of PG-19's test set")
        self.source = "local" if self.files else "published" if options.online else "synthetic"

    def missing(self) -> str | None:
        """What is missing in a data directory that was given, and what to do; None: nothing is, or none was given."""
        if self.options.data_dir is None or self.source != "synthetic":
            return None
        return (
            f"no books in {Path(self.options.data_dir) / FOLDER}: put the test books of PG-19 there as text files; or give "
            f"--online to fetch {_HUB}; or leave out --data-dir for a stand-in"
        )

    @cached_property
    def named(self) -> list[tuple[str, np.ndarray]]:
        """(name, ids int64 [n]) of each document, with the special tokens that the tokenizer puts before a text.

        Raises:
            EvalError: there is no text, or it cannot be read or fetched.
        """
        found = [
            (Path(document.where).name, encode_prompt(self.options.tokenizer, document.text))
            for document in self._read()
            if document.text.strip()
        ]
        if not found:
            raise EvalError(
                f"data-dir: {self.files[0].parent} holds no text; put the books of PG-19's test set there as text files"
                if self.files
                else f"pg19: the dataset {_HUB} holds no text"
            )
        return found

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each."""
        return np.array([len(ids) for _, ids in self.named], dtype=np.int64)

    def join(self, documents: list[int]) -> np.ndarray:
        """The ids of some documents in a row: one start token at the very beginning, an end token between two."""
        tokenizer = self.options.tokenizer
        between = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int64)
        parts: list[np.ndarray] = []
        for number in documents:
            ids = self.named[number][1]
            if parts:
                parts.append(between)
                ids = ids[1:] if ids[:1] == tokenizer.bos_token_id else ids
            parts.append(ids)
        return np.concatenate(parts)

    def seam(self, document: int) -> int:
        """Tokens that a document adds when it follows another, beyond its own: the end token, less its start token."""
        tokenizer = self.options.tokenizer
        starts = bool(self.named[document][1][:1] == tokenizer.bos_token_id)
        return int(tokenizer.eos_token_id is not None) - int(starts)

    def _read(self) -> Iterator[Document]:
        if self.files:
            yield from read_texts(self.files)
        elif self.options.online:
            yield from _fetch()
        else:
            yield from _held_out()


def _fetch() -> Iterator[Document]:
    try:
        yield from hf_documents(iter(open_hf(_HUB, None, "test", streaming=False)), _HUB, "text")
    except DataError as error:
        raise EvalError(
            f"{error}; without a network put the test books of PG-19 as text files into DATA_DIR/{FOLDER} and give --data-dir "
            "DATA_DIR, or leave out --online for a stand-in"
        ) from error


def _held_out() -> Iterator[Document]:
    documents = list(read_stdlib())
    hashes = np.array([content_hash(document.text) for document in documents], dtype=np.int64)
    # Only the hashes decide, so nothing needs to be tokenised to know which documents training never sees.
    chosen = TokenStore(np.zeros(0, np.uint16), np.zeros(len(hashes) + 1, np.int64), hashes).held_out()
    held = [document for document, one in zip(documents, chosen, strict=True) if one]
    # Longest first: under a limit every length is then measured on the same documents, as long as they last.
    yield from sorted(held, key=lambda document: (-len(document.text.encode()), document.where))
