"""The general block-sparse kernels, compiled for GPUs that need not be here: no spills, little shared memory, tensor cores."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_kernels.gpu import general_kernels as kernels
from sparse_kernels.gpu import lists
from sparse_kernels.gpu.config import padded_head_dim
from sparse_kernels.gpu.general_tiles import tile_of
from sparse_kernels.gpu.resources import SHARED_LIMIT, measure

KERNELS = {
    "forward": kernels.forward_kernel,
    "dq": kernels.dq_kernel,
    "dkdv": kernels.dkdv_kernel,
    "columns": kernels.column_kernel,
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SINGLE_PRECISION = {"out", "lse", "carry_out", "carry_lse", "delta", "dq", "dk", "dv", "part_k", "part_v"}
BYTES = {"offsets", "blocks"}
NUMBERS = {
    "heads",
    "group",
    "seq_len",
    "num_q",
    "num_k",
    "num_live",
    "num_blocks",
    "num_own",
    "num_other",
    "room",
    "width",
}
NUMBERS |= {"length", "member", "num_rows"}


def argument(name: str, dtype: str) -> str:
    """The Triton type of a parameter by its name; strides of q, k, v and dout are multiples of 16."""
    if name in ("q", "k", "v", "dout"):
        return f"*{dtype}"
    if name in SINGLE_PRECISION:
        return "*fp32"
    if name in BYTES:
        return "*u8"
    if name == "entries":
        return "*i16"
    if name == "start":
        return "*i64"
    if name in ("scale", "scale2"):
        return "fp32"
    if name in NUMBERS or name.startswith("blocks_s"):
        return "i32"
    return "i32:16" if name.endswith(("_sb", "_ss", "_sh")) else "*i32"


def arguments(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, Any]:
    """Every parameter of a kernel: its constants, and types for the rest."""
    return {name: constants.get(name, argument(name, dtype)) for name in kernel.arg_names}


def resources(name: str, capability: int, head_dim: int, block: int, dtype: str, documents: bool) -> Any:
    """Registers, spills, shared memory of one kernel with the tile that the table gives it."""
    tile = tile_of(name, capability // 10, head_dim, ITEMSIZE[dtype], block)
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "BLOCK": block, "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "HAS_TILES": True, "HAS_COLUMNS": True, "HAS_BLOCKS": True, "HAS_DOC": documents, "HAS_CARRY": True,
        "PRECISION": "tf32x3", "UPCAST": False,
    }  # fmt: skip
    if not documents:
        constants["doc_start"] = None
    return measure(KERNELS[name], capability, arguments(KERNELS[name], dtype, constants), tile.warps, tile.stages)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_no_spills_little_memory_and_tensor_cores(name: str, capability: int, head_dim: int) -> None:
    found = resources(name, capability, head_dim, 128, "bf16", documents=True)
    assert found.spills == 0, found
    assert found.shared <= SHARED_LIMIT[capability], found
    assert found.tensor_cores, found


@pytest.mark.parametrize("name", KERNELS)
def test_float32_fits(name: str) -> None:
    found = resources(name, 90, 128, 128, "fp32", documents=True)
    assert found.spills <= (100 if name == "dq" else 0), found
    assert found.shared <= SHARED_LIMIT[80], found
    assert found.tensor_cores, found


def test_small_blocks_and_head_dim_96_fit() -> None:
    found = resources("forward", 80, 96, 64, "fp16", documents=False)
    assert found.spills == 0 and found.shared <= SHARED_LIMIT[80], found


def test_the_kernels_that_move_numbers_compile() -> None:
    shared = {"HEAD_DIM": 128, "BLOCK_D": 128}
    small = [
        (kernels.delta_kernel, {**shared, "ROWS": 32}),
        (kernels.fold_kernel, {**shared, "BLOCK_N": 64}),
        (lists._fill_kernel, {"BLOCK": 128, "HAS_BLOCKS": True, "HAS_DOC": True, "BY_COLUMN": True, "SCAN": 1024}),
    ]
    for kernel, constants in small:
        found = measure(kernel, 90, arguments(kernel, "bf16", constants), 4, 2)
        assert found.spills == 0, (kernel, found)
