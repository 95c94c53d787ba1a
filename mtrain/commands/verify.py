"""Prove on this machine that ring attention equals dense masked attention, out, lse, dq, dk and dv.

mtrain verify                                                                      threads as ranks, a covering set of cases
mtrain verify --full                                                               every combination of the axes
accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m mtrain verify     real processes, over their real transport
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--full", action="store_true", help="every combination instead of a covering set")
    parser.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="of the inputs (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Check the cases; exit status 1 when one is beyond its tolerance."""
    import torch

    from mtrain.parallel import launched_world_size
    from mtrain.verify.exactness import Case, all_cases, check_case, covering_cases

    dtype = getattr(torch, args.dtype)
    cases: Iterator[Case] = all_cases(dtype) if args.full else covering_cases(dtype)
    if launched_world_size() > 1:
        from mtrain.verify.launched import check_launched

        return check_launched(cases)
    started, count, worst, failures = time.monotonic(), 0, 0.0, 0
    for case in cases:
        error = max(check_case(case).values())
        count, worst = count + 1, max(worst, error)
        if error > case.tolerance:
            failures += 1
            print(f"FAILED {case}: {error:.1e} > {case.tolerance:.0e}", file=sys.stderr, flush=True)
    print(
        f"{count} cases with threads as ranks, {failures} failed; largest error {worst:.1e}; {time.monotonic() - started:.0f} s"
    )
    return 1 if failures else 0
