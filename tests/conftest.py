"""What all tests share: one thread per process, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Test workers and ranks share the cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is a GPU test; without CUDA those are skipped, visibly."""
    for item in items:
        if "gpu" in item.path.relative_to(config.rootpath).parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its relatives give NaN (or the largest integer), so that an element nobody writes cannot pass for a zero.

    Idea: the test suite of flash-linear-attention (https://github.com/fla-org/flash-linear-attention).
    """

    def poison(make: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = make(*args, **kwargs)
            if tensor.is_meta:
                return tensor
            if tensor.dtype.is_floating_point:
                return tensor.detach().fill_(float("nan")).requires_grad_(tensor.requires_grad)
            if tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
