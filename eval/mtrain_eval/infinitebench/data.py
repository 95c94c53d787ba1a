"""InfiniteBench's own files: JSON lines, one file per task, from ``DATA_DIR/infinitebench`` or from the hub.

The hub serves the same files, so one is fetched as it is, and only when its task is asked; no table of all tasks is built.
Rows are read one at a time where they stand: a file may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mtrain.errors import EvalError
from mtrain_eval.infinitebench.catalogue import ENTRIES, Entry
from mtrain_eval.infinitebench.labels import restore
from mtrain_eval.sample import SuiteOptions

FOLDER = "infinitebench"
HUB = "xinrongzhang2022/InfiniteBench"
_WHERE = f"https://huggingface.co/datasets/{HUB}/resolve/main"


@dataclass(frozen=True)
class Row:
    """One row: its id as written (else its number), the texts, and the label in the official type."""

    id: Any
    context: str
    question: str
    options: tuple[str, ...]
    label: Any


class Lines:
    """The rows of one file. Lines end at "\\n" alone: str.splitlines would cut texts at U+2028 and its like."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self.path = path
        self.entry = entry
        self._starts = _starts(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        """Row number ``index``, lines of white space not counted.

        Raises:
            EvalError: it is no row of this task.
        """
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        where = f"{self.path}, row {index}"
        try:
            return _row(json.loads(line.decode("utf-8-sig")), index, self.entry)
        except UnicodeDecodeError as error:
            raise EvalError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
        except json.JSONDecodeError as error:
            raise EvalError(f"{where}: no JSON ({error}); download it again: {_link(self.entry)}") from error
        except EvalError as error:
            raise EvalError(f"{where}: {error}") from error


def available(options: SuiteOptions) -> list[Entry]:
    """Tasks whose data is at hand: all when online, those with a file in the data directory, none without either.

    Raises:
        EvalError: the data directory has a folder for InfiniteBench without a single file of it, and not online.
    """
    if options.online:
        return list(ENTRIES)
    if options.data_dir is None or not (Path(options.data_dir) / FOLDER).is_dir():
        return []
    found = [entry for entry in ENTRIES if _local(options, entry)]
    if not found:
        names = ", ".join(f"{entry.split}.jsonl" for entry in ENTRIES)
        raise EvalError(
            f"data-dir: {Path(options.data_dir) / FOLDER} holds no file of InfiniteBench; download any of {names} from "
            f"{_WHERE}/FILE and put them there, or give --online, or take the folder away for the synthetic twins"
        )
    return found


def open_rows(options: SuiteOptions, entry: Entry) -> Lines:
    """The rows of a task.

    Raises:
        EvalError: the file is nowhere, and what to do.
    """
    local = _local(options, entry)
    if local:
        return Lines(local, entry)
    if options.online:
        return Lines(_fetched(entry), entry)
    raise EvalError(where_from(options, entry))


def row_source(options: SuiteOptions, entry: Entry) -> str:
    """``local`` where `open_rows` reads a file of the data directory, ``published`` where it asks the hub."""
    return "local" if _local(options, entry) else "published"


def where_from(options: SuiteOptions, entry: Entry) -> str:
    """What to download for a task, and where to put it."""
    folder = Path(options.data_dir or "DATA_DIR") / FOLDER
    return (
        f"{entry.name} needs {entry.split}.jsonl: download {_link(entry)} to {folder}/{entry.split}.jsonl and give "
        f"--data-dir {folder.parent}, or give --online"
    )


def _local(options: SuiteOptions, entry: Entry) -> Path | None:
    if options.data_dir is None:
        return None
    file = Path(options.data_dir) / FOLDER / f"{entry.split}.jsonl"
    return file if file.is_file() else None


def _link(entry: Entry) -> str:
    return f"{_WHERE}/{entry.split}.jsonl"


@cache
def _fetched(entry: Entry) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB, f"{entry.split}.jsonl", repo_type="dataset"))
    except Exception as error:  # the library raises a dozen types here (hub, network, disk)
        reason = " ".join(str(error).split())[:200]
        raise EvalError(
            f"{entry.name}: {entry.split}.jsonl cannot be had from {HUB} ({type(error).__name__}: {reason}); download "
            f"{_link(entry)} to DATA_DIR/{FOLDER} and give --data-dir DATA_DIR, or leave out --online"
        ) from error


def _starts(path: Path) -> list[int]:
    """Where each line begins that is not empty."""
    starts, at = [], 0
    with path.open("rb") as file:
        for line in file:  # a binary file breaks lines at b"\n" alone
            if line.strip():
                starts.append(at)
            at += len(line)
    return starts


def _row(content: Any, index: int, entry: Entry) -> Row:
    if not isinstance(content, Mapping):
        raise EvalError(f"expected an object with context, input and answer, found {type(content).__name__}")
    context = content.get("context", content.get("content"))
    question = content.get("input", "")
    if not isinstance(context, str) or not isinstance(question, str) or "answer" not in content:
        raise EvalError(f"expected texts `context` and `input` and an `answer`, found {sorted(content)}")
    options = tuple(str(option) for option in content.get("options") or ())
    if entry.label == "option" and len(options) < 4:
        raise EvalError(f"expected four options, found {len(options)}")
    label = restore(entry.label, content["answer"], options)
    return Row(content.get("id", index), context, question, options, label)
