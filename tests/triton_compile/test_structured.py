"""The structured kernels compiled for GPUs: no spilled registers, shared memory within budget, tensor cores in use."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import ShardView, SparsePattern
from sparse_kernels.gpu import index
from sparse_kernels.gpu.recorded import Recorded, structured_launches
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
        if launched.name in PRODUCTS and dtype.itemsize == 2 and head_dim <= 128:
            assert found.ahead, f"{what}: a loop awaits tiles that it has only just asked for"
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


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("listed", [False, True], ids=["progression", "lists"])
def test_tiles_by_query_and_by_key(listed: bool, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Recorded] = []
    monkeypatch.setattr(index, "start", lambda kernel, grid, **given: found.append(Recorded(kernel, given)))
    keys = torch.tensor([2, 0, 3, 1] if listed else [0, 1, 2, 3])
    doc_start = torch.zeros(1, 256, dtype=torch.int64) if documents else None
    view = ShardView(SparsePattern.dense(1, 8, 250, 64), torch.arange(4), keys, doc_start=doc_start)
    for by_key in (False, True):
        index.DeviceIndex(view, torch.device("cpu")).tiles(by_key=by_key)
    assert [launched.arguments["LISTED"] for launched in found] == [listed, listed]
    for launched in found:
        assert launched.measure(80).spills == 0
