"""compute-sanitizer finds no bad access, on a small case that runs every kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "synccheck"])
def test_sanitizer_is_silent(tool: str) -> None:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    # Torch's own cache of device memory would hide accesses behind the end of a tensor.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.small_case"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
