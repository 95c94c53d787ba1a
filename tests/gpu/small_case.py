"""Every kernel once on a small case, for compute-sanitizer: python -m tests.gpu.small_case"""

from __future__ import annotations

import sys

import torch

from tests.gpu.cases import complaints, make_case, run


def main(device: str = "cuda") -> int:
    """0 if all results are right."""
    problems = []
    for blocks in (0.0, 0.1):
        for documents in (0, 3):
            case = make_case(
                device,
                1,
                300,
                64,
                kv_heads=1,
                group=2,
                block=64,
                columns=70,
                diagonals=2,
                blocks=blocks,
                documents=documents,
            )
            problems += complaints(case, run(case))
    if device == "cuda":
        torch.cuda.synchronize()
    print("\n".join(problems) or "all results are right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
