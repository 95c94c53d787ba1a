"""Real processes over Gloo for tests: forked, met through a file, ready in a tenth of a second."""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState, PartialState


def run_processes(
    fn: Callable[..., Any], world_size: int, directory: Path, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """``fn(*args)`` in ``world_size`` processes that form a process group and see what a launcher would set.

    Returns:
        What each rank returned, in rank order; an exception is returned, not raised. None for a rank that died.
    """
    directory.mkdir(parents=True, exist_ok=True)
    arguments = (fn, world_size, str(directory), timeout, args)
    context = mp.start_processes(_child, arguments, nprocs=world_size, join=False, start_method="fork")
    # Each process is waited for on its own: torch's join kills the survivors as soon as one dies, and they are what we test.
    for process in context.processes:
        process.join(timeout + 60)
        if process.is_alive():
            process.kill()
            process.join()
    results = []
    for rank in range(world_size):
        file = directory / f"result_{rank}"
        results.append(pickle.loads(file.read_bytes()) if file.exists() else None)
    return results


def _child(
    rank: int, fn: Callable[..., Any], world_size: int, directory: str, timeout: float, args: tuple[Any, ...]
) -> None:
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()  # inherited from the parent through fork
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout + 40, exit=True)  # a hang shows where
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    started = time.monotonic()
    result: Any
    try:
        result = fn(*args)
    except Exception as error:
        result = error
        result.seconds = time.monotonic() - started
    # An exception may hold what cannot travel (tracebacks, locks): its class and text are enough.
    try:
        data = pickle.dumps(result)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(RuntimeError(repr(result)))
    Path(directory, f"result_{rank}").write_bytes(data)
    sys.stdout.flush()
    # Leave as a killed process would: destructors of a broken process group may wait for peers.
    os._exit(1 if isinstance(result, Exception) else 0)
