"""Every op and every graph of the model compiles for the GPUs that the project names, on a machine without one.

Graphs compiled together share their kernels; the larger compilations run where `STEP3P5_LONG_TESTS` is set
(`make test-long`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_parallel_plan import MODES

HERE = Path(__file__).parent


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


@pytest.mark.parametrize("target", ["cuda:sm_90a", "cuda:sm_100a", "hip:gfx942"])
def test_every_op_compiles(target: str) -> None:
    compilation = run("gpu_ops.py", target, timeout=300)
    assert (compilation.returncode, compilation.stdout) == (0, "compiled"), compilation.stderr[-4000:]


def test_the_model_compiles_for_hopper(record_property: Callable[[str, object], None]) -> None:
    """On one GPU, with its drafts, and in every mode on two."""
    start = time.perf_counter()
    compilation = run("gpu_models.py", "cuda:sm_90a", "2", "whole", "mtp", *MODES, timeout=1500)
    assert (compilation.returncode, compilation.stdout) == (0, "compiled"), compilation.stderr[-4000:]
    record_property("seconds", round(time.perf_counter() - start))


@pytest.mark.skipif("STEP3P5_LONG_TESTS" not in os.environ, reason="many minutes each: make test-long")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("target", "num_devices"), [("cuda:sm_90a", 8), ("cuda:sm_100a", 2), ("hip:gfx942", 2)])
def test_the_model_compiles_for_several_gpus(mode: str, target: str, num_devices: int) -> None:
    compilation = run("gpu_models.py", target, str(num_devices), mode, timeout=3000)
    assert (compilation.returncode, compilation.stdout) == (0, "compiled"), compilation.stderr[-4000:]
