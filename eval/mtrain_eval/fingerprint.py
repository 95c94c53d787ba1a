"""What a run is: everything that decides its numbers, and where it differs from the run that is on disk.

More samples, lengths, tasks, suites or the other kind of attention may be added to a run. Another model, tokenizer, pattern,
data directory, seed, precision or version may not: its rows would be averaged with those of something else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mtrain
from mtrain.errors import EvalError

PACKAGES = ("mtrain", "torch", "transformers", "lm-eval")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
CONFIGS = ("config.json", "generation_config.json")
TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip
# Weights up to here are hashed whole (some seconds); of larger ones, the ends and evenly spaced pieces of each file.
WHOLE_BYTES = 8 << 30
PIECE = 1 << 20
PIECES = 256
MAX_DATA_FILES = 100_000


def digest_weights(model: Path, known: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """One entry per file of weights: name, bytes, mtime_ns, blake2b, whole (False: sampled).

    Args:
        model: directory in Hugging Face format.
        known: entries of an earlier run; a file of the same name, size and time is not read again.
    """
    files = _files(model, WEIGHTS)
    sizes = [file.stat().st_size for file in files]
    whole = sum(sizes) <= WHOLE_BYTES
    by_name = {entry["name"]: entry for entry in known}

    def digest(file: Path) -> dict[str, Any]:
        stat = file.stat()
        entry = {"name": file.name, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "whole": whole}
        old = by_name.get(file.name, {})
        if all(old.get(key) == value for key, value in entry.items()) and isinstance(old.get("blake2b"), str):
            return {**entry, "blake2b": old["blake2b"]}
        return {**entry, "blake2b": _blake2b(file, whole)}

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, files))


def _blake2b(file: Path, whole: bool) -> str:
    digest = hashlib.blake2b(digest_size=16)
    size = file.stat().st_size
    with file.open("rb") as opened:
        if whole or size <= PIECE * PIECES:
            while piece := opened.read(PIECE):
                digest.update(piece)
        else:
            digest.update(str(size).encode())
            for number in range(PIECES):
                opened.seek((size - PIECE) * number // (PIECES - 1))
                digest.update(opened.read(PIECE))
    return digest.hexdigest()


def digest_files(directory: Path, patterns: Iterable[str]) -> str:
    """Names and contents of the small files of a directory that match."""
    digest = hashlib.blake2b(digest_size=16)
    for file in _files(directory, patterns):
        content = file.read_bytes()
        digest.update(f"{file.name}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


def digest_data(directory: Path | None) -> str | None:
    """Names and sizes of the files below a data directory (data sets are large, and their files do not change in place).

    Raises:
        EvalError: there is no such directory, or it holds far too many files to be one of data sets.
    """
    if directory is None:
        return None
    if not directory.is_dir():
        raise EvalError(f"--data-dir {directory}: no such directory")
    digest = hashlib.blake2b(digest_size=16)
    files = []
    for file in directory.rglob("*"):
        if file.is_file():
            files.append(file)
        if len(files) > MAX_DATA_FILES:
            raise EvalError(f"--data-dir {directory} holds more than {MAX_DATA_FILES:,} files; give the data sets' own")
    for file in sorted(files):
        digest.update(f"{file.relative_to(directory).as_posix()}\n{file.stat().st_size}\n".encode())
    return digest.hexdigest()


def digest_model(weights: Iterable[Mapping[str, Any]]) -> str:
    """One word for all weights; file times have no part in it."""
    text = "\n".join(f"{entry['name']} {entry['bytes']} {entry['blake2b']}" for entry in weights)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str | None]:
    """Installed versions of what the numbers depend on."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def git_commit() -> str | None:
    """Commit of the checkout that runs, with ``+changes`` when files differ from it; None for an installed package."""
    folder = Path(mtrain.__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment may lie inside somebody else's repository: it counts only if this very file belongs to it.
    if git("ls-files", "--error-unmatch", "__init__.py") is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Where two fingerprints differ, as "key: then -> now". A kind of attention that only one of them has is no difference."""
    new, old = _flat(now), _flat(then)
    shared = set(now.get("attention", {})) & set(then.get("attention", {}))
    found = []
    for key in sorted(new.keys() | old.keys()):
        parts = key.split(".")
        if parts[0] == "attention" and parts[1] not in shared:
            continue
        if new.get(key) != old.get(key):
            found.append(f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}")
    return found


def require_same(now: Mapping[str, Any], then: Mapping[str, Any], output: Path) -> None:
    """Refuse to add to a run of something else.

    Raises:
        EvalError: names what differs.
    """
    found = differences(now, then)
    if found:
        raise EvalError(
            f"{output} holds an evaluation of something else ({'; '.join(found)}); give another --output, remove the "
            "directory, or start anew in it with --no-resume"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})
