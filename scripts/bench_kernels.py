"""Speed of the Triton kernels against the dense kernels of this machine, over density and sequence length.

    python scripts/bench_kernels.py                  # everything on a CUDA device; writes benchmarks/kernels.{json,md,png}
    python scripts/bench_kernels.py --quick          # 8K, 32K and 128K tokens only, some minutes
    python scripts/bench_kernels.py --smoke          # tiny, on the CPU in Triton's interpreter: tests the script, measures nothing

The whole is expected to take the better part of an hour on an H200: 512K dense tokens are 8 PFLOP forward and backward.

Contestants run in one process and take turns round by round; medians of CUDA-event times are compared. Before any speed is
printed, every pattern is checked: a short copy against float64 by the two rules of `sparse_kernels.accuracy`, and at full length
the last rows of out and dq. A case that fails is named and ends the run without figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = [1 << n for n in range(13, 21)]  # 8K .. 1M
QUICK = [1 << 13, 1 << 15, 1 << 17]
DENSITIES = [1.0, 0.5, 0.2, 0.1, 0.05]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument("--quick", action="store_true", help="8K, 32K and 128K tokens only")
    parser.add_argument("--lengths", type=int, nargs="+", help="sequence lengths in tokens")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES, help="shares of the causal pairs")
    parser.add_argument(
        "--backward-up-to", type=int, default=1 << 19, help="longest sequence with a backward (default 512K)"
    )
    parser.add_argument(
        "--flex-up-to", type=int, default=1 << 17, help="longest sequence for flex_attention, whose mask is O(S^2)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="about so long per shape and length")
    parser.add_argument(
        "--out", type=Path, help="path without ending (default benchmarks/kernels; with --smoke: no files)"
    )
    return parser.parse_args()


def main() -> int:
    """0: measured. 1: a result was wrong. 2: there is nothing to measure on."""
    options = arguments()
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, below
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print(
            "bench_kernels measures CUDA kernels and torch finds no CUDA device here. Run it on a GPU machine (`make gpu`), or "
            "test the script itself with: python scripts/bench_kernels.py --smoke",
            file=sys.stderr,
        )
        return 2
    from scripts.kernel_bench import measure, report
    from scripts.kernel_bench.cases import Shape

    device = torch.device("cpu" if options.smoke else "cuda")
    if options.smoke:
        shapes, lengths = [Shape(2, 1, 64, 32)], options.lengths or [192]
        options.densities = [d for d in options.densities if d >= 0.5]  # seconds, not minutes
    else:
        shapes, lengths = [Shape(32, 8, 128, 128), Shape(16, 2, 128, 128)], options.lengths or LENGTHS
        lengths = QUICK if options.quick and not options.lengths else lengths
    densities = sorted({1.0, *options.densities}, reverse=True)
    path = options.out or (None if options.smoke else ROOT / "benchmarks" / "kernels")
    facts = report.environment(device, options.smoke, shlex.join(["python", "scripts/bench_kernels.py", *sys.argv[1:]]))
    facts |= measure.ceilings(device)
    results: list[dict[str, Any]] = []
    for shape in shapes:
        for length in lengths:
            settings = measure.Settings(
                shape, length, densities, device, length <= options.backward_up_to, length <= options.flex_up_to,
                0.0 if options.smoke else options.seconds,
            )  # fmt: skip
            problems = measure.check(settings)
            if problems:
                print(
                    f"WRONG RESULTS for {shape} at {length} tokens, so no speed is shown:\n  " + "\n  ".join(problems)
                )
                return 1
            results += measure.measure(settings)
            text = report.markdown(results, facts, smoke=options.smoke)
            if path is not None:  # after every length, so that a run that is cut short leaves what it has
                everything = json.dumps({"environment": facts, "results": results}, indent=1)
                report.write_whole(path.with_suffix(".json"), everything + "\n")
                report.write_whole(path.with_suffix(".md"), text)
            print(report.progress(results[-1], options.smoke), flush=True)
    print(text)
    if path is not None:
        print(report.plot(results, path.with_suffix(".png"), smoke=options.smoke))
    return 0


if __name__ == "__main__":
    sys.exit(main())
