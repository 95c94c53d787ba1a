"""What a kernel costs on a GPU that is not there: cross-compile, assemble, and read registers, spills and shared memory.

Works on any machine with Triton, because ptxas comes with it. Needs a process that does not interpret.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Bytes per block that we allow ourselves, at or below the chips' own limits.
SHARED_LIMIT = {80: 160 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 224 * 1024, 120: 99 * 1024}


@dataclass(frozen=True)
class Resources:
    """What a kernel costs.

    registers: per thread. spills: bytes, stores + loads. shared: memory in bytes. tensor_cores: whether they are used.
    ahead: tile loads (groups of them) that may still be under way when a pipelined loop waits for its own tile, the least over
    such loops: at 0 it waits for what it has only just asked for, and memory's latency is paid in every step. None without one.
    """

    registers: int
    spills: int
    shared: int
    tensor_cores: bool
    ahead: int | None


def measure(kernel: Any, capability: int, arguments: Mapping[str, Any], num_warps: int, num_stages: int) -> Resources:
    """Compile one kernel for one target.

    Args:
        kernel: a @triton.jit function.
        capability: of the target, times ten: a key of SHARED_LIMIT.
        arguments: per parameter a type as Triton writes it ("*bf16", "i32", "fp32"; "i32:16" promises a multiple of 16), or a
            value that is a constant of the kernel. Pointers are aligned to 16 bytes, as those of tensors are.
        num_warps, num_stages: the launch options.
    """
    order = kernel.arg_names
    types = {n: a.split(":")[0] for n, a in arguments.items() if _is_type(a)}
    constants = {n: a for n, a in arguments.items() if n not in types}
    missing = [name for name in order if name not in arguments]
    assert not missing, f"no argument for {missing}"
    aligned = [n for n, t in types.items() if t.startswith("*") or arguments[n].endswith(":16")]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in order},
        constexprs=constants,
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, capability)
    tensor_cores = "wgmma" in ptx or "mma.sync" in ptx
    return Resources(registers, spills, compiled.metadata.shared, tensor_cores, _loads_ahead(compiled.asm["ttgir"]))


def arguments_of(kernel: Any, launched: Mapping[str, Any]) -> dict[str, Any]:
    """What `measure` needs, from the arguments of a real launch, specialised as Triton's own launcher would."""
    arguments: dict[str, Any] = {}
    for parameter in kernel.params:
        value = launched[parameter.name]
        if parameter.is_constexpr:
            arguments[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            arguments[parameter.name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            arguments[parameter.name] = "fp32"
        else:
            width = "i32" if -(2**31) <= value < 2**31 else "i64"
            fixed = not parameter.do_not_specialize
            arguments[parameter.name] = value if fixed and value == 1 else width + ":16" * (fixed and value % 16 == 0)
    return arguments


def _is_type(argument: Any) -> bool:
    return isinstance(argument, str) and re.fullmatch(r"\*?(?:[iu]\d+|bf16|fp\d+)(?::16)?", argument) is not None


def _loads_ahead(ttgir: str) -> int | None:
    """`Resources.ahead`, from the waits of innermost loops that copy tiles to shared memory."""
    found: list[int] = []
    body: list[str] = []
    for line in ttgir.splitlines():
        if "scf.for" in line:
            body = []  # what an outer loop does between its inner ones fills and drains their pipelines
        elif "scf.yield" in line and any("ttg.async_copy_global_to_local" in inner for inner in body):
            found += [int(n) for inner in body for n in re.findall(r"ttg\.async_wait .*num = (\d+)", inner)]
            body = []
        body.append(line)
    return min(found, default=None)


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes) as ptxas reports them."""
    architecture = re.search(r"\.target (\S+?)[,\s]", ptx)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # Triton 3.4 has one assembler for all targets and takes no argument.
        tool = get_ptxas(*[capability][: len(inspect.signature(get_ptxas).parameters)])
        command = [
            tool.path,
            "-v",
            f"--gpu-name={architecture[1]}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    used = re.search(r"Used (\d+) registers", log)
    assert used is not None, log
    return int(used[1]), spills
