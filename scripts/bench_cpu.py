"""Speed and memory of the CPU attention backend against torch's dense SDPA.

    OMP_NUM_THREADS=1 python scripts/bench_cpu.py            # prints the tables, about three minutes of one core
    OMP_NUM_THREADS=1 python scripts/bench_cpu.py --quick    # 4K tokens only, a few seconds
    OMP_NUM_THREADS=1 python scripts/bench_cpu.py --write    # also writes benchmarks/cpu_attention.md

Correctness comes first: a case whose output or gradients disagree with a float64 dense run is reported and stops the benchmark
before any speed is printed. Times are CPU seconds of this process (`time.process_time`), because other processes may share the
cores; contestants are interleaved round by round and medians are compared, so every ratio comes from one run.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparse_kernels import SparsePattern, reference_attention, sparse_attention

REPORT = Path(__file__).resolve().parents[1] / "benchmarks" / "cpu_attention.md"
SINK, LOCAL_BLOCKS = 16, 2
FLOP_FORMULA = "forward 4 * D * (allowed pairs), backward 2.5 x forward; dense: allowed pairs = H * S * (S + 1) / 2"


@dataclass(frozen=True)
class Case:
    """One row of the table: density in percent of the causal pairs."""

    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    density: float
    bar: float | None = None  # least speed-up asked for; below 1: 1 / (slow-down allowed)


def vertical_slash(case: Case, seed: int = 0) -> SparsePattern:
    """Sinks, a local band, random block diagonals worth half of the rest, and random columns up to the density asked."""
    if case.density >= 1:
        return SparsePattern.dense(1, case.heads, case.seq_len, case.block)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-case.seq_len // case.block)

    def shuffled(count: int) -> Tensor:
        return torch.stack([torch.randperm(count, generator=generator) for _ in range(case.heads)])

    rest = max(0.0, case.density - (2 * LOCAL_BLOCKS - 1) / blocks)  # beyond the local band
    slashes = shuffled(blocks - LOCAL_BLOCKS)[:, : round(rest * blocks / 2)] + LOCAL_BLOCKS
    local = torch.arange(LOCAL_BLOCKS).expand(case.heads, -1)
    diagonals = torch.cat([local, slashes.sort().values], 1)[None].int()
    candidates = shuffled(case.seq_len - SINK) + SINK
    sink = torch.arange(SINK).expand(case.heads, -1)

    def with_columns(count: int) -> SparsePattern:
        columns = torch.cat([sink, candidates[:, :count].sort().values], 1)[None].int()
        return SparsePattern(case.seq_len, case.block, columns, diagonals)

    low, high = 0, case.seq_len - SINK  # bisection on the measured density
    while high - low > 1:
        middle = (low + high) // 2
        if float(with_columns(middle).density().mean()) < case.density:
            low = middle
        else:
            high = middle
    return with_columns(low)


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v (leaves) and dout, all [1, S, heads, D]."""
    generator = torch.Generator().manual_seed(1)
    shapes = [case.heads, case.kv_heads, case.kv_heads, case.heads]
    made = [torch.randn(1, case.seq_len, h, case.head_dim, generator=generator).to(dtype) for h in shapes]
    return (*(t.requires_grad_() for t in made[:3]), made[3])


def check(case: Case) -> float:
    """Largest error of out, dq, dk, dv against float64 dense attention, on a shortened copy of the case."""
    small = Case(min(case.seq_len, 1024) - 37, case.heads, case.kv_heads, case.head_dim, case.block, case.density)
    pattern = vertical_slash(small)
    q, k, v, dout = make_inputs(small)
    out = sparse_attention(q, k, v, pattern, backend="cpu")
    assert isinstance(out, Tensor)
    found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    q, k, v, dout = make_inputs(small, torch.float64)
    truth, _ = reference_attention(q, k, v, pattern.to_dense())
    wanted = (truth, *torch.autograd.grad(truth, (q, k, v), dout))
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention of torch on [B, S, heads, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def timed(attend: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """CPU seconds of one forward and one backward."""
    start = time.process_time()
    out = attend()
    middle = time.process_time()
    torch.autograd.grad(out, inputs[:3], inputs[3])
    return middle - start, time.process_time() - middle


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds, in CPU seconds, after one round that does not count."""
    pattern, inputs = vertical_slash(case), make_inputs(case)
    q, k, v, _ = inputs
    times: dict[str, list[float]] = {"dense fwd": [], "dense bwd": [], "sparse fwd": [], "sparse bwd": []}

    def sparse() -> Tensor:
        # The call makes a view of its own, so the index is built inside the timed forward, as in training.
        out = sparse_attention(q, k, v, pattern, backend="cpu")
        assert isinstance(out, Tensor)
        return out

    for number in range(rounds + 1):
        seconds = timed(lambda: sdpa(q, k, v), inputs) + timed(sparse, inputs)
        for name, value in zip(times, seconds, strict=True):
            if number:
                times[name].append(value)
    result = {name: statistics.median(values) for name, values in times.items()}
    result["density"] = float(pattern.density().mean())
    return result


def resident(field: str) -> float:
    """MiB of resident memory now ("VmRSS") or at its peak ("VmHWM"). Linux only: getrusage would count the parent process too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: the memory table needs Linux; use --quick elsewhere")


def _memory_of(case: Case, kind: str, queue: multiprocessing.Queue) -> None:
    """Child process: peak resident memory during one forward and backward minus that before them, in MiB."""
    torch.set_num_threads(1)
    # The first, small case warms up the libraries, so that their own buffers do not count.
    for which in (Case(512, case.heads, case.kv_heads, case.head_dim, case.block, case.density), case):
        pattern = vertical_slash(which)
        q, k, v, dout = make_inputs(which)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = resident("VmRSS")
        out = sdpa(q, k, v) if kind == "dense" else sparse_attention(q, k, v, pattern, backend="cpu")
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, (q, k, v), dout)
        grown = resident("VmHWM") - before
    queue.put(grown)


def peak_memory(case: Case, kind: str) -> float:
    """MiB that one forward and backward add to the peak resident memory of a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue = context.Queue()
    child = context.Process(target=_memory_of, args=(case, kind, queue))
    child.start()
    grown = queue.get(timeout=600)
    child.join()
    return grown


def speed_table(cases: list[Case], rounds: int) -> tuple[list[str], bool]:
    """Markdown rows and whether every bar is met."""
    head = ["S", "H / K", "D", "block", "density", "dense fwd + bwd, s", "sparse fwd + bwd, s", "fwd x", "bwd x"]
    lines = table_head([*head, "total x", "of ideal", "GFLOP/s", "bar"])
    good = True
    for case in cases:
        r = measure(case, rounds)
        dense, sparse = r["dense fwd"] + r["dense bwd"], r["sparse fwd"] + r["sparse bwd"]
        ratio = dense / sparse
        flops = 3.5 * 4 * case.head_dim * r["density"] * case.heads * case.seq_len * (case.seq_len + 1) / 2
        met = case.bar is None or ratio >= case.bar
        good &= met
        cells = [
            f"{case.seq_len} | {case.heads} / {case.kv_heads} | {case.head_dim} | {case.block} | {100 * r['density']:.2f} %",
            f"{r['dense fwd']:.4f} + {r['dense bwd']:.4f} | {r['sparse fwd']:.4f} + {r['sparse bwd']:.4f}",
            f"{r['dense fwd'] / r['sparse fwd']:.2f} | {r['dense bwd'] / r['sparse bwd']:.2f} | **{ratio:.2f}**",
            f"{ratio * r['density']:.2f} | {flops / sparse / 1e9:.0f}",
            "" if case.bar is None else f">= {case.bar:.2f}: {'met' if met else 'MISSED'}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, good


def memory_table(cases: list[Case]) -> list[str]:
    """Markdown rows: growth of the peak resident memory, and its size per token."""
    held = "out, dq, dk, dv, MiB"
    lines = table_head(["S", "density", held, "dense peak, MiB", "sparse peak, MiB", "sparse KiB per token"])
    for case in cases:
        needed = 4 * case.seq_len * case.head_dim * (2 * case.heads + 2 * case.kv_heads) / 2**20
        dense, sparse = peak_memory(case, "dense"), peak_memory(case, "sparse")
        cells = [f"{case.seq_len}", f"{100 * case.density:.0f} %", f"{needed:.0f}", f"{dense:.0f}", f"{sparse:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {1024 * sparse / case.seq_len:.2f} |")
        print(lines[-1], flush=True)
    return lines


def table_head(names: list[str]) -> list[str]:
    """The first two rows of a markdown table, printed as well."""
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    print("\n".join(lines))
    return lines


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def all_cases(quick: bool) -> list[Case]:
    """The cases of the report; the bars are those of the CPU backend's contract (S = 16K, H = 4, K = 4, D = 64)."""
    if quick:
        return [Case(4096, 4, 4, 64, 128, d) for d in (0.05, 0.10, 1.0)]
    bars = {0.05: 12.0, 0.10: 6.0, 1.0: 1 / 1.4}
    main = [Case(16384, 4, 4, 64, 128, d, bars.get(d)) for d in (0.05, 0.10, 0.25, 1.0)]
    shared = [Case(16384, 4, 2, 64, 128, d) for d in (0.05, 0.10)]
    fine = [Case(16384, 4, 4, 64, 64, d) for d in (0.05, 0.10)]
    small = [Case(s, 4, 4, d, 64, 0.25) for s in (2048, 4096) for d in (16, 32)]
    return main + shared + fine + small


def header(rounds: int, worst: float) -> list[str]:
    """What a reader needs to repeat and judge the tables."""
    command = " ".join(["OMP_NUM_THREADS=1 python scripts/bench_cpu.py", *sys.argv[1:]])
    return [
        "# CPU attention: sparse backend against dense SDPA",
        "",
        f"`{command}` on {datetime.date.today().isoformat()}, {cpu_name()}, 1 thread, Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
        "",
        "- Clock: CPU seconds of the process (`time.process_time`: other processes may share the cores), median of "
        f"{rounds} interleaved rounds; float32; forward and backward through autograd; index construction included.",
        f"- Pattern: {SINK} sink columns, {LOCAL_BLOCKS} local block diagonals, random block diagonals worth half of the rest, "
        "random columns up to the density asked; density as `SparsePattern.density()` measures it. 100 % is `SparsePattern.dense`.",
        "- Block 128 where speed counts (fewer gathered bytes per score), 64 for comparison and for short sequences.",
        f'- FLOP: {FLOP_FORMULA}. "of ideal" = speed-up x density.',
        "- Checked before any timing: out, dq, dk, dv of every case (shortened to 987 tokens) against float64 dense attention; "
        f"largest error {worst:.1e}.",
        "",
    ]


def main() -> int:
    """Check, measure, print; exit status 1 when a case is wrong or a bar is missed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write the tables to {REPORT.parent.name}/{REPORT.name}")
    parser.add_argument("--quick", action="store_true", help="4K tokens only, no memory table")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds per case (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases, worst = all_cases(args.quick), 0.0
    for case in cases:
        error = check(case)
        worst = max(worst, error)
        if not error <= 2e-5:  # also true for NaN
            print(
                f"WRONG: {case}: error {error:.1e} against float64 dense attention; no speed is printed",
                file=sys.stderr,
            )
            return 1
    top = header(args.rounds, worst)
    print("\n".join(top))
    lines, good = speed_table(cases, args.rounds)
    if not args.quick:
        title = [
            "",
            "Peak extra memory of one forward and backward (peak resident memory of a fresh process minus that before the call):",
            "",
        ]
        print("\n".join(title))
        lines += title + memory_table([Case(s, 4, 4, 64, 128, 0.10) for s in (8192, 16384, 32768)])
    if args.write:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("\n".join([*top, *lines, ""]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
