"""Answers on disk: one JSON line per sample, there for good once written, found again on resuming.

    OUTPUT/<attention>/<task>/<length>.jsonl

A cell is one (attention, task, length). Dense and sparse attention never share a file. A line that is no row (a crash in
mid-write, a damaged disk) is moved to ``<length>.jsonl.broken-<n>``, and its sample is asked again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mtrain.errors import EvalError

ROW_KEYS = frozenset(
    "task suite length index scores prediction targets prompt_tokens generated_tokens truncated depth prefill_s decode_s "
    "density prompt_sha256 meta".split()
)
DOES_NOT_FIT = "does_not_fit"
LOCK = ".lock"


class Cell(NamedTuple):
    """One (attention, task, length): one file, one row of figures."""

    attention: str
    task: str
    length: int


class Store:
    """The rows of a run; used by the first rank only.

    Args:
        output: the run's directory.
        say: told about lines that were set aside.
    """

    def __init__(self, output: Path, say: Callable[[str], None] = print) -> None:
        self.output, self.say = output, say
        self._file: TextIO | None = None
        self._cell: Cell | None = None

    def path(self, cell: Cell) -> Path:
        """Where the rows of a cell stand."""
        return self.output / cell.attention / cell.task / f"{cell.length}.jsonl"

    def cells(self) -> list[Cell]:
        """Every cell that has a file, short lengths first."""
        found = [
            Cell(path.parent.parent.name, path.parent.name, int(path.stem))
            for path in self.output.glob("*/*/*.jsonl")
            if path.stem.isdecimal()
        ]
        return sorted(found, key=lambda cell: (cell.attention, cell.length, cell.task))

    def read(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of a cell by index, each sample once (the first row counts). Lines that are no rows are set aside.

        A cell that does not fit is the one row ``{"does_not_fit": reason}``.
        """
        path = self.path(cell)
        if not path.exists():
            return []
        good: dict[int, dict[str, Any]] = {}
        broken: list[bytes] = []
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            if not line.strip():
                continue
            row = _parse(line, cell)
            if row is None:
                broken.append(line)
            else:
                good.setdefault(row.get("index", -1), row)
        if len(good) > 1:
            good.pop(-1, None)  # samples were answered after all: the cell does fit
        rows = [good[index] for index in sorted(good)]
        if broken:
            self._set_aside(path, broken, rows)
        elif lines[-1].strip():
            # The last line is whole but its end is missing; the next row must not be glued to it.
            _replace(path, rows)
        return rows

    def append(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """Add a row; when this returns it is on the disk."""
        line = _line(row)
        if cell != self._cell or self._file is None:
            self.close()
            path = self.path(cell)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._cell = path.open("a", encoding="ascii"), cell
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the open file, if any."""
        if self._file is not None:
            self._file.close()
        self._file, self._cell = None, None

    def _set_aside(self, path: Path, broken: list[bytes], rows: list[dict[str, Any]]) -> None:
        number = 1
        while (aside := path.with_name(f"{path.name}.broken-{number}")).exists():
            number += 1
        aside.write_bytes(b"\n".join(broken) + b"\n")
        _replace(path, rows)
        lines = "1 broken line" if len(broken) == 1 else f"{len(broken)} broken lines"
        self.say(f"{path}: {lines} moved to {aside.name}; {len(rows)} good rows kept, the others are asked again")


def _parse(line: bytes, cell: Cell) -> dict[str, Any] | None:
    """A row of this cell, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    if DOES_NOT_FIT in row:
        return row if isinstance(row[DOES_NOT_FIT], str) and "index" not in row else None
    whole = (
        row.keys() >= ROW_KEYS
        and (row["task"], row["length"]) == (cell.task, cell.length)
        and type(row["index"]) is int
        and row["index"] >= 0
        and isinstance(row["scores"], dict)
        and all(type(value) in (int, float) and math.isfinite(value) for value in row["scores"].values())
        and isinstance(row["prompt_sha256"], str)
    )
    return row if whole else None


def _line(row: Mapping[str, Any]) -> str:
    """ASCII, so that no character of an answer (a line separator, half a surrogate pair) can end a line or fail to be written."""
    return json.dumps(row, allow_nan=False) + "\n"


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(_line(row) for row in rows))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep a second evaluation out of the same directory while this one writes.

    Raises:
        EvalError: another process is writing there.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nobody is kept out
        yield
        return
    with (output / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvalError(
                f"another evaluation is writing to {output}; wait for it, or give another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
