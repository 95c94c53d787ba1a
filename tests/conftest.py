"""What all tests share: one thread per process, and tests skipped where there is no GPU or where packages are missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

# Test workers and ranks share the cores.
torch.set_num_threads(1)

# Wanted by the evaluation and for datasets of the hub only. Machines with GPUs often come without them and run the rest.
EXTRAS = ("datasets", "lm_eval", "rouge_score", "wonderwords")
MISSING = frozenset(name for name in EXTRAS if importlib.util.find_spec(name) is None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is a GPU test; without CUDA those are skipped, visibly."""
    for item in items:
        if "gpu" in item.path.relative_to(config.rootpath).parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, None, None]:
    """See `skip_what_is_missing`."""
    yield from skip_what_is_missing()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """See `skip_what_is_missing`."""
    yield from skip_what_is_missing()


def skip_what_is_missing() -> Generator[None, None, None]:
    """Skip a test, or its fixture, that ends because one of `EXTRAS` is not installed; where all are, nothing is changed."""
    try:
        yield
    except Exception as error:
        if absent(error):
            pytest.skip(f"a package is missing: {error}")
        raise


def absent(error: BaseException | None) -> bool:
    """Does the error, or what caused it, say that one of `EXTRAS` is not installed?"""
    if error is None or not MISSING:
        return False
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] in MISSING
    names = {name.replace("_", "-") for name in MISSING}
    said = "which is not installed" in str(error) and any(name in str(error) for name in names)
    return said or absent(error.__cause__)


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
            if tensor.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
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
