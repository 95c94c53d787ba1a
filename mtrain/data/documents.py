"""Documents: text from local files, Hugging Face datasets and the standard library, validated row by row.

Every reader yields :class:`Document` in a fixed order. A row that cannot be used stops the run with its file and line,
because the loaders underneath turn a missing field or a null into training data without a word.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.errors import DataError

_log = logging.getLogger(__name__)
_SUFFIXES = {
    "text": (".txt", ".md", ".txt.gz"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".json"),
    "parquet": (".parquet",),
}
_STDLIB_SKIP = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
    "pydoc_data",
    "encodings",
}
_STDLIB_MIN_BYTES = 600


@dataclass(frozen=True)
class Document:
    """A text and where it came from (``file:line``, for messages)."""

    text: str
    where: str


@dataclass
class BadRows:
    """Counts rows that cannot be used; raises DataError at the first one beyond the allowed fraction.

    ``max_fraction`` is checked against the rows seen so far once 100 have been seen, and again by :meth:`finish`.
    """

    max_fraction: float = 0.0
    seen: int = 0
    bad: int = 0

    def good(self) -> None:
        self.seen += 1

    def report(self, where: str, problem: str) -> None:
        self.seen += 1
        self.bad += 1
        message = f"{where}: {problem}"
        if self.max_fraction <= 0:
            raise DataError(
                f"{message}; mend or delete the row, or allow some with options: {{max_bad_fraction: 0.01}}"
            )
        if self.bad <= 5:
            _log.warning("bad row skipped: %s", message)
        if self.seen >= 100:
            self._check(message)

    def finish(self) -> None:
        if self.bad:
            _log.warning("%d of %d rows were bad and skipped", self.bad, self.seen)
            self._check("at the end of the data")

    def _check(self, message: str) -> None:
        if self.bad > self.max_fraction * self.seen:
            raise DataError(
                f"{self.bad} of {self.seen} rows are bad, more than max_bad_fraction {self.max_fraction:g} allows ({message})"
            )


def find_files(path: str, kind: str) -> list[Path]:
    """Files behind ``path`` (a file, a directory searched recursively, or a glob), sorted; DataError when there are none."""
    wanted = " ".join(_SUFFIXES[kind])
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES[kind]))
        if not found:
            raise DataError(f"data: the directory {path!r} holds no {kind} file ({wanted})")
        return found
    found = sorted(p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file())
    if not found:
        raise DataError(f"data: nothing at {path!r}; give a {kind} file, a directory of them ({wanted}), or a glob")
    return found


def read_text(path: str, by: str = "document") -> Iterator[Document]:
    """Plain text: one document per file, per blank-line separated ``paragraph``, or per ``line``. Must be UTF-8."""
    for file in find_files(path, "text"):
        if by == "document":
            with _open(file) as handle:
                yield Document(_decode(handle.read(), str(file)), str(file))
            continue
        lines: list[str] = []
        start = 1
        with _open(file) as handle:
            for number, raw in enumerate(handle, 1):
                line = _decode(raw, f"{file}:{number}")
                if by == "line":
                    yield Document(line.rstrip("\r\n"), f"{file}:{number}")
                elif line.strip():
                    start = start if lines else number
                    lines.append(line)
                elif lines:
                    yield Document("".join(lines), f"{file}:{start}")
                    lines = []
        if lines:
            yield Document("".join(lines), f"{file}:{start}")


def read_jsonl(path: str, field: str = "text", bad: BadRows | None = None) -> Iterator[Document]:
    """One JSON object per line; ``field`` must be a string in each. Blank lines are skipped, a byte order mark is dropped."""
    bad = bad or BadRows()
    for file in find_files(path, "jsonl"):
        with _open(file) as handle:
            number = 0
            try:
                for number, raw in enumerate(handle, 1):
                    if number == 1:
                        raw = raw.removeprefix(b"\xef\xbb\xbf")
                    if not raw.strip():
                        continue
                    text, problem = _json_text(raw, field)
                    if text is None:
                        bad.report(f"{file}:{number}", problem)
                        continue
                    bad.good()
                    yield Document(text, f"{file}:{number}")
            except (EOFError, gzip.BadGzipFile, OSError) as error:
                raise DataError(
                    f"{file}:{number + 1}: the file ends or breaks here ({error}); copy it again"
                ) from error
    bad.finish()


def read_parquet(path: str, field: str = "text", bad: BadRows | None = None) -> Iterator[Document]:
    """The string column ``field`` of parquet files, in row order; nulls and other types are errors naming file and row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = bad or BadRows()
    for file in find_files(path, "parquet"):
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable parquet file ({' '.join(str(error).split())[:120]})") from error
        columns = table.schema_arrow.names
        if field not in columns:
            raise DataError(f"{file}: no column {field!r}; it has {', '.join(columns)} (set `field` to one of them)")
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{file}: column {field!r} is {kind}, not text; set `field` to a string column")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    bad.report(f"{file}: row {row}", f"field {field!r} is null")
                    continue
                bad.good()
                yield Document(text, f"{file}: row {row}")
    bad.finish()


def open_hf(path: str, name: str | None, split: str, streaming: bool, revision: str | None = None) -> Any:
    """A Hugging Face dataset (hub id or local dataset directory); DataError when it cannot be had."""
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # the library raises a dozen types here (hub, builder, split, network)
        reason = " ".join(str(error).split())[:200]
        what = f"{path!r}" + (f" ({name})" if name else "") + f", split {split!r}"
        raise DataError(f"data: the dataset {what} does not load: {type(error).__name__}: {reason}") from error


def hf_documents(
    rows: Iterator[Mapping[str, Any]], path: str, field: str, first: int = 0, bad: BadRows | None = None
) -> Iterator[Document]:
    """Documents from dataset rows; ``first`` is the number of rows already passed (for messages)."""
    bad = bad or BadRows()
    index = first
    try:
        for index, row in enumerate(rows, first):
            text, problem = _field_text(row, field)
            if text is None:
                bad.report(f"{path}: row {index}", problem)
                yield Document("", f"{path}: row {index}")  # keeps the count of rows exact for a resumed cursor
                continue
            bad.good()
            yield Document(text, f"{path}: row {index}")
    except DataError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("datasets", "pyarrow", "fsspec", "json", "huggingface_hub")):
            raise
        raise DataError(
            f"{path}: after row {index}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def read_stdlib() -> Iterator[Document]:
    """Source files of Python's standard library, ordered by path; tests, generated tables and stubs under 600 bytes left out.

    The files are those of the running interpreter, so another Python version gives other documents.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        inside = file.relative_to(root)
        if _STDLIB_SKIP & set(inside.parts) or inside.name.startswith("_sysconfigdata"):
            continue
        raw = file.read_bytes()
        if len(raw) >= _STDLIB_MIN_BYTES:
            yield Document(raw.decode("utf-8", "replace"), f"python-stdlib/{inside.as_posix()}")


def content_hash(text: str) -> int:
    """Stable 63-bit hash of a document's text: decides the held-out split and detects changed data."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _json_text(raw: bytes, field: str) -> tuple[str | None, str]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 ({error.reason} at byte {error.start})"
    except (json.JSONDecodeError, RecursionError) as error:
        return None, f"not valid JSON ({error})"
    if not isinstance(row, dict):
        return None, f"expected a JSON object with a field {field!r}, found {type(row).__name__}"
    return _field_text(row, field)


def _field_text(row: Mapping[str, Any], field: str) -> tuple[str | None, str]:
    if field not in row:
        return None, f"no field {field!r}; the row has {', '.join(map(repr, list(row)[:8])) or 'no fields'}"
    value = row[field]
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        return None, f"field {field!r} should be text, found {found}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return None, f"field {field!r} holds half a surrogate pair at character {error.start}"
    return value, ""


def _open(file: Path) -> Any:
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rb")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first") from error
