"""What the machine's memory can do: rates of a plain copy and of a plain read, on all cores at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from report import Spread

MINIMUM_ARRAY_BYTES = 512 << 20
"""Size of the source array, and again of the target; more where the last-level caches are large."""

CACHE_MULTIPLE = 4
"""How many times larger than all last-level caches together an array has to be."""

_CPU_FOLDER = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second: `copy` counts what is read and what is written (as STREAM's Copy does), `read` what is read."""

    copy: Spread
    read: Spread
    array_bytes: int
    threads: int

    def line(self) -> str:
        """The same for people."""
        best = f"{1e-9 * self.copy.maximum:.1f}"
        return (
            f"memory, GB/s: copy {self.copy.text(1e-9, 1)}, best {best} (read + written); "
            f"read {self.read.text(1e-9, 1)}; {self.array_bytes >> 20} MiB arrays, {self.threads} threads"
        )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache_bytes(cpu_folder: Path = _CPU_FOLDER) -> int:
    """All L3 caches together; 0 where the system does not say."""
    caches = {}
    for index in cpu_folder.glob("cpu[0-9]*/cache/index3"):
        size = (index / "size").read_text().strip()
        caches[(index / "shared_cpu_list").read_text()] = int(size.removesuffix("K")) << 10
    return sum(caches.values())


def measure_bandwidth(rounds: int = 20, array_bytes: int | None = None) -> Bandwidth:
    """Copies and reads arrays far larger than the caches, one part a core.

    Args:
        rounds: Timed repetitions; copies and reads alternate.
        array_bytes: Size of the source array; chosen by the size of the caches where absent.
    """
    threads = usable_cores()
    wanted = array_bytes or max(MINIMUM_ARRAY_BYTES, CACHE_MULTIPLE * last_level_cache_bytes())
    length = wanted // (threads * np.dtype(np.float64).itemsize)
    sources = [np.ones(length) for _ in range(threads)]
    targets = [np.zeros(length) for _ in range(threads)]
    total = sum(part.nbytes for part in sources)
    copies, reads = [], []
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, targets, sources))

        def read() -> None:
            list(pool.map(np.max, sources))

        copy()
        for _ in range(rounds):
            copies.append(2 * total / _seconds(copy))
            reads.append(total / _seconds(read))
    return Bandwidth(Spread.of(copies), Spread.of(reads), total, threads)


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
