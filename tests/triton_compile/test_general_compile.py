"""The general block-sparse kernels, compiled for GPUs that need not be here: no spills, little shared memory, tensor cores."""

from __future__ import annotations

import pytest
import torch
import triton

from sparse_kernels.gpu.general_recorded import general_launches
from sparse_kernels.gpu.recorded import structured_launches
from sparse_kernels.gpu.resources import SHARED_LIMIT

NEW_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
PRODUCTS = {"forward_kernel", "dq_kernel", "dkdv_kernel", "column_kernel"}
MOVERS = {"delta_kernel", "fold_kernel", "_fill_kernel"}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_little_memory_and_tensor_cores(capability: int, head_dim: int) -> None:
    """Compiled as launched, with single blocks, columns, documents and a carried state in them."""
    launches = {launch.name: launch for launch in general_launches(capability, head_dim, torch.bfloat16, 128)}
    assert set(launches) == PRODUCTS | MOVERS
    for name, launch in launches.items():
        if name in PRODUCTS or (capability, head_dim) == (90, 128):
            found = launch.measure(capability)
            assert found.spills <= (0 if NEW_TRITON else 16), (name, found)
            assert found.shared <= SHARED_LIMIT[capability], (name, found)
            assert found.tensor_cores == (name in PRODUCTS), (name, found)
            assert found.ahead or name not in PRODUCTS, f"{name} awaits tiles that it has only just asked for: {found}"


def test_devices_with_little_shared_memory_fit() -> None:
    """sm_86, as sm_89 and sm_120, has 99 KiB per block; head_dim 64 needs less than 128."""
    launches = [*general_launches(86, 128, torch.bfloat16, 128)]
    launches += structured_launches(86, 128, torch.bfloat16, 128, documents=True)
    for launch in launches:
        if launch.name in PRODUCTS:
            found = launch.measure(86)
            assert found.spills == 0 and found.tensor_cores and found.ahead, (launch.name, found)
            assert found.shared <= SHARED_LIMIT[86] == 99 * 1024, (launch.name, found)


def test_head_dim_256_fits() -> None:
    """On the target with the least memory; the structured kernels are compiled for sm_90 too."""
    for launch in general_launches(86, 256, torch.bfloat16, 128):
        if launch.name in PRODUCTS:
            found = launch.measure(86)
            assert found.spills == 0 and found.shared <= SHARED_LIMIT[86], (launch.name, found)


def test_float32_fits() -> None:
    for launch in general_launches(90, 128, torch.float32, 128):
        if launch.name in PRODUCTS:
            found = launch.measure(90)
            assert found.spills <= (100 if launch.name == "dq_kernel" and not NEW_TRITON else 0), (launch.name, found)
            assert found.shared <= SHARED_LIMIT[80] and found.tensor_cores, (launch.name, found)


def test_head_dim_96_and_smaller_blocks_fit() -> None:
    for launch in general_launches(80, 96, torch.float16, 64):
        if launch.name == "forward_kernel":
            found = launch.measure(80)
            assert found.spills == 0 and found.shared <= SHARED_LIMIT[80], found
