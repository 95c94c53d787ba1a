"""The exactness matrix over the processes of a real launch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

from mtrain.comm import ProcessRing
from mtrain.parallel import join_processes, leave_processes
from mtrain.topology import RingTopology
from mtrain.verify.exactness import Case, errors_of, make_layout, make_problem, run_on


def check_launched(cases: Iterable[Case], timeout_s: float = 120.0) -> int:
    """Every distinct case on a flat ring over all processes (and on nodes of two, when they divide); 0 when all are exact.

    Every process makes this call; the first one prints.
    """
    rank, size, device = join_processes(timedelta(seconds=timeout_s))
    # The CPU backend is of no use to CUDA tensors; there the machine's own choice is what needs the proof.
    wanted = [replace(case, backend="auto") if device.type == "cuda" else case for case in cases]
    started, count, worst, failures = time.monotonic(), 0, 0.0, 0
    shapes = [(1, size)] + ([(size // 2, 2)] if size % 2 == 0 and size > 2 else [])
    for shape in shapes:
        ring = ProcessRing.create(RingTopology(*shape), timedelta(seconds=timeout_s))
        # Many cases differ in their topology only, and the launch decides that.
        for case in dict.fromkeys(replace(case, topology=shape) for case in wanted):
            problem = make_problem(case.pattern, case.packed, case.group, case.dtype).to(device)
            layout = make_layout(case.layout, size)
            gathered = [ring.all_gather(part.contiguous()) for part in run_on(ring, case, problem, layout)]
            error = max(
                errors_of(case, problem, layout, [list(parts) for parts in zip(*gathered, strict=True)]).values()
            )
            count, worst = count + 1, max(worst, error)
            if error > case.tolerance:
                failures += 1
                print(f"FAILED on process {rank} {case}: {error:.1e}", file=sys.stderr, flush=True)
    if rank == 0:
        seconds = time.monotonic() - started
        print(
            f"{count} cases on {size} processes, {failures} failed; largest error {worst:.1e}; {seconds:.0f} s",
            flush=True,
        )
    leave_processes()
    return 1 if failures else 0
