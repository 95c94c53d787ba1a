"""Tests that need a process of their own: a Triton kernel is interpreted or compiled, decided once when it is decorated."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from sparse_kernels.gpu import interpreter_fault


def reason_to_skip(interpret: bool) -> str | None:
    """Why this process cannot run interpreter tests (``interpret``) or compile tests; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux: pip install triton)"
    if (os.environ.get("TRITON_INTERPRET") == "1") != interpret:
        folder = "triton_interpret" if interpret else "triton_compile"
        setting = "TRITON_INTERPRET=1" if interpret else "env -u TRITON_INTERPRET"
        return f"needs a process of its own: `make test`, or {setting} pytest tests/{folder}"
    return interpreter_fault() if interpret else None


class SkippedFile(pytest.File):
    """A test file that is skipped without being imported, because its kernels would be decorated wrongly."""

    reason = ""

    def collect(self) -> Iterable[pytest.Item]:
        """One item that skips: a run that collects no test at all would count as failed."""
        yield _Skipped.from_parent(self, name="all")

    @classmethod
    def of(cls, parent: pytest.Collector, path: Path, reason: str) -> SkippedFile:
        """The stand-in for the test file ``path``."""
        file: SkippedFile = cls.from_parent(parent, path=path)
        file.reason = reason
        return file


class _Skipped(pytest.Item):
    def runtest(self) -> None:
        assert isinstance(self.parent, SkippedFile)
        pytest.skip(self.parent.reason)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.nodeid
