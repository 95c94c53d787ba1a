"""The scoring and selection kernels compiled for GPUs: no spilled registers, shared memory within budget, tensor cores in use."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels.gpu.resources import SHARED_LIMIT
from sparse_kernels.gpu.score_recorded import score_launches, selection_launches


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "block", "sizes"),
    [
        (64, torch.bfloat16, 64, (64,)),
        (128, torch.bfloat16, 128, (64,)),
        (96, torch.float16, 64, (64,)),
        (256, torch.bfloat16, 128, (64,)),
        (128, torch.float32, 128, (64,)),
        (128, torch.bfloat16, 16, (16, 16, 16, 16)),
    ],
)
def test_scoring_spills_nothing(
    capability: int, head_dim: int, dtype: torch.dtype, block: int, sizes: tuple[int, ...]
) -> None:
    launches = score_launches(head_dim, dtype, block, sizes)
    assert [launched.name for launched in launches] == ["statistics_kernel", "scores_kernel"]
    for launched in launches:
        found = launched.measure(capability)
        what = f"{launched.name} {launched.tile} on sm_{capability}: {found}"
        assert found.spills == 0, what
        assert found.shared <= SHARED_LIMIT[capability], what
        assert found.tensor_cores, what


@pytest.mark.parametrize("capability", [80, 90])
def test_selection_spills_nothing(capability: int) -> None:
    for launched in selection_launches():
        found = launched.measure(capability)
        assert found.spills == 0 and found.shared <= SHARED_LIMIT[capability], (launched.name, found)
