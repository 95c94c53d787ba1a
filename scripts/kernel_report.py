"""What the Triton kernels cost on GPUs that need not be here: registers, spills and shared memory for sm_80, sm_86, sm_90.

python scripts/kernel_report.py [--output benchmarks/kernels_report.md]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_kernels.gpu.general_recorded import general_launches
from sparse_kernels.gpu.recorded import Recorded, structured_launches
from sparse_kernels.gpu.resources import SHARED_LIMIT
from sparse_kernels.gpu.score_recorded import score_launches

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rows(capabilities: list[int], head_dims: list[int], dtypes: list[str], blocks: list[int]) -> Iterator[str]:
    """One table row per kernel and target, in the variant with the most in it: carried state, columns and documents."""
    for capability, head_dim, dtype, block in itertools.product(capabilities, head_dims, dtypes, blocks):
        structured = structured_launches(capability, head_dim, DTYPES[dtype], block, documents=True)
        general = general_launches(capability, head_dim, DTYPES[dtype], block)
        launches: list[tuple[str, Recorded]] = [("", x) for x in structured] + [("general ", x) for x in general]
        launches += [("probe ", x) for x in score_launches(head_dim, DTYPES[dtype], block)]
        for kind, launched in launches:
            found = launched.measure(capability)
            cells = (
                kind + launched.name.strip("_").removesuffix("_kernel"),
                f"sm_{capability}",
                head_dim,
                dtype,
                block,
                launched.tile,
                found.registers,
                found.spills,
                f"{found.shared / 1024:.1f}",
                "yes" if found.tensor_cores else "no",
                "" if found.ahead is None else found.ahead,
            )
            yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Print the table; write it too when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 86, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    parser.add_argument("--block", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    lines = [
        "# Resources of the Triton kernels",
        "",
        f"`python scripts/kernel_report.py`, Triton {triton.__version__}, no GPU needed. Spills in bytes (stores + loads), shared "
        "memory in KiB,",
        "tile = query rows x key rows, w = warps, s = pipeline stages. Budget for shared memory: "
        + ", ".join(f"sm_{c} {limit // 1024} KiB" for c, limit in SHARED_LIMIT.items() if c in given.capability)
        + ".",
        "ahead = loads of tiles that may still be under way when a loop awaits its own (0: it awaits what it just asked for).",
        "Nothing here is a time: no kernel ran.",
        "",
        "| kernel | target | head_dim | dtype | block | tile | registers | spills | shared | tensor cores | ahead |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for row in rows(given.capability, given.head_dim, given.dtype, given.block):
        print(row, flush=True)
        lines.append(row)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
