"""Compiling for GPUs in processes of their own: virtual devices are a property of the process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent

HOPPER = "cuda:sm_90a"
TARGETS = [HOPPER, "cuda:sm_100a", "hip:gfx942"]
COMPILED = "compiled"
"""What the programs print at their end."""


class Compilation:
    """A program beside this file that compiles, running from now on, at the lowest priority.

    Args:
        program: Its file's name.
        arguments: What it is called with.
    """

    def __init__(self, program: str, *arguments: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._printed, self._log = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        self._started = time.perf_counter()
        # Importing MAX changes the process's environment behind Python's back: hand children Python's view of it.
        with self._printed.open("w") as printed, self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", sys.executable, HERE / program, *arguments],
                stdout=printed,
                stderr=log,
                env=dict(os.environ),
            )

    def finish(self, timeout: int) -> int:
        """Waits until it has compiled; returns the seconds since its start.

        Raises:
            AssertionError: It ended with an error.
            subprocess.TimeoutExpired: It still runs after `timeout` seconds more.
        """
        status = self._process.wait(timeout)
        seconds = round(time.perf_counter() - self._started)
        assert (status, self._printed.read_text()) == (0, COMPILED), self._log.read_text()[-4000:]
        return seconds

    def stop(self) -> None:
        """Ends it if it still runs."""
        self._process.kill()
        self._process.wait()


def models(target: str, num_devices: int, names: Iterable[str]) -> Compilation:
    """The compilation of graphs of the model, together, which takes minutes."""
    return Compilation("gpu_models.py", target, str(num_devices), *names)


def ops(target: str) -> Compilation:
    """The compilation of every op."""
    return Compilation("gpu_ops.py", target)
