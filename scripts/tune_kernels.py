"""Which launch shape is fastest: candidates for rows of sparse_kernels/gpu/config.py, one change at a time, checked before timed.

    python scripts/tune_kernels.py                                    # on a CUDA device: head_dim 128, bf16, its own generation
    python scripts/tune_kernels.py --kernels dq dkdv --head-dim 64 --lengths 131072 --densities 1 0.05
    python scripts/tune_kernels.py --dry-run --capability 90          # anywhere: lists the candidates, compiles those in force
    python scripts/tune_kernels.py --dry-run --capability 90 --compile-all --out runs/fits_90_128
    python scripts/tune_kernels.py --fits runs/fits_90_128            # spares the device's time the compiling of what cannot fit

A candidate differs from the row in force in one number (query rows, key rows, warps or stages); --around TILE starts elsewhere, as
in "64x64 w8 s2". Those that spill registers or need too much shared memory are dropped after compiling, those whose results are
wrong after one call (two rules of `sparse_kernels.accuracy` in 16 bits). The rest take turns round by round; medians of CUDA-event
times of the whole forward (kernel "forward") or backward (the others) are compared with those of the row in force, in the same
rounds.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from scripts.kernel_bench import contestants, measure, report
from scripts.kernel_bench.cases import FLOP_FORMULA, Shape, inputs, vertical_slash
from sparse_kernels import SparsePattern
from sparse_kernels.accuracy import dense_by_rows, two_rules
from sparse_kernels.gpu import config
from sparse_kernels.gpu.config import Tile
from sparse_kernels.gpu.recorded import structured_launches
from sparse_kernels.gpu.resources import SHARED_LIMIT

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAUNCHES = {"forward": "forward_kernel", "dq": "dq_kernel", "dkdv": "dkdv_kernel", "columns": "column_kernel"}
SIDES = {2: (16, 32, 64, 128, 256), 4: (16, 32, 64)}
FLOAT32_ALLOWED = 3e-5  # of the largest value, or of 1
WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Target:
    """Whose row is tuned."""

    capability: int
    head_dim: int
    dtype: str
    block: int

    @property
    def key(self) -> config.Key:
        """Of the row in each kernel's table."""
        generation = config.generation(self.capability // 10, SHARED_LIMIT[self.capability])
        return config.row_key(generation, self.head_dim, DTYPES[self.dtype].itemsize)

    def in_force(self, kernel: str) -> Tile:
        """The tile that the table gives now."""
        return config.tile_for(kernel, self.key[0], self.head_dim, self.key[2], self.block)


def neighbours(tile: Tile, itemsize: int, block: int) -> Iterator[Tile]:
    """The tile, and those that differ from it in one number; a tile lies within a block."""
    yield tile
    sides = [side for side in SIDES[itemsize] if side <= block]
    for name, values in (("m", sides), ("n", sides), ("warps", WARPS), ("stages", STAGES)):
        for value in values:
            if value != getattr(tile, name):
                yield replace(tile, **{name: value})


def row_with(kernel: str, target: Target, tile: Tile) -> tuple[Tile, ...]:
    """The table's row with this tile in the place of the one in force."""
    row, held = config.TABLE[kernel][target.key], target.in_force(kernel)
    place = next(i for i, known in enumerate(row) if known.within(target.block) == held)
    return (*row[:place], tile, *row[place + 1 :])


def using(kernel: str, target: Target, tile: Tile) -> Any:
    """A context in which the kernel is launched with this tile, whatever the row holds besides."""
    return mock.patch.dict(config.TABLE[kernel], {target.key: (tile,)})


def text_of(tile: Tile) -> str:
    """As in benchmarks/kernels_report.md."""
    return f"{tile.m}x{tile.n} w{tile.warps} s{tile.stages}"


def tile_of(text: str) -> Tile:
    """The inverse of `text_of`."""
    found = re.fullmatch(r"(\d+)x(\d+) w(\d+) s(\d+)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no tile; write query rows x key rows, warps, stages: '64x64 w8 s2'"
        )
    return Tile(*map(int, found.groups()))


def misfit(kernel: str, target: Target, tile: Tile) -> str | None:
    """Compile the kernel with the tile; None if it fits the chip, else why not. Needs no GPU."""
    dtype = DTYPES[target.dtype]
    try:
        with using(kernel, target, tile):
            launches = structured_launches(target.capability, target.head_dim, dtype, target.block, documents=True)
            found = next(x for x in launches if x.name == LAUNCHES[kernel]).measure(target.capability)
    except Exception as error:  # the compiler refuses in many ways, and each of them only drops the candidate
        return f"does not compile: {measure.told(error)}"
    if found.spills:
        return f"spills {found.spills} bytes"
    if found.shared > SHARED_LIMIT[target.capability]:
        return f"needs {found.shared // 1024} KiB of shared memory"
    return None if found.tensor_cores else "uses no tensor cores"


# ------------------------------------------------------------------------------------------------------------------ on a device


def attend_with(kernel: str, target: Target, tile: Tile, pattern: SparsePattern) -> contestants.Attend:
    """Our attention with this tile. The table is left so until the next one sets it, because a backward follows its forward."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config.TABLE[kernel][target.key] = (tile,)
        return contestants.ours(pattern)(q, k, v)

    return attend


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def tensors_of(target: Target, settings: measure.Settings) -> Tensors:
    """q, k, v (leaves) and dout in the target's dtype."""
    q, k, v, dout = (
        t.detach().to(DTYPES[target.dtype]) for t in inputs(settings.shape, settings.length, settings.device)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def wrong(kernel: str, target: Target, tile: Tile, settings: measure.Settings) -> str | None:
    """None if out, dq, dk, dv at this (short) length are right for every density, else the first complaint."""
    for density in settings.densities:
        pattern = vertical_slash(settings.shape, settings.length, density)[0].to(settings.device)
        q, k, v, dout = tensors_of(target, settings)
        try:
            with using(kernel, target, tile):
                out = contestants.ours(pattern)(q, k, v)
                found = (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))
        except Exception as error:  # Triton's errors (too much shared memory, say) are not RuntimeErrors
            return f"does not run: {measure.told(error)}"
        truth, plain = (dense_by_rows(q, k, v, dout, pattern, dtype=dtype) for dtype in (torch.float64, q.dtype))
        for name, a, at in zip(("out", "dq", "dk", "dv"), found, (0, 2, 3, 4), strict=True):
            problem = differs(a, truth[at], plain[at], gradient=at > 0)
            if problem:
                return f"wrong at density {density:.0%}: {name}: {problem}"
    return None


def differs(found: Tensor, truth: Tensor, plain: Tensor, *, gradient: bool) -> str | None:
    """None if close enough: by the two rules in 16 bits; float32 is computed as three tf32 products, which are a little coarser."""
    if found.dtype != torch.float32:
        return two_rules(found, truth, plain, gradient=gradient)
    error, limit = float((found.double() - truth).abs().max()), FLOAT32_ALLOWED * max(1.0, float(truth.abs().max()))
    return None if error <= limit else f"largest error {error:.3g}, allowed {limit:.3g}"


def timed(kernel: str, target: Target, tiles: list[Tile], settings: measure.Settings) -> list[dict[str, Any]]:
    """One record per tile: milliseconds of the kernel's direction for every density, or why it "failed" at this length."""
    direction = "forward" if kernel == "forward" else "backward"
    records: list[dict[str, Any]] = [{"tile": tile, "ms": {}} for tile in tiles]
    tensors = tensors_of(target, settings)
    with mock.patch.dict(config.TABLE[kernel]):  # whatever happens inside, the table comes back
        for density in settings.densities:
            pattern = vertical_slash(settings.shape, settings.length, density)[0].to(settings.device)
            turns: list[tuple[dict[str, Any], dict[str, Any], contestants.Attend]] = []
            for record in records:
                attend = attend_with(kernel, target, record["tile"], pattern)
                reason = record.get("failed") or measure.usable(attend, tensors, direction == "backward")
                if reason:
                    record["failed"] = reason
                else:
                    turns.append((record, {}, attend))
            measure.take_turns([(found, attend) for _, found, attend in turns], tensors, settings)
            for record, found, _ in turns:
                record["ms"][density] = found[f"{direction}_ms"]
    return records


def score(record: dict[str, Any], base: dict[str, Any]) -> float:
    """Geometric mean over densities of time / time of the row in force."""
    product = 1.0
    for density, spent in record["ms"].items():
        product *= spent / base["ms"][density]
    return float(product ** (1 / len(record["ms"])))


def table(kernel: str, records: list[dict[str, Any]]) -> list[str]:
    """Sorted by time."""
    densities, base = list(records[0]["ms"]), records[0]
    lines = [f"| {kernel} | " + " | ".join(f"ms at {d:.0%}" for d in densities) + " | time / in force |"]
    lines.append("|" + "---|" * (len(densities) + 2))
    for record in sorted(records, key=lambda r: score(r, base)):
        mark = " (in force)" if record is base else ""
        spent = " | ".join(f"{record['ms'][d]:.3f}" for d in densities)
        lines.append(f"| {text_of(record['tile'])}{mark} | {spent} | {score(record, base):.3f} |")
    return lines


def pasted(kernel: str, target: Target, tile: Tile) -> str:
    """The row as config.py writes it."""
    row = ", ".join(f"Tile({t.m}, {t.n}, {t.warps}, {t.stages})" for t in row_with(kernel, target, tile))
    generation, *rest = target.key
    name = {config.AMPERE: "AMPERE", config.HOPPER: "HOPPER", config.SMALL: "SMALL"}[generation]
    return f"{kernel}:     ({name}, {', '.join(map(str, rest))}): ({row},),"


def tune(kernel: str, target: Target, options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Lines of the report of one kernel."""
    shape = Shape(options.heads, options.kv_heads, target.head_dim, target.block)
    kept, held = [], target.in_force(kernel)
    short = min(measure.SHORT, *options.lengths)
    settings = measure.Settings(shape, short, options.densities, device, True, False, options.seconds)
    for tile in candidates_of(kernel, target, options):
        reason = (None if options.fits else misfit(kernel, target, tile)) or wrong(kernel, target, tile, settings)
        if reason:
            yield f"- {kernel} {text_of(tile)}: {reason}"
            if tile == held:
                raise RuntimeError(f"the row in force for {kernel} cannot be compared with: {reason}")
        else:
            kept.append(tile)
    if kept[:1] != [held]:
        raise RuntimeError(
            f"--fits leaves out {text_of(held)}, which is in force for {kernel}: there is nothing to compare with"
        )
    for length in options.lengths:
        records = timed(kernel, target, kept, replace(settings, length=length))
        if reason := records[0].get("failed"):
            raise RuntimeError(f"the row in force for {kernel} did not run at {length} tokens: {reason}")
        yield from (f"- {kernel} {text_of(r['tile'])}: {r['failed']}" for r in records if "failed" in r)
        records = [record for record in records if "failed" not in record]
        yield from ["", f"{shape}, {length} tokens:", "", *table(kernel, records), ""]
        best = min(records, key=lambda r: score(r, records[0]))
        yield f"best at {length} tokens, ready to paste: `{pasted(kernel, target, best['tile'])}`"


def dry_run(target: Target, options: argparse.Namespace) -> int:
    """List what would be tried, and compile what is in force (--compile-all: every candidate). 1: what is in force does not fit."""
    failed, fits = False, [str(target)]
    for kernel in options.kernels:
        held = target.in_force(kernel)
        listed = candidates_of(kernel, target, options)
        print(f"{kernel}, {target}: {len(listed)} candidates, the first is in force")
        for tile in listed:
            verdict = ""
            if options.compile_all or tile == held:
                reason = misfit(kernel, target, tile)
                verdict = f": {reason or 'compiles without spills'}"
                failed |= tile == held and reason is not None
                fits += [] if reason else [f"{kernel} {text_of(tile)}"]
            print(f"  {text_of(tile)}{verdict}", flush=True)
    if options.out:
        report.write_whole(options.out, "\n".join(fits) + "\n")
    return int(failed)


def candidates_of(kernel: str, target: Target, options: argparse.Namespace) -> list[Tile]:
    """The tile in force and those to compare with it; with --fits only those that the file holds."""
    held = target.in_force(kernel)
    every = list(dict.fromkeys([held, *neighbours(options.around or held, target.key[2], target.block)]))
    if not options.fits:
        return every
    made_for, *lines = options.fits.read_text().splitlines()
    if made_for != str(target):
        raise SystemExit(
            f"{options.fits} is for {made_for}, not for {target}: make it anew with --dry-run --compile-all --out"
        )
    return [tile for tile in every if f"{kernel} {text_of(tile)}" in lines]


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=list(LAUNCHES), default=list(LAUNCHES))
    parser.add_argument("--capability", type=int, choices=sorted(SHARED_LIMIT), help="default: that of the device")
    parser.add_argument("--head-dim", type=int, choices=config.HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--block", type=int, default=128, help="of the pattern")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 15])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.05])
    parser.add_argument(
        "--around", type=tile_of, help="change this tile instead of the one in force, as in '64x64 w8 s2'"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="about so long per kernel, length and density")
    parser.add_argument("--out", type=Path, help="also write the report (with --dry-run: what fits) to this file")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and compile what is in force")
    parser.add_argument(
        "--compile-all", action="store_true", help="with --dry-run: compile all, and list in --out which fit"
    )
    parser.add_argument(
        "--fits", type=Path, help="that list: try what stands there, and do not compile for another look"
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """0: done. 1: a row in force does not fit, or a kernel could not be tuned. 2: there is nothing to measure on."""
    options = arguments(given)
    available = torch.cuda.is_available()
    if not options.dry_run and not available:
        print(
            "tune_kernels times CUDA kernels and torch finds no CUDA device here. Run it on a GPU machine (`make gpu-tune`), or "
            "see what it would do with: python scripts/tune_kernels.py --dry-run",
            file=sys.stderr,
        )
        return 2
    capability = options.capability
    if capability is None:
        major, minor = torch.cuda.get_device_capability() if available else (9, 0)
        capability = 10 * major + minor
    target = Target(capability, options.head_dim, options.dtype, options.block)
    if options.dry_run:
        return dry_run(target, options)
    if target.key[0] != config.generation_of(torch.device("cuda")):
        print(f"this device uses other rows than sm_{capability}: leave out --capability", file=sys.stderr)
        return 2
    command = shlex.join(["python", "scripts/tune_kernels.py", *(sys.argv[1:] if given is None else given)])
    facts = report.environment(torch.device("cuda"), smoke=False, command=command)
    lines = ["# Tiles tried", "", report.versions(facts)]
    lines += [
        f"{target}. Times are medians of interleaved rounds (CUDA events, launches not included). {FLOP_FORMULA}",
        "",
    ]
    failed = False

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        if options.out:
            report.write_whole(options.out, "\n".join(lines) + "\n")

    for kernel in options.kernels:
        try:
            for line in tune(kernel, target, options, torch.device("cuda")):
                tell(line)
        except RuntimeError as error:  # the other kernels can still be tuned
            failed = True
            tell(f"- {kernel} is not tuned: {measure.told(error)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
