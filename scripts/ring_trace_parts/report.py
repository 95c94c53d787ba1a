"""The table of a trace."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata, util
from typing import Any

import torch

from scripts.kernel_bench.report import driver
from scripts.ring_trace_parts.cases import FLOP_FORMULA, MODELS
from scripts.ring_trace_parts.model import Cluster, clusters, imbalances, layer_time, local_seconds, training_step

Record = dict[str, Any]


def environment(device: torch.device, command: str) -> Record:
    """What the figures were made with."""
    cuda = device.type == "cuda"
    return {
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "earlier": [],
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()}), a test of the script",
        "torch": torch.__version__,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
        "flash_attn": metadata.version("flash-attn") if util.find_spec("flash_attn") else None,
        "cuda": torch.version.cuda,
        "driver": driver() if cuda else None,
        "formula": FLOP_FORMULA,
    }


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same case."""
    return tuple(record[name] for name in ("model", "length", "density", "layout", "outer", "inner"))


def markdown(trace: Record) -> str:
    """The whole report of a trace: {"environment", "nics", "per_node", "linear_rate", "records"}."""
    facts, records = trace["environment"], trace["records"]
    fabrics = clusters(trace["nics"], facts["device"], trace["per_node"])
    lines = ["# The ring, rank by rank on one device", ""]
    if facts["device"].startswith("CPU"):
        lines += ["**Made on a CPU: it tests the script; its times say nothing about speed.**", ""]
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("torch", "triton", "flash_attn", "cuda", "driver") if facts[name]
    )
    lines += [f"`{facts['command']}`, {facts['device']}, {versions}, {facts['made']}.", ""]
    if facts["earlier"]:
        lines += ["Some cases are of earlier runs: " + "; ".join(facts["earlier"]) + ".", ""]
    lines += [EXPLANATION, "", facts["formula"] + ".", "", "Links: " + "; ".join(map(describe, fabrics)) + ".", ""]
    for model, length, outer, inner in dict.fromkeys(
        (r["model"], r["length"], r["outer"], r["inner"]) for r in records
    ):
        chosen = [
            r for r in records if (r["model"], r["length"], r["outer"], r["inner"]) == (model, length, outer, inner)
        ]
        shape = MODELS[model].shape
        lines += [f"## {MODELS[model].name} ({shape}), {length} tokens, {outer} x {inner} ranks", ""]
        lines += [*measured(chosen), ""]
        for fabric in fabrics:
            lines += [*modelled(chosen, fabric, trace["linear_rate"][model]), ""]
    return "\n".join(lines)


EXPLANATION = """Measured: the local work of one attention layer (bf16, batch 1) of every rank in every ring step, done by
mtrain's own ring loop over a ring that answers from memory: index, kernels and sums of gradients, without transfers and waiting.
TFLOP/s and imbalance in time are of these times (worker = busiest rank's sum over the mean; step = sum over steps of the slowest
rank, over the mean). Balanced is solved for the very pattern that is measured. Patterns: sinks, a local band, random slashes and
columns (scripts/kernel_bench/cases.py), every query head with its own; dense runs on the backend that is
quickest in that layout and passes the check.

Modelled: time of the layer on a cluster, from these times and the speeds of the links (scripts/ring_trace_parts/model.py).
Exposed = share of the layer's time that would vanish if links cost nothing. Training step = all layers with recomputation of
the forward, plus a rank's matrix products at the speed measured here for the MLP's; estimation of patterns, optimizer and the
gradients' own all-reduce are left out. Its speed-up is over the dense zigzag ring, in the hierarchical order both."""


def describe(cluster: Cluster) -> str:
    """One cluster in words."""
    text = f"{cluster.name}: NVLink {cluster.inner / 1e9:g} GB/s, {cluster.nics} card(s) of {cluster.nic / 1e9:g} GB/s per node"
    scaled = f", local work taken {cluster.slower:.2f} times as long (ratio of the data sheets' dense bf16 peaks)"
    return text + (scaled if cluster.slower != 1 else "")


def measured(records: list[Record]) -> list[str]:
    """The table of what was measured."""
    titles = ["pattern", "layout", "backend", "tile density", "mean rank, forward ms", "mean rank, backward ms", "TFLOP/s",
              "worker / step imbalance, time", "the same, work", "rounds"]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for record in records:
        ranks = record["outer"] * record["inner"]
        flop = 14 * MODELS[record["model"]].shape.head_dim * record["area"]
        cells = [
            pattern_name(record), record["layout"], record["backend"], f"{record['tile_density']:.3f}",
            *(f"{local_ms(record, name) / ranks:.3f}" for name in ("forward", "backward")),
            f"{flop / local_seconds(record).sum() / 1e12:.3g}", "{:.3f} / {:.3f}".format(*imbalances(record)),
            "{:.3f} / {:.3f}".format(*record["area_imbalance"]), str(record["rounds"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def local_ms(record: Record, direction: str) -> float:
    """Milliseconds of local work over all ranks."""
    table = record[direction]
    return sum(map(sum, table["steps"])) + sum(sum(table[part]) for part in ("before", "columns", "after"))


def modelled(records: list[Record], cluster: Cluster, linear_rate: float) -> list[str]:
    """The table of what a cluster would make of it."""
    lines = [
        f"| {cluster.name} | layout | flat ms | exposed | hierarchical ms | exposed | step s | x dense zigzag |",
        "|" + "---|" * 8,
    ]
    steps = {key(record): step_seconds(record, cluster, linear_rate) for record in records}
    base = next((steps[key(r)] for r in records if r["density"] >= 1 and r["layout"] == "zigzag"), None)
    for record in records:
        cells = [pattern_name(record), record["layout"]]
        for flat in (True, False):
            spent = layer_time(record, cluster, flat=flat).total
            free = layer_time(record, cluster.free(), flat=flat).total
            cells += [f"{spent * 1e3:.3f}", f"{1 - free / spent:.1%}"]
        step = steps[key(record)]
        cells += [f"{step:.4g}", "" if base is None else f"{base / step:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def step_seconds(record: Record, cluster: Cluster, linear_rate: float) -> float:
    """A training step with the hierarchical ring."""
    model = MODELS[record["model"]]
    flop = model.linear_flop(record["length"] // (record["outer"] * record["inner"]))
    return training_step(model.layers, layer_time(record, cluster, flat=False), flop, linear_rate, cluster)


def pattern_name(record: Record) -> str:
    """Dense, or vertical-slash with the density asked for."""
    return "dense" if record["density"] >= 1 else f"vertical-slash {record['density']:.0%}"
