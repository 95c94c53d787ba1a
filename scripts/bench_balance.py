"""Worker and step imbalance of the layouts, counted from patterns: synthetic ones, and a trained model's through --patterns.

    python scripts/bench_balance.py [--write] [--patterns FILE ...]

Work is counted in computed tile area (mtrain.balance.work), summed over layers, so nothing is timed but the solver. Each case
is a sequence of steps whose patterns drift and whose documents change; the balancer has seen all steps but the last, knows the
documents of the last (the data path does), and is judged on the last. "same step" is the same solver on the cost of the last
step itself.

--patterns takes the steps of one run, oldest first; with a single file the step is also the history. A .safetensors file holds
columns_<layer> and diagonals_<layer> (int32 [B, H, n], see SparsePattern), optionally doc_start (int64 [B, S]), and the
metadata seq_len and block; a .pt file holds a dictionary with the same keys.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mtrain.balance import Balancer, Forecast, imbalance, measure, solve, tile_density, work
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from sparse_kernels import SparsePattern

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "balance.md"
RANKS = (8, 16, 32)
BAR = 1.02


@dataclass(frozen=True)
class Step:
    """The patterns of all layers in one training step, and its documents."""

    layers: list[SparsePattern]
    doc_start: Tensor | None

    def measured(self) -> Tensor:
        """float64 [3, NB], summed over layers."""
        return torch.stack([measure(pattern, self.doc_start).cpu() for pattern in self.layers]).sum(0)

    def work(self, layout: RingLayout, topology: RingTopology) -> Tensor:
        """float64 [layers, W, steps + 1]."""
        return torch.stack([work(pattern, layout, topology, self.doc_start) for pattern in self.layers])


def synthetic_steps(
    blocks: int, block: int, packed: float, heads: int = 16, layers: int = 4, steps: int = 6, seed: int = 0
) -> list[Step]:
    """Sinks, locals, slashes with log-uniform distances, columns that crowd towards the start; budgets heavy-tailed over heads.

    From step to step a third of the slashes and columns of every head is drawn anew, and so are all documents, whose lengths are
    log-normal with a mean of ``packed`` sequences (0: one document).
    """
    draw = torch.Generator().manual_seed(blocks + seed)
    seq_len = blocks * block
    tables = [[_head(seq_len, draw) for _ in range(heads)] for _ in range(layers)]
    result = []
    for _ in range(steps):
        for table in tables:
            for slashes, columns in table:
                fresh = torch.rand(slashes.numel(), generator=draw) < 1 / 3
                slashes[fresh] = _slashes(seq_len, int(fresh.sum()), draw)
                fresh = torch.rand(columns.numel(), generator=draw) < 1 / 3
                columns[fresh] = _columns(seq_len, int(fresh.sum()), draw)
        doc_start = _documents(seq_len, packed * seq_len, draw) if packed else None
        result.append(Step([_pattern(seq_len, block, table) for table in tables], doc_start))
    return result


def _head(seq_len: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    slashes, columns = torch.empty(2).log_normal_(0.0, 0.7, generator=draw).tolist()
    return _slashes(seq_len, 1 + int(60 * slashes), draw), _columns(seq_len, 1 + int(0.01 * seq_len * columns), draw)


def _slashes(seq_len: int, count: int, draw: torch.Generator) -> Tensor:
    return (float(seq_len) ** torch.rand(count, generator=draw)).long().clamp(max=seq_len - 1)


def _columns(seq_len: int, count: int, draw: torch.Generator) -> Tensor:
    return (seq_len * torch.rand(count, generator=draw) ** 1.5).long().clamp(max=seq_len - 1)


def _documents(seq_len: int, mean: float, draw: torch.Generator) -> Tensor:
    doc_start, begin = torch.zeros(1, seq_len, dtype=torch.int64), 0
    while begin < seq_len:
        length = 1 + int(mean * torch.empty(1).log_normal_(-0.5, 1.0, generator=draw))
        doc_start[0, begin : begin + length] = begin
        begin += length
    return doc_start


def _pattern(
    seq_len: int, block: int, heads: list[tuple[Tensor, Tensor]], sink: int = 16, local: int = 128
) -> SparsePattern:
    last = -(-seq_len // block) - 1
    diagonals, columns = [], []
    for slashes, keys in heads:
        near = torch.arange(-(-local // block) + 1)
        offsets = torch.cat([near, slashes // block, -(-slashes // block)]).clamp(max=last).unique()
        diagonals.append(offsets.int())
        columns.append(torch.cat([torch.arange(sink), keys]).unique().int())
    return SparsePattern(seq_len, block, _pad(columns, seq_len), _pad(diagonals, -1))


def _pad(lists: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=value)[None]


def load_step(path: Path) -> Step:
    """Read one step's patterns; the format is at the top of this file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            tensors |= {
                key: int(value) for key, value in (file.metadata() or {}).items() if key in ("seq_len", "block")
            }
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    missing = [key for key in ("seq_len", "block", "diagonals_0") if key not in tensors]
    if missing:
        raise SystemExit(
            f"{path}: no {', '.join(missing)}; expected columns_<layer>, diagonals_<layer>, seq_len and block"
        )
    layers: list[SparsePattern] = []
    while f"diagonals_{len(layers)}" in tensors:
        i = len(layers)
        layers.append(
            SparsePattern(tensors["seq_len"], tensors["block"], tensors.get(f"columns_{i}"), tensors[f"diagonals_{i}"])
        )
    return Step(layers, tensors.get("doc_start"))


@dataclass(frozen=True)
class Row:
    """One line of the table: ``pairs`` are (worker, step) imbalances, ``by_layer`` step imbalances of striped and balanced."""

    case: str
    blocks: int
    density: float
    ranks: int
    pairs: dict[str, tuple[float, float]]
    by_layer: tuple[float, float]
    bound: float
    milliseconds: float


def rows_of(name: str, steps: list[Step], ranks: tuple[int, ...] = RANKS) -> Iterator[Row]:
    """One row per number of ranks."""
    last, history = steps[-1], steps[:-1] or steps
    seq_len, block = last.layers[0].seq_len, last.layers[0].block
    balancer = Balancer(seq_len, block)
    for step in history:
        balancer.update(step.measured())
    density = sum(tile_density(pattern, last.doc_start) for pattern in last.layers) / len(last.layers)
    for count in ranks:
        ring = RingTopology(1, count)
        begin = time.process_time()
        plan = balancer.plan(ring, last.doc_start)
        spent = time.process_time() - begin
        assert plan is not None
        same = solve(Forecast.of(last.measured(), seq_len, block, last.doc_start), ring)
        tables = {
            kind: last.work(RingLayout.build(kind, seq_len, count, block), ring) for kind in ("zigzag", "striped")
        }
        for key, owner in (("next", plan.owner), ("same", same.owner)):
            tables[key] = last.work(RingLayout.build("balanced", seq_len, count, block, assignment=owner), ring)
        pairs = {key: imbalance(table.sum(0)) for key, table in tables.items()}
        by_layer = (_by_layer(tables["striped"]), _by_layer(tables["next"]))
        yield Row(name, -(-seq_len // block), density, count, pairs, by_layer, same.bound, spent * 1e3)


def _by_layer(table: Tensor) -> float:
    """Step imbalance when every layer waits for its own slowest rank: sum over layers and steps of max_r, over the mean."""
    return float(table.max(1).values.sum() / (table.sum() / table.shape[1]))


def render(rows: list[Row]) -> str:
    """The table in Markdown, worker / step imbalance in each cell."""
    head = (
        "| case | NB | tile density | W | blocks per rank | zigzag | striped | **balanced, next step** | balanced, same step "
        "| worker bound | step by layer: striped, balanced | solver, processor ms | bar |"
    )
    lines = [head, "|" + "---|" * 13]
    for row in rows:
        pair = {key: "{:.3f} / {:.3f}".format(*value) for key, value in row.pairs.items()}
        lines.append(
            f"| {row.case} | {row.blocks} | {row.density:.3f} | {row.ranks} | {-(-row.blocks // row.ranks)} | {pair['zigzag']} "
            f"| {pair['striped']} | **{pair['next']}** | {pair['same']} | {row.bound:.3f} "
            f"| {row.by_layer[0]:.3f}, {row.by_layer[1]:.3f} | {row.milliseconds:.0f} | {verdict(row)} |"
        )
    return "\n".join(lines)


def verdict(row: Row) -> str:
    """Does the next step keep worker <= BAR and step <= striped's?"""
    worker, step = row.pairs["next"]
    kept = {"worker": worker <= BAR, "step": step <= row.pairs["striped"][1] + 1e-9}
    missed = [name for name, ok in kept.items() if not ok]
    impossible = " (the bound is above it)" if row.bound > BAR and not kept["worker"] else ""
    return f"missed: {', '.join(missed)}{impossible}" if missed else "met"


def time_solver(blocks: int = 8192, ranks: int = 64, repeats: int = 7) -> str:
    """The largest case that has to fit between two steps."""
    step = synthetic_steps(blocks, 64, 1 / 32, heads=4, layers=1, steps=1)[0]
    forecast = Forecast.of(step.measured(), blocks * 64, 64, step.doc_start)
    wall, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan = solve(forecast, RingTopology(1, ranks))
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return (
        f"Solver, {blocks} blocks x {ranks} ranks, packed, one thread: {min(wall) * 1e3:.0f} ms (processor time "
        f"{min(cpu) * 1e3:.0f} ms; best of {repeats}); striped {plan.striped_worker:.3f} / {plan.striped_step:.3f} -> "
        f"{plan.worker:.3f} / {plan.step:.3f}."
    )


def main() -> None:
    """Print the table; --write also stores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"store the table in {TABLE.parent.name}/{TABLE.name}")
    parser.add_argument(
        "--patterns",
        nargs="+",
        type=Path,
        default=[],
        help="steps of one run, oldest first; files of another block size are another case",
    )
    sizes = [256, 512, 1024, 8192]
    parser.add_argument(
        "--blocks", nargs="+", type=int, default=sizes, help="synthetic sequence lengths, in blocks of 64"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic patterns and documents")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for blocks in options.blocks:
        for name, packed in (("synthetic", 0.0), ("packed, ~4 documents", 1 / 4), ("packed, ~32 documents", 1 / 32)):
            rows += rows_of(name, synthetic_steps(blocks, 64, packed, seed=options.seed))
            print(render(rows[-len(RANKS) :]), flush=True)
    trained: dict[int, list[Step]] = {}
    for step in map(load_step, options.patterns):
        trained.setdefault(step.layers[0].block, []).append(step)
    for block, steps in trained.items():
        rows += rows_of(f"trained model, blocks of {block}", steps)
        print(render(rows[-len(RANKS) :]), flush=True)
    met = sum(verdict(row) == "met" for row in rows)
    summary = f"Bar (worker <= {BAR}, step <= striped's) met in {met} of {len(rows)} rows."
    text = f"{render(rows)}\n\n{summary}\n\n{time_solver()}\n"
    print(text.split("\n\n", 1)[1])
    if options.write:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(f"{INTRODUCTION}\n\n{text}")


INTRODUCTION = """# Balance of the ring, by layout

`python scripts/bench_balance.py --write --patterns benchmarks/patterns/*.safetensors`; the patterns are those of the
model that `make quickstart` trained, on three steps of its own data (`scripts/dump_patterns.py`). At 4096 tokens it
leaves 2 to 32 blocks per rank. Every cell is worker / step imbalance: max_r sum_t / mean and (sum_t max_r) / mean of
the computed tile area of rank r in step t, exactly counted, columns as one more local step. Flat ring; synthetic
cases: 4 layers of 16 heads, blocks of 64 tokens. "Next step" is what training gets: the balancer has seen five
earlier steps whose patterns share two thirds of their slashes and columns from one to the next, and knows only the
documents of the step it is judged on. "Same step" has seen the step itself. The bound is a worker imbalance that no
assignment with equal block counts can beat (steps ignored). "By layer" adds up the steps of every layer on its own,
as the ring waits; the assignment is one for all layers and balances their sum.

With other synthetic draws (`--seed 1000`, `2000`, `3000`, `--blocks 256 512 1024`) 76 of 81 rows meet the bar. The five misses
are packed, at W = 32 with 8 or 16 blocks per rank: worker up to 1.089, or a step imbalance 0.001 to 0.003 above striped's."""

if __name__ == "__main__":
    main()
