"""The structured kernels compiled for GPUs: no spilled registers, shared memory within budget, tensor cores in use."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels.gpu.recorded import structured_launches
from sparse_kernels.gpu.resources import SHARED_LIMIT

PRODUCTS = {"forward_kernel", "dq_kernel", "dkdv_kernel", "column_kernel"}


def check(capability: int, head_dim: int, dtype: torch.dtype, block: int, **options: bool) -> None:
    """Every kernel of forward and backward, with the tiles of the table."""
    names = set()
    for launched in structured_launches(capability, head_dim, dtype, block, **options):
        names.add(launched.name)
        found = launched.measure(capability)
        what = f"{launched.name} {launched.tile} on sm_{capability}: {found}"
        assert found.spills == 0, what
        assert found.shared <= SHARED_LIMIT[capability], what
        assert found.tensor_cores == (launched.name in PRODUCTS), what
    assert names > PRODUCTS


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability: int, head_dim: int, block: int) -> None:
    """Blocks of 64 in the variant with the most in registers: documents, and lists per block."""
    check(capability, head_dim, torch.bfloat16, block, documents=block == 64, listed=block == 64)


@pytest.mark.parametrize("capability", [86, 90])
def test_head_dim_256(capability: int) -> None:
    """sm_86 has the rows of sm_80 and the least memory."""
    check(capability, 256, torch.bfloat16, 128, documents=True, listed=True)


@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_with_documents_and_lists(capability: int) -> None:
    check(capability, 128, torch.bfloat16, 128, documents=True, listed=True)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [(80, 96, torch.float16), (90, 96, torch.float16), (80, 128, torch.float32), (90, 128, torch.float32)],
)
def test_no_spills_in_other_dtypes_and_head_dims(capability: int, head_dim: int, dtype: torch.dtype) -> None:
    check(capability, head_dim, dtype, 64)
