"""The example that users copy really runs, and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.slow
def test_the_attach_example_learns():
    command = [sys.executable, SCRIPTS / "attach_example.py"]
    here = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}  # this tree, installed or not
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=300)
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses) == 8 and losses[-1] < losses[0] - 1, done.stdout
