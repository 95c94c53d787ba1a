"""The exactness matrix as a table: every combination of the axes against the float64 truth.

python scripts/exactness.py                # the full matrix (7,187 cases, about 9 minutes on one core)
python scripts/exactness.py --quick        # every pattern x layout x schedule x topology once
python scripts/exactness.py --write        # also writes benchmarks/exactness.md
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtrain.verify.exactness import NAMES, Case, all_cases, covering_cases, worst_by

RESULT = Path(__file__).parent.parent / "benchmarks" / "exactness.md"


def main() -> int:
    """Run the matrix; exit status 1 when a case misses its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a covering subset instead of the full matrix")
    parser.add_argument("--write", action="store_true", help=f"write the table to {RESULT.name} under benchmarks/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    doubles = covering_cases() if options.quick else all_cases()
    cases = list(chain(doubles, covering_cases(torch.float32)))
    failures: list[str] = []
    bar = tqdm(total=len(cases), desc="cases", disable=not sys.stderr.isatty())

    def report(case: Case, errors: dict[str, float]) -> None:
        bar.update()
        if max(errors.values()) > case.tolerance:
            failures.append(f"{case}: {errors}")

    started = time.monotonic()
    table = worst_by(
        iter(cases), lambda c: (str(c.dtype).removeprefix("torch."), c.pattern, c.layout, c.schedule), report
    )
    bar.close()
    lines = [
        "| dtype | pattern | layout | schedule | cases | " + " | ".join(f"{name}" for name in NAMES) + " |",
        "|---" * 5 + "|---:" * len(NAMES) + "|",
    ]
    for key, row in table.items():
        lines.append(
            "| " + " | ".join(key) + f" | {int(row['cases'])} | " + " | ".join(f"{row[n]:.1e}" for n in NAMES) + " |"
        )
    command = "python scripts/exactness.py" + (" --quick" if options.quick else "")
    summary = (
        f"{len(cases)} cases, {len(failures)} beyond tolerance (1e-10 in float64, 1e-5 in float32), "
        f"{time.monotonic() - started:.0f} s; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}. Largest absolute error of "
        "each row over topologies (outer x inner up to 2 x 4), documents (one, packed), H / K in {1, 4, 7} and backends."
    )
    print("\n".join([*lines, "", summary, *failures]))
    if options.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(f"# Exactness matrix\n\n`{command}`\n\n{summary}\n\n" + "\n".join(lines) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
