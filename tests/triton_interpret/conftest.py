"""Kernels run by Triton's interpreter, on CPU tensors: numerics. `make test` gives them TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.separate import SkippedFile, reason_to_skip

REASON = reason_to_skip(interpret=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """In the wrong process the files of this folder are skipped unread, visibly."""
    return None if REASON is None else SkippedFile.of(parent, module_path, REASON)
