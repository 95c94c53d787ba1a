"""What a run tells: run.jsonl (one line per logged step), TensorBoard, and a progress bar; main process only.

Keys of a line of run.jsonl: step (updates done), loss (mean over the valid target tokens since the last line), lr, grad_norm (of
the last step, before clipping), tokens (seen so far, all ranks), targets (of the last step), tokens_per_s, step_s (data to update,
without checkpoints), density (mean over layers; with density_min, density_max and density_layers), tile_density, recall,
reach and reach_any_head (with recall; share of pairs inside the mask at distance 1, 2..3, 4..7, ..: mean over heads and layers,
and pairs that any head holds), worker_imbalance, step_imbalance (of computed area), time_imbalance (slowest rank / mean, forward
and backward), memory_mb (peak of this process; of the device with CUDA). What was not measured is left out.

The held-out loss has lines of its own: step, validation_loss (mean over the target tokens of all held-out rows, in nats),
validation_perplexity (e to that power), validation_targets (how many tokens) and, if asked for, validation_loss_dense (the same
rows with dense attention). `read_lines(path, having="loss")` gives the lines of training alone.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mtrain.errors import MtrainError

RUN_FILE = "run.jsonl"


class MetricsLog:
    """Writes the record of a run. Off the main process it does nothing.

    Args:
        output: the run's directory; run.jsonl and tensorboard/ go there.
        enabled: False on every process but the main one.
        start_step: updates already done; lines of later steps, left by an abandoned attempt, are removed.
        total_steps: length of the progress bar.
        tensorboard: also write scalars for TensorBoard (imported only then).
    """

    def __init__(self, output: Path, *, enabled: bool, start_step: int, total_steps: int, tensorboard: bool) -> None:
        self.path = output / RUN_FILE
        self._file, self._board, self._bar = None, None, None
        if not enabled:
            return
        output.mkdir(parents=True, exist_ok=True)
        keep_lines_until(self.path, start_step)
        self._file = self.path.open("a")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(output / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,  # a log file needs no animation
        )

    def advance(self, shown: Mapping[str, str]) -> None:
        """One step done; ``shown`` goes beside the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one line, on disk at once (a killed run keeps what it has told)."""
        if self._file is None:
            return
        self._file.write(json.dumps({key: rounded(value) for key, value in record.items() if value is not None}) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    tag = key.replace("validation_", "validation/") if key.startswith("validation_") else f"train/{key}"
                    self._board.add_scalar(tag, value, record["step"])

    def say(self, text: str) -> None:
        """A line for people that does not tear the progress bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._file, self._board, self._bar):
            if part is not None:
                part.close()
        self._file, self._board, self._bar = None, None, None


class Window:
    """Sums over the steps since the last logged line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.loss_sum, self.targets, self.tokens, self.steps, self.seconds = 0.0, 0, 0, 0, 0.0

    def add(self, loss: float, targets: int, tokens: int, seconds: float) -> None:
        """One step: its mean loss, the valid targets behind that mean, the tokens processed, and the wall time."""
        self.loss_sum += loss * targets
        self.targets += targets
        self.tokens += tokens
        self.steps += 1
        self.seconds += seconds

    def rates(self) -> dict[str, float]:
        """Mean loss per valid target, tokens per second, seconds per step."""
        return {
            "loss": self.loss_sum / max(self.targets, 1),
            "tokens_per_s": self.tokens / max(self.seconds, 1e-9),
            "step_s": self.seconds / max(self.steps, 1),
        }


def density_summary(layers: Sequence[float] | None) -> dict[str, Any]:
    """Mean, extremes and the per-layer list of densities (allowed / causal pairs); empty when there are none."""
    if not layers:
        return {}
    return {
        "density": sum(layers) / len(layers),
        "density_min": min(layers),
        "density_max": max(layers),
        "density_layers": list(layers),
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the device with CUDA, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a run.jsonl beyond ``step``, and a last line that a killed process left unfinished."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)


def read_lines(path: Path, having: str | None = None) -> list[dict[str, Any]]:
    """The records of a run.jsonl, all or those with one key; an unfinished last line is ignored.

    Raises:
        MtrainError: names the line that is no record.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise MtrainError(
                    f"{path}:{number}: not JSON: {line[:80]!r}; this file is written by mtrain only: delete the line"
                ) from None
    return records if having is None else [record for record in records if having in record]


def rounded(value: Any) -> Any:
    """Floats to 7 significant digits (JSON has no nan: those become None), lists element by element."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
