"""Public texts that lie in a folder of ``--data-dir``: plain text, JSON lines or JSON, in the order of their names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtrain.data.documents import Document, read_jsonl, read_text
from mtrain.errors import DataError, EvalError
from mtrain_eval.sample import SuiteOptions

_PLAIN = (".txt", ".md", ".txt.gz")
_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz")


def text_files(folder: Path) -> list[Path]:
    """Files of texts in a folder (not below it), sorted by name; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    wanted = (*_PLAIN, *_LINES, ".json")
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(wanted))


def texts_of(options: SuiteOptions, name: str, what: str) -> list[Path]:
    """Files of texts in a folder of the data directory; empty when there is no such folder, or no data directory.

    Args:
        options: as for every suite.
        name: of the folder.
        what: belongs there, for the error.

    Raises:
        EvalError: the folder is there and holds no text, and none may be fetched: somebody meant to have the data.
    """
    if options.data_dir is None:
        return []
    folder = Path(options.data_dir) / name
    files = text_files(folder)
    if folder.is_dir() and not files and not options.online:
        raise EvalError(
            f"data-dir: {folder} holds no text (*.txt, *.md, *.json, *.jsonl); put {what} there, or take the folder away for a "
            "made-up stand-in"
        )
    return files


def read_texts(files: list[Path]) -> Iterator[Document]:
    """The texts in these files: a plain file is one text, a row of JSON lines or JSON its field ``text``.

    Raises:
        EvalError: a file that cannot be read so, with its name and line.
    """
    try:
        for file in files:
            if file.name.endswith(_PLAIN):
                yield from read_text(str(file))
            elif file.name.endswith(_LINES):
                yield from read_jsonl(str(file))
            else:
                yield from _read_json(file)
    except (DataError, OSError) as error:
        raise EvalError(f"data-dir: {error}") from error


def _read_json(file: Path) -> Iterator[Document]:
    """``{"text": ..}``, a list of such or of strings; a file that is JSON lines under another name is read as these."""
    try:
        content: Any = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert the file first") from error
    except json.JSONDecodeError:
        yield from read_jsonl(str(file))
        return
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise DataError(
                f'{file}: entry {number} is no text; expected {{"text": ".."}}, a string, or a list of these'
            )
        yield Document(text, f"{file}: entry {number}")
