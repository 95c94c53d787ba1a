"""Checkpoints that survive anything: safetensors and JSON, checksums, one atomic rename; no pickle.

    <output>/checkpoints/step_00000100/
        model.safetensors optimizer.safetensors ...     tensors, as many files as the ranks bring
        state.json                                      step, data cursor, balancer, fingerprints: everything that is not a tensor
        manifest.json                                   size and SHA-256 of every file above, written last

A checkpoint is written beside its final name, synced to the disk, and renamed by the main process when every rank is done: a
directory with a final name is complete, whatever was killed and when. Older ones are deleted only after that. The order is that of
torchtitan (https://github.com/pytorch/torchtitan) and Megatron-LM's integrity manifest; the defects avoided are Accelerate's
(it deletes the old checkpoint before the new one exists) and those of per-rank renames in Hugging Face's Trainer.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mtrain.errors import CheckpointError
from mtrain.parallel import World

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_CHUNK = 1 << 20
logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes, finds and prunes the checkpoints of one run. Every method is called by all ranks at the same step.

    Args:
        directory: where the checkpoints live; on several machines a directory that all of them see.
        world: the processes of the run.
        keep: complete checkpoints to keep, the newest ones (>= 1).
    """

    def __init__(self, directory: Path, world: World, keep: int) -> None:
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep must be at least 1, got {keep}")
        self.directory, self.world, self.keep = directory, world, keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint; when this returns it is durable and complete on every rank.

        Args:
            step: optimizer steps done.
            tensors: this rank's files: stem -> named tensors. Two ranks must not bring the same stem; a rank may bring none.
            state: JSON values and tensors, nested; the main process's counts.

        Raises:
            CheckpointError: on all ranks alike, when any rank could not write (disk full, no permission). Nothing is left
                behind and the older checkpoints are untouched.
        """
        final = self.directory / f"step_{step:08d}"
        temporary = self.directory / f".writing_{final.name}"
        try:
            self._agree(f"checkpoint {step}: to begin", self._on_main(self._start), temporary)
            plain, packed = pack_state(state) if self.world.is_main else (None, {})
            mine = {**tensors, "state": packed} if packed else tensors
            entries = self._agree(f"checkpoint {step}: every rank to write its part", write_tensors, temporary, mine)
            files = {name: entry for part in entries for name, entry in part.items()}
            self._agree(
                f"checkpoint {step}: the main process to complete it",
                self._on_main(self._finish),
                *(temporary, final, step, plain, files),
            )
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def find(self, resume: str) -> Path | None:
        """The checkpoint to start from, its checksums verified; the same answer on every rank.

        Args:
            resume: "auto": the newest complete one of this run (None when there is none); an earlier one, with a warning, when
                the newest is damaged. "never": None. Anything else: the directory of one checkpoint.

        Raises:
            CheckpointError: the named checkpoint is missing or damaged, all those found by "auto" are damaged, or the run's
                own directory cannot be written.
        """
        chosen = self._agree("the main process to choose a checkpoint", self._on_main(self._find), resume)[0]
        return None if chosen is None else Path(chosen)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps out of the way: the run goes on from ``step`` (-1: from the start), and what an
        abandoned or damaged future left must neither be resumed nor push new checkpoints out. Nothing is deleted."""
        for path in list_checkpoints(self.directory) if self.world.is_main else []:
            if step_of(path) > step:
                self._set_aside(path)

    def _set_aside(self, path: Path) -> None:
        number = 0
        while (target := path.with_name(f"set_aside_{number}_{path.name}")).exists():
            number += 1
        os.rename(path, target)
        logger.warning("this run writes its own %s: the earlier one is kept as %s", path.name, target)

    def _on_main(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action in the main process, nothing elsewhere."""
        return action if self.world.is_main else lambda *_: None

    def _agree(self, what: str, action: Callable[..., Any], *args: Any) -> list[Any]:
        return self.world.together(what, functools.partial(action, *args), error=CheckpointError)

    def _start(self, temporary: Path) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(".writing_*"):
            shutil.rmtree(stale)
        temporary.mkdir()

    def _finish(self, temporary: Path, final: Path, step: int, state: Any, files: dict[str, Any]) -> None:
        files[STATE] = _write_json(temporary / STATE, state)
        _write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        sync_directory(temporary)
        if final.exists():
            self._set_aside(final)
        os.rename(temporary, final)
        sync_directory(self.directory)
        for old in list_checkpoints(self.directory)[: -self.keep]:
            try:
                # The manifest goes first, so that a half-deleted checkpoint can never look complete.
                (old / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(old)
            except OSError as error:
                logger.warning("could not delete the old checkpoint %s: %s", old, error)

    def _find(self, resume: str) -> str | None:
        # A directory that cannot be written should end the run now, not at the first save.
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.directory):
            pass
        if resume == "never":
            return None
        if resume != "auto":
            verify(Path(resume))
            return resume
        found = list_checkpoints(self.directory)
        damage = []
        for path in reversed(found):
            try:
                verify(path)
            except CheckpointError as error:
                damage.append(str(error))
                logger.warning("DAMAGED CHECKPOINT, trying the one before it: %s", error)
                continue
            return str(path)
        if found:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged ({damage[0]}); restore one, or start anew with "
                "checkpoint.resume=never"
            )
        return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints with a final name, oldest first. Those being written or set aside are not among them."""
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with the manifest and return the manifest.

    Raises:
        CheckpointError: names the file and what differs.
    """
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: give a directory such as <output>/checkpoints/step_00000100")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, form = manifest["files"], manifest["format"]
    except FileNotFoundError:
        nested = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
        hint = f"; did you mean {nested[-1]}?" if nested else ""
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST}{hint}") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read: {error!r}") from None
    if form != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {form}; this version reads format {FORMAT}")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the manifest lists it with {entry['bytes']} bytes")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file} is damaged: {size} bytes, the manifest says {entry['bytes']}")
        digest = _sha256(file)
        if digest != entry["sha256"]:
            raise CheckpointError(
                f"{file} is damaged: SHA-256 {digest[:16]}..., the manifest says {entry['sha256'][:16]}..."
            )
    assert isinstance(manifest, dict)
    return manifest


def load_state(path: Path) -> dict[str, Any]:
    """The state of a (verified) checkpoint as it was given to `Checkpointer.save`, tensors put back on the CPU.

    Raises:
        CheckpointError: this process does not see what the main process has verified.
    """
    if not (path / STATE).exists():
        raise CheckpointError(
            f"{path} is not visible to this process: on several machines put output on a shared file system"
        )
    packed = path / "state.safetensors"
    tensors = load_file(packed) if packed.exists() else {}
    state = unpack_state(json.loads((path / STATE).read_text()), tensors)
    assert isinstance(state, dict)
    return state


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """One file of named tensors of a (verified) checkpoint, on the CPU.

    Raises:
        CheckpointError: the checkpoint has no such file.
    """
    file = path / f"{stem}.safetensors"
    if not file.exists():
        raise CheckpointError(
            f"{path} has no {file.name}: it was written by a run with another mesh or another kind of state"
        )
    return load_file(file)


def write_tensors(directory: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write ``stem -> tensors`` as safetensors, synced to disk; returns the manifest entries by file name.

    Raises:
        CheckpointError: not enough room on the disk.
    """
    need = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    free = shutil.disk_usage(directory).free
    if need * 1.1 > free:
        raise CheckpointError(
            f"{directory.parent} has {free / 2**20:.0f} MiB free, the checkpoint needs {need / 2**20:.0f} MiB"
        )
    entries = {}
    for stem, tensors in files.items():
        path = directory / f"{stem}.safetensors"
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
        entries[path.name] = _entry(path)
    return entries


def replace_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its final name, durably. An older one of that name is moved away first and deleted last."""
    old = final.with_name(f".replaced_{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """fsync a directory's entries (a no-op where the platform has no directory handles)."""
    flags = getattr(os, "O_DIRECTORY", None)
    if flags is None:
        return
    handle = os.open(directory, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack_state(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts and lists into plain JSON and the tensors found in it (replaced by {"__tensor__": name})."""
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            name = f"t{len(tensors)}"
            # A copy: safetensors refuses tensors that share memory.
            tensors[name] = node.detach().cpu().clone()
            return {"__tensor__": name}
        if isinstance(node, Mapping):
            if bad := [key for key in node if not isinstance(key, str)]:
                raise CheckpointError(f"state keys must be text to survive JSON, got {bad[0]!r}")
            return {key: walk(item) for key, item in node.items()}
        if isinstance(node, (list, tuple)):
            return [walk(item) for item in node]
        return node

    return walk(value), tensors


def unpack_state(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `pack_state` (tuples come back as lists)."""
    if isinstance(node, dict):
        if node.keys() == {"__tensor__"}:
            return tensors[node["__tensor__"]]
        return {key: unpack_state(item, tensors) for key, item in node.items()}
    return [unpack_state(item, tensors) for item in node] if isinstance(node, list) else node


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
