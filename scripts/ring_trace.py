"""One attention layer of a 32-rank ring on one device: every rank's local work of every ring step, timed in turn.

    python scripts/ring_trace.py                          # everything on a CUDA device, printed
    python scripts/ring_trace.py --write                  # the same, into benchmarks/ring_trace.{json,md}
    python scripts/ring_trace.py --models llama-3.1-8b --lengths 1M --densities 1 --layouts zigzag --write
    python scripts/ring_trace.py --smoke                  # tiny, on the CPU: tests the script, measures nothing

mtrain's own ring loop runs rank by rank over a ring that answers from memory (scripts/ring_trace_parts/replay.py). From the trace
and stated speeds of links the time of the layer is modelled, as one flat ring and as rings inside nodes (.../model.py).

First a small ring of every pattern and layout is held against float64 by the two rules of `sparse_kernels.accuracy`, and every
case's last rows at full length: a wrong result ends the run before any figure of it is printed. With --write (or --out) files
are written after every case; --resume goes on with the file of a run that was cut short, or of other cases of the same code.
A round of a case takes about 14 x D x area / speed of the device: all dense cases of one layout are 60 PFLOP, those of 10 % and 5 %
9 PFLOP; below a millisecond per (rank, step) the host sets the pace, of every rank in a real ring as well. A million tokens of
32 / 8 heads take about 30 GiB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from mtrain.topology import RingTopology
from scripts.kernel_bench.report import read_results, write_whole
from scripts.ring_trace_parts import cases, report
from scripts.ring_trace_parts.cases import MODELS, Case

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
SHORT, SHORT_RING = 2048, RingTopology(2, 2)


def tokens(text: str) -> int:
    """128K, 1M or a plain number."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1].upper(), 1)
    return int(text if unit == 1 else text[:-1]) * unit


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line; --smoke has its own sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny layer, 2K tokens, 2 x 2 ranks, on the CPU")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), help="default: qwen2.5-3b llama-3.1-8b")
    parser.add_argument("--lengths", nargs="+", type=tokens, help="in tokens; default: 128K 512K 1M")
    parser.add_argument("--densities", nargs="+", type=float, default=[1.0, 0.1, 0.05], help="1: dense")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--outer", type=int, help="nodes (default 4)")
    parser.add_argument("--inner", type=int, help="ranks per node (default 8)")
    parser.add_argument(
        "--nics", choices=("gpu", "node"), default="gpu", help="a network card per GPU, or one per node"
    )
    parser.add_argument("--backend", default="auto", help="for sparse patterns")
    parser.add_argument(
        "--dense-backend", default="fastest", help="for dense patterns; fastest: of those that pass the check"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="rounds are added to a case while they fit into this"
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/ring_trace.{json,md}")
    parser.add_argument("--out", type=Path, help="write there instead: a path without ending")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases of the file, measured with the same kernels"
    )
    options = parser.parse_args(given)
    if options.smoke and options.write:
        parser.error(
            "--smoke measures nothing, so there is nothing to --write into benchmarks/; --out PATH shows the files"
        )
    options.command = "python scripts/ring_trace.py " + shlex.join(sys.argv[1:] if given is None else given)
    options.models = options.models or (["tiny"] if options.smoke else ["qwen2.5-3b", "llama-3.1-8b"])
    options.lengths = options.lengths or ([SHORT] if options.smoke else [1 << 17, 1 << 19, 1 << 20])
    options.outer = options.outer or (2 if options.smoke else 4)
    options.inner = options.inner or (2 if options.smoke else 8)
    options.seconds = 0.0 if options.smoke else options.seconds
    options.out = options.out or (ROOT / "benchmarks" / "ring_trace" if options.write else None)
    return options


Chosen = dict[tuple[str, bool, str], str]


def checked(options: argparse.Namespace, device: torch.device) -> tuple[Chosen, list[str]]:
    """(backend by model, "is it dense" and layout; what is wrong): a small ring of every pattern and layout to come."""
    chosen: Chosen = {}
    problems: list[str] = []
    for model, dense, layout in itertools.product(options.models, (True, False), options.layouts):
        small = [Case(model, SHORT, d, layout) for d in options.densities if (d >= 1) == dense]
        if not small:
            continue
        complaints: list[str] = []
        for name in candidates(options, model, dense, layout, device):
            wrong = [f"{name}: {p}" for case in small for p in cases.check(case, SHORT_RING, name, device)]
            complaints += wrong
            if not wrong:
                chosen[model, dense, layout] = name
                break
        if (model, dense, layout) not in chosen:
            problems += complaints
        elif complaints:
            print("not taken for dense patterns: " + "; ".join(complaints), file=sys.stderr)
    return chosen, problems


def candidates(options: argparse.Namespace, model: str, dense: bool, layout: str, device: torch.device) -> list[str]:
    """Names of backends to try, best first; the dense ones are timed at the shortest length."""
    if not dense:
        return [options.backend]
    if options.dense_backend != "fastest":
        return [options.dense_backend]
    case = Case(model, min(options.lengths), 1.0, layout)
    return cases.quickest_dense(case, RingTopology(options.outer, options.inner), device)


def main(given: list[str] | None = None) -> int:
    """0: measured. 1: a result was wrong. 2: there is nothing to measure on."""
    options = arguments(given)
    if not options.smoke and not torch.cuda.is_available():
        print(
            "ring_trace measures on a CUDA device and torch finds none here. Run it on a GPU machine (`make gpu-ring`), or test "
            "the script itself with: python scripts/ring_trace.py --smoke",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cpu" if options.smoke else "cuda")
    if options.smoke:
        torch.set_num_threads(1)
    trace = resumed(options, device)
    chosen, problems = checked(options, device)
    if problems:
        print("WRONG RESULTS, so no time is shown:\n  " + "\n  ".join(problems))
        return 1
    topology = RingTopology(options.outer, options.inner)
    done = {report.key(record) for record in trace["records"]}
    for model in options.models:
        trace["linear_rate"][model] = cases.linear_rate(MODELS[model], 64 if options.smoke else 8192, device)
        for length, density, layout in itertools.product(options.lengths, options.densities, options.layouts):
            case = Case(model, length, density, layout)
            if (model, length, density, layout, options.outer, options.inner) in done:
                continue
            if reason := cases.too_large(case, topology, device):
                print(f"left out: {reason}", file=sys.stderr)
                continue
            try:
                record = cases.trace(case, topology, chosen[model, density >= 1, layout], device, options.seconds)
            except cases.WrongResultError as error:
                print(error)
                return 1
            trace["records"].append(record)
            print(f"done: {case}, {record['rounds']} round(s)", file=sys.stderr, flush=True)
            save(trace, options.out)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    save(trace, options.out)
    print(report.markdown(trace))
    return 0


def resumed(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """An empty trace, or with --resume the one in the file if it was made on such a device with this torch."""
    facts = report.environment(device, options.command.strip())
    fresh: dict[str, Any] = {
        "environment": facts, "nics": options.nics, "per_node": options.inner, "linear_rate": {}, "records": [],
    }  # fmt: skip
    file = options.out and options.out.with_suffix(".json")
    if not (options.resume and file and file.exists()):
        return fresh
    before = read_results(file)
    old = before["environment"]
    if any(old.get(name) != facts[name] for name in ("device", "torch", "triton")):
        raise SystemExit(
            f"{file} was made on {old['device']} with torch {old['torch']}: give another --out, or no --resume"
        )
    facts["earlier"] = [*old["earlier"], f"{old['made']}: {old['command']}"]
    return fresh | {"records": before["records"], "linear_rate": before["linear_rate"]}


def save(trace: dict[str, Any], path: Path | None) -> None:
    """The JSON, compact because it holds thousands of times, and the table."""
    if path is not None:
        text = json.dumps(trace, separators=(",", ":")).replace('{"model"', '\n{"model"')
        write_whole(path.with_suffix(".json"), text + "\n")
        write_whole(path.with_suffix(".md"), report.markdown(trace))


if __name__ == "__main__":
    sys.exit(main())
