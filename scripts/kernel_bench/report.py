"""Tables, bars and the plot."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from scripts.kernel_bench.cases import FLOP_FORMULA

Record = dict[str, Any]
# Least E = density x own time at 100 % / own time, by length and density wanted.
BARS = {
    1 << 15: {0.05: 0.77, 0.1: 0.85, 0.2: 0.90},
    1 << 17: {0.05: 0.90, 0.1: 0.92, 0.2: 0.94},
    1 << 19: {0.05: 0.94, 0.1: 0.94, 0.2: 0.94},
}
DENSE_TFLOPS = {"forward": 450.0, "backward": 330.0}
SPEED_UP_AT = 1 << 17, 0.1
SPEED_UP = {"forward": 6.0, "backward": 5.0}
INDEX_TIME, INDEX_BYTES, INDEX_FROM = 0.05, 0.01, 1 << 17


def environment(device: torch.device, smoke: bool, command: str) -> Record:
    """What the figures were made with."""
    facts: Record = {
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
        "python": platform.python_version(),
        "device": "CPU, interpreter (smoke)" if smoke else torch.cuda.get_device_name(device),
        "formula": FLOP_FORMULA,
    }
    facts["command"] = command
    if not smoke:
        facts["cuda"], facts["driver"] = torch.version.cuda, driver()
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def driver() -> str | None:
    """Version of the NVIDIA driver; None where nvidia-smi does not say."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def versions(facts: Record) -> str:
    """The command, the device and the versions in one line."""
    names = ("torch", "triton", "cuda", "driver")
    told = ", ".join(f"{name} {facts[name]}" for name in names if facts.get(name))
    return f"`{facts['command']}`, {facts['device']}, {told}, {facts['made']}."


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never half there, whenever the run is stopped; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text)
    fresh.replace(path)


def read_results(path: Path) -> Record:
    """What `write_whole` wrote as JSON. Ends the program where that is not what it finds."""
    try:
        found: Record = json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path} is no whole JSON ({error}): move it away and measure everything anew") from error
    return found


def progress(record: Record, smoke: bool) -> str:
    """One line while the benchmark runs."""
    return f"{'smoke ' if smoke else ''}done: {record['shape']} at {record['length']} tokens"


def tflops(record: Record, direction: str) -> float | None:
    """TFLOP/s by the printed formula."""
    spent = record.get(f"{direction}_ms")
    return record[f"{direction}_flop"] / spent / 1e9 if spent else None


def groups(results: list[Record]) -> dict[tuple[str, int], list[Record]]:
    """Records by (shape, length), in the order measured."""
    found: dict[tuple[str, int], list[Record]] = {}
    for record in results:
        found.setdefault((record["shape"], record["length"]), []).append(record)
    return found


def best_dense(records: list[Record], direction: str) -> Record | None:
    """The fastest dense kernel of another make."""
    others = [r for r in records if r["name"] not in ("ours", "flex_attention") and r.get(f"{direction}_ms")]
    return min(others, key=lambda r: r[f"{direction}_ms"], default=None)


def efficiency(record: Record, records: list[Record], direction: str) -> float | None:
    """E = density x own time at 100 % / time: 1 is the linear ideal."""
    whole = next((r for r in records if r["name"] == "ours" and r["wanted"] == 1), None)
    if record["name"] != "ours" or whole is None or not record.get(f"{direction}_ms"):
        return None
    return record["density"] * whole[f"{direction}_ms"] / record[f"{direction}_ms"]


def markdown(results: list[Record], facts: Record, *, smoke: bool) -> str:
    """The whole report."""
    lines = ["# Kernels: measured speed", ""]
    if smoke:
        lines += ["**Smoke run in the interpreter: it tests the script; its times say nothing about speed.**", ""]
    lines += [versions(facts), ""]
    lines += [
        facts["formula"]
        + " Times are medians of interleaved rounds (CUDA events, launches on the host not included). bf16, causal, batch 1.",
        "",
    ]
    lines += [
        f"Ceilings of this device in the same run: copy {facts['copy_bytes_per_s'] / 1e9:.0f} GB/s (bytes read and written), bf16 "
        f"matrix product {facts['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    for (shape, length), records in groups(results).items():
        lines += [f"## {shape}, {length} tokens", ""]
        lines += [
            "| kernel | density | forward ms | TFLOP/s | E | x best dense | backward ms | TFLOP/s | E | x best dense |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        for record in records:
            if "not_run" in record:
                lines.append(
                    f"| {record['name']} | {record['density']:.1%} | not run: {record['not_run']} | | | | | | | |"
                )
                continue
            cells = [record["name"], f"{record['density']:.1%}"]
            for direction in ("forward", "backward"):
                dense, spent = best_dense(records, direction), record.get(f"{direction}_ms")
                gain = dense[f"{direction}_ms"] / spent if dense and spent else None
                cells += [_number(spent, 3), _number(tflops(record, direction), 0)]
                cells += [_number(efficiency(record, records, direction), 2), _number(gain, 2)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *_index_lines(records), ""]
    if not smoke:
        lines += ["## Bars", "", "| bar | asked | measured | |", "|---|---|---|---|", *bars(results), ""]
        lines += [
            "The backward has one mode, and it is deterministic, so the bar on the price of determinism holds by construction.",
            "",
        ]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _index_lines(records: list[Record]) -> list[str]:
    titles = ["ours at", "estimation ms", "index ms", "both / forward", "index / (K + V) bytes", "host syncs"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in records:
        if r["name"] == "ours" and "index_ms" in r and "forward_ms" in r:
            share = (r["estimate_ms"] + r["index_ms"]) / r["forward_ms"]
            lines.append(
                f"| {r['density']:.1%} | {r['estimate_ms']:.3f} | {r['index_ms']:.3f} | {share:.1%} | {r['index_share']:.2%} "
                f"| {r['host_syncs']} |"
            )
    return lines


def bars(results: list[Record]) -> list[str]:
    """Every bar that these results can be held against, and by how much it is missed."""
    lines = []
    for (shape, length), records in groups(results).items():
        own = [r for r in records if r["name"] == "ours" and "forward_ms" in r]
        place = f"{shape}, {length} tokens"
        for record in own:
            for direction in ("forward", "backward"):
                value, bar = efficiency(record, records, direction), BARS.get(length, {}).get(record["wanted"])
                if value is not None and bar is not None:
                    lines.append(_bar(f"E {direction}, {place}, {record['wanted']:.0%}", bar, value))
                value = tflops(record, direction)
                if record["wanted"] == 1 and value is not None and length >= 1 << 15:
                    lines.append(_bar(f"dense mode {direction} TFLOP/s, {place}", DENSE_TFLOPS[direction], value))
                dense = best_dense(records, direction)
                if (length, record["wanted"]) == SPEED_UP_AT and dense and record[f"{direction}_ms"]:
                    gain = dense[f"{direction}_ms"] / record[f"{direction}_ms"]
                    lines.append(_bar(f"{direction} against {dense['name']}, {place}, 10%", SPEED_UP[direction], gain))
            if record["wanted"] < 1 and length >= INDEX_FROM:
                share = (record["estimate_ms"] + record["index_ms"]) / record["forward_ms"]
                lines.append(_bar(f"estimation + index, {place}, {record['wanted']:.0%}", INDEX_TIME, share, most=True))
            if record["wanted"] < 1:
                lines.append(
                    _bar(f"index bytes, {place}, {record['wanted']:.0%}", INDEX_BYTES, record["index_share"], most=True)
                )
    return lines


def _bar(name: str, asked: float, found: float, most: bool = False) -> str:
    met = found <= asked if most else found >= asked
    verdict = "met" if met else f"missed by {abs(found / asked - 1):.0%}"
    return f"| {name} | {'<=' if most else '>='} {asked:g} | {found:.3g} | {verdict} |"


def plot(results: list[Record], path: Path, *, smoke: bool) -> str:
    """Speed-up over the best dense kernel against density, with the linear ideal; says where it is, or why there is none."""
    if util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for (shape, length), records in groups(results).items():
            dense = best_dense(records, direction)
            points = [
                (r["density"] * 100, dense[f"{direction}_ms"] / r[f"{direction}_ms"])
                for r in records
                if dense and r["name"] == "ours" and r.get(f"{direction}_ms")
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{shape}, {length // 1024}K")
        ideal = [5, 10, 20, 50, 100]
        axis.plot(ideal, [100 / x for x in ideal], "k--", label="linear ideal")
        axis.set(
            xscale="log", yscale="log", xlabel="density, %", title=direction + (" (smoke, not speed)" if smoke else "")
        )
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("speed-up over the best dense kernel")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"plot: {path.name}"
