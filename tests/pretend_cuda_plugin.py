"""pytest -p tests.pretend_cuda_plugin: the GPU tests on a pretended device, in sizes that Triton's interpreter can do.

    TRITON_INTERPRET=1 pytest -p tests.pretend_cuda_plugin tests/gpu

What cannot be made small is skipped with the reason. Some minutes; `tests/triton_interpret/test_pretended_cuda.py` runs a part.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from tests.gpu import cases, test_inference
from tests.pretend_cuda import pretended_cuda
from tests.separate import reason_to_skip

# The others are small or quick.
MODULES = ("test_addressing", "test_estimation", "test_numerics", "test_repeat", "test_syncs")
TOKENS = 70  # of a text that the engine is asked about
MEMORY = 8 << 30  # too small for what needs gigabytes


def small(make_case: Callable[..., cases.Case]) -> Callable[..., cases.Case]:
    """The same cases with about three blocks of tokens: what the end of the sequence cuts stays as odd as it was."""

    def make(device: str, seed: int, seq_len: int, head_dim: int, **keys: Any) -> cases.Case:
        block = keys.get("block", 128)
        length = min(seq_len, 2 * block + (seq_len % block or block))
        columns = min(keys.pop("columns", 65), length // 4)
        if keys.get("kv_heads", 1) > 1:
            keys["group"] = 2
        return make_case(device, seed, length, head_dim, columns=columns, **keys)

    return make


@contextlib.contextmanager
def small_gpu_tests() -> Iterator[None]:
    """Inside, the modules of tests/gpu make small cases and repeat themselves once."""
    few, make = cases.differing_runs, small(cases.make_case)
    with contextlib.ExitStack() as stack:
        for name in MODULES:
            module = importlib.import_module(f"tests.gpu.{name}")
            for member, stand_in in (("make_case", make), ("differing_runs", lambda case, _: few(case, 1))):
                if hasattr(module, member):
                    stack.enter_context(mock.patch.object(module, member, stand_in))
            # A test that does something fifty times has that in its body.
            stack.enter_context(
                mock.patch.object(module, "range", lambda *a: range(*a[:-1], min(a[-1], 8)), create=True)
            )
        ids, answers = test_inference.ids_of, test_inference.answers
        for member, stand_in in (
            ("ids_of", lambda _: ids(TOKENS)),
            ("answers", lambda engine, text, new, at: answers(engine, text, new, [min(x, TOKENS - 1) for x in at])),
        ):
            stack.enter_context(mock.patch.object(test_inference, member, stand_in))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected, because without a device they would be skipped."""
    reason = reason_to_skip(interpret=True)
    if reason is not None:
        raise pytest.UsageError(f"tests.pretend_cuda_plugin: {reason}; with TRITON_INTERPRET=1 in front it runs")
    stack = contextlib.ExitStack()
    stack.enter_context(pretended_cuda(MEMORY))
    stack.enter_context(small_gpu_tests())
    config.add_cleanup(stack.close)
    config.addinivalue_line("filterwarnings", "ignore:All-NaN")  # the interpreter's maximum over a row of padding


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what has its size in its body."""
    for item in items:
        size = getattr(item, "callspec", None) and item.callspec.params.get("size", 0)  # type: ignore[attr-defined]
        if size and size > 10_000:
            item.add_marker(pytest.mark.skip(reason=f"{size} scores take the interpreter minutes"))
