"""A whole training step on one GPU: dense attention against vertical-slash, in a random model of Qwen2.5-0.5B's shape.

    python scripts/bench_step.py                     # 32K .. 512K tokens on a CUDA device, printed
    python scripts/bench_step.py --write             # ... and written to benchmarks/step.{json,md}
    python scripts/bench_step.py --lengths 524288 --write --add   # one length more into the tables that are there
    python scripts/bench_step.py --tiny              # a tiny model, on the CPU too: tests the script, measures nothing

Lengths double until memory ends: an attention that runs out of memory is named with the longest length that fits, and the others
go on. Files are written after every length, so a run that is cut short leaves what it has. Before any speed is printed, a sparse
step with a full budget must be the dense step, and a step must lower the loss.

A dense step is 0.3 / 3.8 / 14 / 55 PFLOP at 32K / 128K / 256K / 512K tokens, one with a density of 5 % 0.1 / 0.6 / 1.6 / 4.5: at
300 TFLOP/s the longest dense step takes 3 minutes. Where warm-ups alone use up --seconds, they are the measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LENGTHS = [1 << n for n in range(15, 20)]  # 32K .. 512K
DENSITIES = [0.05, 0.1]
TINY_LENGTHS = [256, 512]
TINY_DENSITIES = [0.3, 0.5]  # sinks and locals alone are a fifth of so short a sequence


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, on the CPU where there is no GPU, to test the script"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="sequence lengths in tokens (default 32K .. 512K, doubling)"
    )
    parser.add_argument("--densities", type=float, nargs="+", help="shares of the causal pairs (default 0.05 0.1)")
    parser.add_argument("--budgets", nargs="+", choices=["topk", "coverage"], default=["topk", "coverage"])
    parser.add_argument("--rounds", type=int, default=5, help="steps per attention after its warm-up (default 5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="per length; no round begins after it (default 60)")
    parser.add_argument("--out", type=Path, help="write the tables to this path, without ending")
    parser.add_argument("--write", action="store_true", help="write them to benchmarks/step")
    parser.add_argument(
        "--add", action="store_true", help="keep other lengths that the JSON at that path already holds"
    )
    options = parser.parse_args(given)
    if options.write:
        options.out = ROOT / "benchmarks" / "step"
    if options.add and (options.out is None or not options.out.with_suffix(".json").exists()):
        parser.error("--add needs the path of a JSON that is there: --write or --out")
    if options.tiny and options.write:
        parser.error("--write is for measurements, and a tiny run is none; use --out")
    options.command = " ".join(["python scripts/bench_step.py", *(sys.argv[1:] if given is None else given)])
    options.lengths = options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS)
    options.densities = options.densities or (TINY_DENSITIES if options.tiny else DENSITIES)
    return options


def main(given: list[str] | None = None) -> int:
    """0: measured. 1: a result was wrong. 2: there is nothing to measure on, or no fit to what is there."""
    options = arguments(given)
    # Lengths differ by factors of two, and memory is to end where it ends, not where it is in pieces.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    if not options.tiny and not torch.cuda.is_available():
        print(
            "bench_step measures training on a CUDA device and torch finds none here. Run it on a GPU machine "
            "(`make gpu-step`), or test the script itself with: python scripts/bench_step.py --tiny",
            file=sys.stderr,
        )
        return 2
    from scripts.step_bench import bench as benches

    device, precision = torch.device("cpu"), "fp32"
    if torch.cuda.is_available():
        device, precision = torch.device("cuda"), "bf16"
    if options.tiny:
        settings = benches.Settings(benches.TINY, device, precision, block=32, sink=4, local=32, loss_chunk=128)
    else:
        settings = benches.Settings(benches.QWEN_05B, device, precision, block=128, sink=16, local=128)
    return compare(settings, options)


def compare(settings: Any, options: argparse.Namespace) -> int:
    """Check, measure, print; see `main`."""
    from scripts.kernel_bench.report import read_results
    from scripts.step_bench import check, contestants, measure, report
    from scripts.step_bench.bench import Bench
    from scripts.step_bench.laps import device_index_timed

    before: dict[str, Any] = {"facts": [], "results": []}
    if options.add:
        before = read_results(options.out.with_suffix(".json"))
    known = before["facts"][0]["dense"] if before["facts"] else None
    at = min(max(options.lengths), 256 if options.tiny else 1 << 16)
    dense, trials = contestants.choose_dense(settings, at, known)
    facts = report.environment(settings, dense.name, options.command)
    odd = sorted({key for key in report.SAME for fact in before["facts"] if fact[key] != facts[key]})
    if odd:
        print(f"{options.out}.json was made with another {', '.join(odd)}; measure all lengths anew", file=sys.stderr)
        return 2
    bench = Bench(settings)
    with device_index_timed(bench.laps):
        problems, checked = check.check(bench, dense, min(256 if options.tiny else 4096, *options.lengths))
        if problems:
            print("WRONG RESULTS, so no speed is shown:\n  " + "\n  ".join(problems))
            return 1
        budgets = contestants.Budgets(bench)
        makers: dict[str, Any] = {"dense": lambda _batch: dense}
        for kind in options.budgets:
            for density in options.densities:
                makers[f"{kind} {density:.0%}"] = functools.partial(budgets.contestant, kind, density)
        measured: list[dict[str, Any]] = []
        for records in measure.run(bench, options.lengths, makers, measure.Effort(options.rounds, options.seconds)):
            for record in records:
                if "density" in record:
                    record["flop"] = report.step_flop(settings.config, record["length"], record["density"])
            measured += records
            everything = {**merged(before, facts, measured), "check": checked, "dense": trials}
            text = report.markdown(everything, tiny=options.tiny)
            write(options.out, text, everything)
            print(report.progress(records), flush=True)
    print(text)
    return 0


def merged(before: dict[str, Any], facts: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What there was and the records of this run; earlier ones of the same lengths, and who made them, are replaced."""
    new = sorted({record["length"] for record in records})
    others = [{**fact, "lengths": [n for n in fact["lengths"] if n not in new]} for fact in before["facts"]]
    return {
        "facts": [*(fact for fact in others if fact["lengths"]), {**facts, "lengths": new}],
        "results": [*(record for record in before["results"] if record["length"] not in new), *records],
    }


def write(path: Path | None, text: str, everything: dict[str, Any]) -> None:
    """Both files, if there is a place for them."""
    from scripts.kernel_bench.report import write_whole

    if path is not None:
        write_whole(path.with_suffix(".json"), json.dumps(everything, indent=1) + "\n")
        write_whole(path.with_suffix(".md"), text)


if __name__ == "__main__":
    sys.exit(main())
