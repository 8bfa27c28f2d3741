"""The whole model compiles for several GPUs, on a machine without one.

A compilation takes minutes: these run where `STEP3P5_LONG_TESTS` is set (`make test-long`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_parallel_plan import MODES

PROGRAM = Path(__file__).parent / "gpu_parallel.py"

pytestmark = pytest.mark.skipif("STEP3P5_LONG_TESTS" not in os.environ, reason="minutes each: make test-long")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("target", "num_devices"),
    [("cuda:sm_90a", 2), ("cuda:sm_90a", 8), ("cuda:sm_100a", 2), ("hip:gfx942", 2)],
)
def test_the_model_compiles(mode: str, target: str, num_devices: int) -> None:
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    run = subprocess.run(
        [sys.executable, PROGRAM, target, mode, str(num_devices)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=3000,
    )
    assert (run.returncode, run.stdout) == (0, "compiled"), run.stderr[-4000:]
