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
import resource
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
    """Sinks, a local band, random columns and random block diagonals: half of the rest each, filled up to the density asked."""
    if case.density >= 1:
        return SparsePattern.dense(1, case.heads, case.seq_len, case.block)
    generator = torch.Generator().manual_seed(seed)
    size, blocks = case.seq_len, -(-case.seq_len // case.block)
    # Candidates in random order per head; a share `amount` of them is kept, found by bisection on the measured density.
    diagonals = [torch.randperm(blocks - LOCAL_BLOCKS, generator=generator) + LOCAL_BLOCKS for _ in range(case.heads)]
    columns = [torch.randperm(size - SINK, generator=generator) + SINK for _ in range(case.heads)]
    low, high, pattern = 0.0, 1.0, None
    for _ in range(12):
        amount = (low + high) / 2
        pattern = _vertical_slash_of(case, columns, diagonals, amount)
        if float(pattern.density().mean()) < case.density:
            low = amount
        else:
            high = amount
    assert pattern is not None
    return pattern


def _vertical_slash_of(case: Case, columns: list[Tensor], diagonals: list[Tensor], amount: float) -> SparsePattern:
    """The pattern that keeps a share of the candidates of every head."""
    num_columns, num_diagonals = round(amount * len(columns[0])), round(amount * len(diagonals[0]))
    near, sink = torch.arange(LOCAL_BLOCKS), torch.arange(SINK)
    kept_columns = torch.stack([torch.cat([sink, c[:num_columns]]).sort().values for c in columns])
    kept_diagonals = torch.stack([torch.cat([near, d[:num_diagonals]]).sort().values for d in diagonals])
    return SparsePattern(case.seq_len, case.block, kept_columns[None].int(), kept_diagonals[None].int())


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
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense causal attention of torch on [B, S, heads, D]."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)


def timed(attend: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """CPU seconds of one forward and one backward."""
    start = time.process_time()
    out = attend()
    middle = time.process_time()
    torch.autograd.grad(out, inputs[:3], inputs[3])
    return middle - start, time.process_time() - middle


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians over interleaved rounds, in CPU seconds."""
    # A new pattern per round: its index is built inside the timed call, as in training.
    patterns = [vertical_slash(case)] * rounds
    inputs = make_inputs(case)
    q, k, v, _ = inputs
    times: dict[str, list[float]] = {"dense fwd": [], "dense bwd": [], "sparse fwd": [], "sparse bwd": []}

    def sparse(pattern: SparsePattern) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = sparse_attention(q, k, v, pattern, backend="cpu")
            assert isinstance(out, Tensor)
            return out

        return run

    for number, pattern in enumerate([patterns[0], *patterns]):
        dense_times, sparse_times = timed(lambda: sdpa(q, k, v), inputs), timed(sparse(pattern), inputs)
        if number == 0:  # warm-up
            continue
        for name, seconds in zip(times, dense_times + sparse_times, strict=True):
            times[name].append(seconds)
    result = {name: statistics.median(values) for name, values in times.items()}
    result["density"] = float(patterns[0].density().mean())
    return result


def _memory_of(case: Case, kind: str, queue: multiprocessing.Queue) -> None:
    """Child process: growth of the peak resident memory over one forward and backward, in MiB."""
    torch.set_num_threads(1)
    # Warm up the libraries on a small case, so that their own buffers do not count.
    for which in (Case(512, case.heads, case.kv_heads, case.head_dim, case.block, case.density), case):
        pattern = vertical_slash(which)
        q, k, v, dout = make_inputs(which)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = sdpa(q, k, v) if kind == "dense" else sparse_attention(q, k, v, pattern, backend="cpu")
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, (q, k, v), dout)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((after - before) / 1024)


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
    lines = [
        "| S | H / K | D | block | density | dense fwd + bwd, s | sparse fwd + bwd, s | fwd x | bwd x | total x | of ideal | GFLOP/s | bar |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    good = True
    for case in cases:
        r = measure(case, rounds)
        dense, sparse = r["dense fwd"] + r["dense bwd"], r["sparse fwd"] + r["sparse bwd"]
        ratio = dense / sparse
        flops = 3.5 * 4 * case.head_dim * r["density"] * case.heads * case.seq_len * (case.seq_len + 1) / 2
        met = case.bar is None or ratio >= case.bar
        good &= met
        bar = "" if case.bar is None else f">= {case.bar:.2f}: {'met' if met else 'MISSED'}"
        lines.append(
            f"| {case.seq_len} | {case.heads} / {case.kv_heads} | {case.head_dim} | {case.block} | {100 * r['density']:.2f} % "
            f"| {r['dense fwd']:.4f} + {r['dense bwd']:.4f} | {r['sparse fwd']:.4f} + {r['sparse bwd']:.4f} "
            f"| {r['dense fwd'] / r['sparse fwd']:.2f} | {r['dense bwd'] / r['sparse bwd']:.2f} | **{ratio:.2f}** "
            f"| {ratio * r['density']:.2f} | {flops / sparse / 1e9:.0f} | {bar} |"
        )
        print(lines[-1], flush=True)
    return lines, good


def memory_table(cases: list[Case]) -> list[str]:
    """Markdown rows: peak extra memory and its size per token."""
    lines = [
        "| S | density | q, k, v, out and their gradients, MiB | dense extra peak, MiB | sparse extra peak, MiB | sparse KiB per token |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for case in cases:
        needed = 4 * case.seq_len * case.head_dim * (4 * case.heads + 4 * case.kv_heads) / 2**20
        dense, sparse = peak_memory(case, "dense"), peak_memory(case, "sparse")
        lines.append(
            f"| {case.seq_len} | {100 * case.density:.0f} % | {needed:.0f} | {dense:.0f} | {sparse:.0f} | {1024 * sparse / case.seq_len:.2f} |"
        )
        print(lines[-1], flush=True)
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


def main() -> int:
    """Check, measure, print; exit status 1 when a case is wrong or a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write the tables to {REPORT.parent.name}/{REPORT.name}")
    parser.add_argument("--quick", action="store_true", help="4K tokens only, no memory table")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds per case (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = all_cases(args.quick)
    worst = 0.0
    for case in cases:
        error = check(case)
        worst = max(worst, error)
        if not error <= 1e-5 * 5:
            print(
                f"WRONG: {case}: error {error:.2e} against float64 dense attention; no speed is printed",
                file=sys.stderr,
            )
            return 1
    header = [
        "# CPU attention: sparse backend against dense SDPA",
        "",
        f"`OMP_NUM_THREADS=1 python {' '.join(['scripts/bench_cpu.py', *sys.argv[1:]])}` on {datetime.date.today().isoformat()}, "
        f"{cpu_name()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}.",
        f"CPU seconds of the process (`time.process_time`: other processes may share the cores), median of {args.rounds} interleaved rounds, "
        "float32, forward + backward through autograd, index construction included.",
        f"Pattern: {SINK} sink columns, {LOCAL_BLOCKS} local block diagonals, random columns and random block diagonals; density as measured by "
        "`SparsePattern.density()`. 100 % is `SparsePattern.dense`.",
        f'FLOP: {FLOP_FORMULA}. "of ideal" = speed-up x density.',
        f"Checked first: out, dq, dk, dv of every case (shortened to 987 tokens) against float64 dense attention, largest error {worst:.1e}.",
        "",
    ]
    print("\n".join(header))
    lines, good = speed_table(cases, args.rounds)
    if not args.quick:
        print()
        memory = memory_table([Case(s, 4, 4, 64, 128, 0.10) for s in (8192, 16384, 32768)])
        lines += [
            "",
            "Peak extra memory of one forward + backward (growth of the peak resident set of a fresh process):",
            "",
            *memory,
        ]
    if args.write:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("\n".join([*header, *lines, ""]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
