"""A corpus tokenised once: one flat array of ids plus document offsets, in memory or in a memory-mapped cache.

Random access is what makes training data independent of the number of processes and resumable without replay: row r of a
source is a slice of this array, never "whatever the iterator gives next".
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.documents import Document, content_hash
from mtrain.data.tokenizer import encode_texts, is_byte_tokenizer
from mtrain.errors import DataError

_CHUNK_CHARS = 1 << 22
_VERSION = 1
HELD_OUT_EVERY = 20


@dataclass(frozen=True)
class TokenStore:
    """``tokens`` [N] (uint16 or uint32), ``starts`` int64 [documents + 1], ``hashes`` int64 [documents] of the texts."""

    tokens: np.ndarray
    starts: np.ndarray
    hashes: np.ndarray

    def document(self, index: int) -> np.ndarray:
        """Ids of one document, int64 [n]."""
        return self.tokens[self.starts[index] : self.starts[index + 1]].astype(np.int64)

    def lengths(self) -> np.ndarray:
        """Tokens per document, int64 [documents]."""
        return np.diff(self.starts)

    def held_out(self) -> np.ndarray:
        """Bool [documents]: the twentieth of the documents kept for validation, chosen by content alone.

        Where that leaves none, the document with the smallest hash is held out; a lone document never is.
        """
        chosen = self.hashes % HELD_OUT_EVERY == 7
        if len(self.hashes) > 1 and (chosen.all() or not chosen.any()):
            chosen = np.arange(len(self.hashes)) == int(np.argmin(self.hashes))
        return chosen if len(self.hashes) > 1 else np.zeros(len(self.hashes), dtype=bool)

    def fingerprint(self) -> str:
        """Changes when a document, its order or the tokenisation changes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.hashes).tobytes())
        digest.update(np.ascontiguousarray(self.starts).tobytes())
        return digest.hexdigest()[:16]


def build_store(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    what: str,
    frame: bool = True,
    cache: Path | None = None,
    total: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Tokenise ``documents`` (empty ones are left out) into a store.

    ``frame`` puts the tokenizer's bos and eos, where it has them, around each document. With ``cache`` (a directory
    that belongs to this data and tokenizer) the store is written there once and memory-mapped from then on; of several
    processes one writes and the others wait. ``total`` is the size in bytes for the progress bar. Raises DataError when
    there is no text at all.
    """
    if cache is None:
        return _tokenise(documents, tokenizer, what, frame, None, total, progress)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with _alone(cache.with_name(cache.name + ".lock")):
        if not (cache / "store.json").is_file():
            for stale in cache.parent.glob(cache.name + ".*/"):  # of a process that was killed: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=cache.name + ".", dir=cache.parent))
            try:
                _tokenise(documents, tokenizer, what, frame, scratch, total, progress)
                os.replace(scratch, cache)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return _open_store(cache)


def cache_key(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], *more: Any) -> str:
    """Name of a cache directory: changes with the files (path, size, time), the tokenizer and every further argument."""
    digest = hashlib.sha256(repr((_VERSION, more)).encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    return digest.hexdigest()[:24]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the merges or the special tokens."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    text = core.to_str() if core is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokenise(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    frame: bool,
    folder: Path | None,
    total: int | None,
    progress: bool,
) -> TokenStore:
    from tqdm import tqdm

    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    head = np.array([tokenizer.bos_token_id] if frame and tokenizer.bos_token_id is not None else [], dtype=kind)
    tail = np.array([tokenizer.eos_token_id] if frame and tokenizer.eos_token_id is not None else [], dtype=kind)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    hashes: list[int] = []
    sink = open(folder / "tokens.bin", "wb") if folder else None
    quiet = not progress or (total is not None and total < 1 << 25 and is_byte_tokenizer(tokenizer))
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenising {what}", disable=quiet, leave=False) as bar:
            for texts in _chunks(documents):
                for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
                    piece = np.concatenate([head, ids.astype(kind), tail])
                    lengths.append(len(piece))
                    hashes.append(content_hash(text))
                    if sink:
                        sink.write(piece.tobytes())
                    else:
                        parts.append(piece)
                bar.update(sum(len(text) for text in texts))
    finally:
        if sink:
            sink.close()
    if not lengths:
        raise DataError(f"data: {what} holds no text; give files or rows with at least one non-empty document")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    store = TokenStore(np.concatenate(parts) if parts else np.empty(0, kind), starts, np.array(hashes, dtype=np.int64))
    if folder:
        np.save(folder / "starts.npy", store.starts)
        np.save(folder / "hashes.npy", store.hashes)
        (folder / "store.json").write_text(
            json.dumps({"version": _VERSION, "dtype": np.dtype(kind).name, "tokens": int(starts[-1])})
        )
    return store


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: several processes may tokenise, and the last rename wins or fails loudly
        yield
        return
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _open_store(folder: Path) -> TokenStore:
    about = json.loads((folder / "store.json").read_text())
    file = folder / "tokens.bin"
    if file.stat().st_size != about["tokens"] * np.dtype(about["dtype"]).itemsize:
        raise DataError(
            f"data: the token cache {folder} is damaged (size of tokens.bin); delete that directory and start again"
        )
    tokens = np.memmap(file, dtype=about["dtype"], mode="r")
    return TokenStore(tokens, np.load(folder / "starts.npy"), np.load(folder / "hashes.npy"))


def _chunks(documents: Iterator[Document]) -> Iterator[list[str]]:
    """Non-empty texts in groups of a few million characters: the unit handed to the tokenizer."""
    texts: list[str] = []
    chars = 0
    for document in documents:
        if not document.text.strip():
            continue
        texts.append(document.text)
        chars += len(document.text)
        if chars >= _CHUNK_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
