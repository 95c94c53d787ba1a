"""What a step computes, what it was measured with, and the tables."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata, util
from typing import Any

import torch

from scripts.kernel_bench.report import driver
from scripts.step_bench.bench import Settings
from scripts.step_bench.check import COMPARED
from scripts.step_bench.laps import PARTS
from scripts.step_bench.measure import longest

Record = dict[str, Any]
FLOP_FORMULA = (
    "FLOP of a step = S x (8 P - 2 P_down) [the layers' linear weights P: forward, recompute, which stops before the last down "
    "projection, and backward] + 6 S V E [head, not recomputed] + 18 D x pairs [attention: 4 forward, 4 recompute, 10 backward; "
    "pairs = density x S (S + 1) / 2 x query heads x layers]. Estimation, norms, RoPE and AdamW are not counted."
)
NOTES = (
    "- A step is mtrain's own: forward, fused chunked loss, backward with recomputation, clipping, AdamW. Seconds are wall time,",
    "  the median; attentions take turns round by round, and the ratio to dense is taken within each round.",
    "- Parts: laps between marks at the boundaries (CUDA events, read after the step). Attention forward holds its recomputation;",
    "  rest is embedding, projections, MLP, norms, RoPE, their recomputation and backward, and the stepper's own waits.",
    "- Biases of q and k are drawn wide, so that distances and keys differ and there is something to estimate. Budgets are",
    "  searched for the density asked; the one shown is that of the measured step: allowed over causal pairs (tile area).",
)
# What must be the same for results of two commands to stand in one table.
SAME = ("device", "driver", "torch", "triton", "model", "precision", "sizes")


def environment(settings: Settings, dense: str, command: str) -> Record:
    """What the figures were made with."""
    cuda = settings.device.type == "cuda"
    config = settings.config
    return {
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()}), {torch.get_num_threads()} thread(s)",
        "driver": driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "model": f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide, {config['num_attention_heads']} / "
        f"{config['num_key_value_heads']} heads of {settings.head_dim}, vocabulary {config['vocab_size']}",
        "precision": settings.precision,
        "sizes": f"block {settings.block}, sink {settings.sink}, local {settings.local}, loss chunk {settings.loss_chunk}",
        "dense": dense,
    }  # fmt: skip


def step_flop(config: dict[str, Any], length: int, density: float) -> float:
    """See `FLOP_FORMULA`."""
    width, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, down = width // heads, inner * width
    linear = 2 * width * width + 2 * width * kv_heads * head_dim + 3 * down
    pairs = density * length * (length + 1) / 2 * heads
    per_layer = length * (8 * linear - 2 * down) + 18 * head_dim * pairs
    return float(layers * per_layer + 6 * length * config["vocab_size"] * width)


def markdown(everything: Record, *, tiny: bool) -> str:
    """The whole report: ``facts`` (one per command), ``results``, ``check`` and ``dense`` (what the dense kernels took)."""
    facts, results, checked, trials = (everything[key] for key in ("facts", "results", "check", "dense"))
    now = facts[-1]
    lines = ["# A whole training step: dense against vertical-slash", ""]
    if tiny:
        lines += ["**Tiny run: it tests the script; its times say nothing about speed.**", ""]
    shape = "Random model" if tiny else "Random model of Qwen2.5-0.5B's shape"
    lines += [
        f"{shape}: {now['model']}; {now['precision']}, batch 1, activation checkpointing, {now['sizes']}.",
        f"{now['device']}, driver {now['driver']}, CUDA {now['cuda']}, torch {now['torch']}, triton {now['triton']}, transformers "
        f"{now['transformers']}, Python {now['python']}.",
        "",
        *(f"- `{fact['command']}`, {fact['made']}, lengths {', '.join(map(_size, fact['lengths']))}" for fact in facts),
        f"- Dense attention: {now['dense']}; forward + backward of one layer: {_trials(trials)}.",
        *NOTES,
        f"- {FLOP_FORMULA}",
        f"- Checked first, at {_size(checked['length'])} tokens: {_checked(checked)}.",
        "",
    ]
    for length in sorted({record["length"] for record in results}):
        lines += [f"## {_size(length)} tokens", "", *_table([r for r in results if r["length"] == length], tiny), ""]
    lines += ["## The longest sequence that fits", "", "| attention | fits | does not fit |", "|---|---|---|"]
    for key, (fits, fails) in longest(results).items():
        lines.append(
            f"| {key} | {_size(fits) if fits else 'none tried'} | {_size(fails) if fails else 'memory did not end'} |"
        )
    if "CPU" in now["device"]:
        lines += ["", "Memory on the CPU is the largest resident size of the process so far, not of one attention."]
    return "\n".join([*lines, ""])


def progress(records: list[Record]) -> str:
    """One line while the benchmark runs."""
    told = [
        f"{r['name']} " + ("out of memory" if r.get("out_of_memory") else f"{r['tokens_per_s']:,.0f} tokens/s")
        for r in records
    ]
    return f"done: {_size(records[0]['length'])}: {', '.join(told)}"


def _table(records: list[Record], tiny: bool) -> list[str]:
    titles = [
        "attention",
        "density",
        "s / step",
        "tokens/s",
        "TFLOP/s",
        "x dense (least-most)",
        "peak MiB",
        *PARTS,
        "steps",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in records:
        if r.get("out_of_memory"):
            lines.append(f"| {r['name']} | out of memory" + " |" * (len(titles) - 1))
            continue
        rate = r["flop"] / r["step_s"] / 1e12
        ratio = "{:.2f} ({:.2f}-{:.2f})".format(*r["times_dense"]) if "times_dense" in r else ""
        cells = [r["name"], f"{r['density']:.1%} ({r['tile_density']:.1%})", f"{r['step_s']:.3f}"]
        cells += [f"{r['tokens_per_s']:,.0f}", f"{rate:.4f}" if tiny else f"{rate:.0f}", ratio, f"{r['peak_mb']:,.0f}"]
        cells += [f"{r['share'][part]:.1%}" for part in PARTS]
        cells.append(f"{r['steps']}" + ("" if r["warmed_up"] else ", no warm-up"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _trials(trials: list[Record]) -> str:
    told = [f"{t['name']} {t['ms']:.2f} ms" if "ms" in t else f"{t['name']} not run ({t['not_run']})" for t in trials]
    return ", ".join(told) + f" at {_size(trials[0]['length'])} tokens"


def _checked(found: Record) -> str:
    full, allowed, control = (" / ".join(f"{x:.1e}" for x in found[key]) for key in ("full", "tolerance", "control"))
    learned = "; ".join(
        f"{key.removesuffix(' learns')} {before:.4f} to {after:.4f}"
        for key, value in found.items() if key.endswith(" learns") for before, after in [value]
    )  # fmt: skip
    waits = "".join(
        f"; waits for the device in a step, without and with marks: {name} {counts[0]} and {counts[1]}"
        for name, counts in found["waits"].items() if counts
    )  # fmt: skip
    return (
        f"{', '.join(COMPARED)} of the sparse step with a full budget are {full} off the dense step (allowed {allowed}; with a "
        f"budget of density {found['control_density']:.2f} {control}); losses before and after one step: {learned}{waits}"
    )


def _size(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
