"""Words between the ranks of a ring: JSON values, and errors that end all ranks alike.

Only the first rank reads and writes files. What it finds decides which collective calls follow, so it is told to all before
anything is done with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from mtrain.comm import Ring
from mtrain.errors import EvalError, LaunchError, MtrainError


def from_first(ring: Ring, value: Any) -> Any:
    """The first rank's JSON value on every rank (what the others give is not looked at)."""
    data = json.dumps(value if ring.rank == 0 else None).encode()
    if ring.world_size == 1:
        return json.loads(data)
    size = int(ring.broadcast(torch.tensor([len(data)]), 0)[0])
    room = torch.zeros(size, dtype=torch.uint8)
    if ring.rank == 0:
        room = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return json.loads(bytes(ring.broadcast(room, 0).numpy().tobytes()).decode())


def on_first(ring: Ring, action: Callable[[], Any]) -> Any:
    """Run an action that touches files on the first rank; its JSON result, on every rank.

    Raises:
        EvalError: on all ranks alike, when the action met something a user can mend or the operating system said no.
    """
    result, problem = None, None
    if ring.rank == 0:
        try:
            result = action()
        except (MtrainError, OSError) as error:
            problem = describe(error)
    result, problem = from_first(ring, [result, problem])
    if problem is not None:
        raise EvalError(problem)
    return result


def on_all(ring: Ring, action: Callable[[], tuple[int, str]], trouble: str | None = None) -> str | None:
    """Run an action on every rank and compare how they fared.

    Args:
        ring: who takes part.
        action: returns a 62-bit number that must be the same on every rank, and a note.
        trouble: something that went wrong here earlier; then the action is not run.

    Returns:
        The note of this rank.

    Raises:
        EvalError: on all ranks, when any had trouble; each names its own or that of the first rank that had one.
        LaunchError: on all ranks, when their numbers differ.
    """
    number, note = 0, None
    if trouble is None:
        try:
            number, note = action()
        except (MtrainError, OSError, ImportError) as error:
            trouble = describe(error)
    answers = torch.stack(ring.all_gather(torch.tensor([int(trouble is not None), number])))
    failed = [rank for rank, bad in enumerate(answers[:, 0].tolist()) if bad]
    if failed:
        told = _from(ring, failed[0], trouble)
        raise EvalError(told if failed[0] == 0 else f"rank {failed[0]}: {told}")
    odd = [rank for rank, other in enumerate(answers[:, 1].tolist()) if other != answers[0, 1]]
    if odd:
        raise LaunchError(
            f"rank(s) {odd} made another sample than rank 0; every process needs the same code, tokenizer and data"
        )
    return note


def _from(ring: Ring, root: int, text: str | None) -> str:
    """Rank ``root``'s text on every rank."""
    data = bytearray((text or "").encode())
    sizes = ring.all_gather(torch.tensor([len(data)]))
    room = torch.zeros(int(sizes[root][0]), dtype=torch.uint8)
    if ring.rank == root and data:
        room = torch.frombuffer(data, dtype=torch.uint8)
    return ring.broadcast(room, root).numpy().tobytes().decode()


def describe(error: Exception) -> str:
    """An error in one line: ours as it is, a missing package with the way to get it, others with their kind."""
    if isinstance(error, ImportError):
        return f"{error}; the evaluation needs more packages than training: pip install 'mtrain[eval]'"
    return str(error) if isinstance(error, MtrainError) else f"{type(error).__name__}: {error}"
