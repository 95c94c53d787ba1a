"""Print what this machine can do: versions, devices, process groups, attention backends. Attach it to a bug report."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

from mtrain.recipe import shipped_recipes

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "PyYAML",
    "tensorboard",
)
OPTIONAL = ("triton", "flash-attn", "lm-eval", "matplotlib")


def configure(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report, as far as it goes without what is missing; 1 if a package that setup.py requires is."""
    print(
        f"mtrain       {_version('mtrain') or 'from a checkout'} in {platform.python_implementation()} {platform.python_version()}"
    )
    print(f"python       {sys.executable}")
    missing = [name for name in REQUIRED if _version(name) is None]
    for name in (*REQUIRED, *OPTIONAL):
        version = _version(name)
        print(
            f"{name:<12} {version or ('MISSING: pip install ' + name if name in REQUIRED else 'not installed (optional)')}"
        )
    if "torch" not in missing:
        _machine()
        _backends()
    recipes = shipped_recipes()
    print(
        f"recipes      {', '.join(recipes)} in {next(iter(recipes.values())).parent if recipes else 'no folder found'}"
    )
    return int(bool(missing))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> None:
    import torch

    from mtrain.comm import process_group_backends

    print(f"cpu          {platform.machine()}, torch uses {torch.get_num_threads()} thread(s)")
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    for device in devices:
        print(f"gpu          {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}")
    if not devices:
        print("gpu          none: training runs on the CPU over gloo")
    usable = process_group_backends()
    print(
        "processes    "
        + ", ".join(f"{name} {'usable' if reason is None else reason}" for name, reason in usable.items())
    )
    print("engines      ddp, fsdp (parallel.engine); DeepSpeed is not supported")


def _backends() -> None:
    """Which backend runs what; the first usable one of a line is what backend: auto takes."""
    import torch

    from sparse_kernels import backends

    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print("attention    backend usable for (device, dtype, head_dim):")
    for device in names:
        for dtype in (torch.float32, torch.bfloat16):
            for head_dim in (64, 128):
                found = backends(device, dtype, head_dim)
                states = "; ".join(
                    f"{name} {'yes' if reason is None else 'no: ' + reason}" for name, reason in found.items()
                )
                print(f"  {device:<5} {str(dtype).removeprefix('torch.'):<9} {head_dim:<4} {states}")
