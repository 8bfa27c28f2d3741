"""One core for each of MAX's worker threads: the system at times leaves two of them on one core for many steps.

A team of threads goes through an op together, so that two on one core take twice the time while another core idles.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .cpu_quota import THREADS_VARIABLE

logger = logging.getLogger("max.pipelines")

_WORKER = re.compile(r"Thread(\d+)$")
"""How MAX names the workers of its pool, less what stands before; the number counts from 0."""


def spread_workers(tasks: Path = Path("/proc/self/task")) -> None:
    """Binds every worker to a core of its own, if they are as many as the process's cores.

    With fewer threads than cores (`STEP3P5_CPU_THREADS`, or a quota) they stay free: several such processes may share
    the cores, and would all choose the same. Where Linux's files are missing, nothing happens. In a process that builds
    one model after another the pool of the one before may still be ending: its workers bear the same names.

    Args:
        tasks: The folder of the process's threads, see proc(5).
    """
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    workers = _workers(tasks)
    if sorted(workers) != list(range(len(cores))) or os.environ.get(THREADS_VARIABLE, str(len(cores))) != str(
        len(cores)
    ):
        logger.debug("%d worker threads on %d cores stay where the system puts them.", len(workers), len(cores))
        return
    for index, core in enumerate(cores):
        for worker in workers[index]:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(worker, {core})


def _workers(tasks: Path) -> Mapping[int, Sequence[int]]:
    """The system's ids of every worker, by its number."""
    found = defaultdict[int, list[int]](list)
    for name in tasks.glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):
            match = _WORKER.search(name.read_text().strip())
            if match is not None:
                found[int(match[1])].append(int(name.parent.name))
    return found
