"""Kernels compiled for GPUs that need not be here: registers, spills, shared memory, tensor-core instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.separate import SkippedFile, reason_to_skip

REASON = reason_to_skip(interpret=False)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """In the wrong process the files of this folder are skipped unread, visibly."""
    return None if REASON is None else SkippedFile.of(parent, module_path, REASON)
