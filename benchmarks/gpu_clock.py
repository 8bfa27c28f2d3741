"""The clock of a GPU's multiprocessors while something runs, as `nvidia-smi` reports it."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType

QUERY = ("nvidia-smi", "--query-gpu=clocks.sm,clocks_throttle_reasons.active", "--format=csv,noheader,nounits")

INTERVAL_MS = 20

POWER_CAP = 0x4
"""The reason for which the driver lowers the clock to stay within the power limit."""


@dataclass(frozen=True)
class Clock:
    """Samples of a stretch of time: the median clock, and how many of them were held down by the power limit."""

    mhz: float
    power_capped: float


class ClockWatch:
    """Reads the first GPU's clock in the background, from entry to exit."""

    def __enter__(self) -> ClockWatch:
        self._samples: list[tuple[float, float, int]] = []
        command = [*QUERY, "--id=0", f"--loop-ms={INTERVAL_MS}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._thread.join()

    def since(self, begin: float) -> Clock | None:
        """The samples since `begin` on `time.perf_counter`; `None` if there is none."""
        return summary([sample for sample in self._samples if sample[0] >= begin])

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._samples.append((time.perf_counter(), *parse_line(line)))


def parse_line(line: str) -> tuple[float, int]:
    """Megahertz and reasons of a line of `QUERY`."""
    clock, reasons = line.split(",")
    return float(clock), int(reasons, 16)


def summary(samples: list[tuple[float, float, int]]) -> Clock | None:
    """Of samples with their times."""
    if not samples:
        return None
    capped = statistics.mean(bool(reasons & POWER_CAP) for _, _, reasons in samples)
    return Clock(statistics.median(mhz for _, mhz, _ in samples), capped)
