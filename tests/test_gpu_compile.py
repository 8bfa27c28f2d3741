"""Every op and every graph of the model compiles for the GPUs that the project names, on a machine without one.

Graphs compiled together share their kernels. For more devices and for other GPUs: `test_gpu_compile_long.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from test_parallel_plan import MODES

HERE = Path(__file__).parent

HOPPER = "cuda:sm_90a"
TARGETS = [HOPPER, "cuda:sm_100a", "hip:gfx942"]


def run(program: str, *arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
    """Runs a program beside this file."""
    # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
    return subprocess.run(
        [sys.executable, HERE / program, *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        timeout=timeout,
    )


def compile_models(target: str, num_devices: int, names: Sequence[str], timeout: int) -> int:
    """Compiles graphs of the model together; returns the seconds that it took."""
    start = time.perf_counter()
    compilation = run("gpu_models.py", target, str(num_devices), *names, timeout=timeout)
    assert (compilation.returncode, compilation.stdout) == (0, "compiled"), compilation.stderr[-4000:]
    return round(time.perf_counter() - start)


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_compiles(target: str) -> None:
    compilation = run("gpu_ops.py", target, timeout=900)
    assert (compilation.returncode, compilation.stdout) == (0, "compiled"), compilation.stderr[-4000:]


def test_the_model_compiles_for_hopper(record_property: Callable[[str, object], None]) -> None:
    """On one GPU, with its drafts, and in every mode on two."""
    record_property("seconds", compile_models(HOPPER, 2, ["whole", "mtp", *MODES], timeout=3000))
