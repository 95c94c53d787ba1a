"""The published experiment in small: train one small model under many kinds of attention and compare what it can do.

    python -m scripts.parity [--seeds 0 1 2] [--workers 2] [--runs runs/parity] [--report] [--write]

Per seed a model is warmed up densely at 256 tokens, then goes on at 512 tokens under each kind of attention with the same rows
and steps. Each result is evaluated under dense attention and under its own pattern on the same prompts. Everything lies under
--runs, one folder per seed and method; what is there is not done again. Seed 0 comes first for all methods, so that the table
can be made at any time from what is there (--report makes nothing else). --write puts table and pictures into benchmarks/.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from mtrain.errors import MtrainError
from scripts.parity_study.methods import METHODS, PAIRS, QUESTIONS
from scripts.parity_study.work import results, run_method, warm_start

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
EXAM = {"prompts": 256, "pairs": PAIRS, "questions": QUESTIONS, "rows": 32, "seed": 2026}


def main() -> int:
    """Train what is missing, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/parity"))
    parser.add_argument("--report", action="store_true", help="train nothing; report what is there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/parity.md and its pictures")
    options = parser.parse_args()
    if not options.report:
        make(options.runs, options.seeds, options.workers)
    found = results(options.runs, options.seeds)
    if not found:
        raise MtrainError(f"no result in {options.runs} for the seeds {options.seeds}; run without --report")
    from scripts.parity_study.report import report

    text = report(found, "make parity", BENCHMARKS if options.write else options.runs)
    print(text)
    return 0


def make(runs: Path, seeds: list[int], workers: int) -> None:
    """All (seed, method), the first seed's first; the next seed is warmed up meanwhile."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        warm = {seeds[0]: pool.submit(warm_start, runs, seeds[0], EXAM)}
        for place, seed in enumerate(seeds):
            warm[seed].result()
            jobs = {pool.submit(run_method, runs, seed, method, EXAM): method for method in METHODS}
            for following in seeds[place + 1 : place + 2]:
                warm[following] = pool.submit(warm_start, runs, following, EXAM)
            for job, method in jobs.items():
                job.result()
                print(f"seed {seed}: {method} is there", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MtrainError as error:
        sys.exit(f"parity: {error}")
