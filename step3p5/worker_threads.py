"""MAX's threads on a CPU: a core for each that works, and spare time for the one that only looks for news.

A team of threads goes through an op together. Two of them on one core, as the system at times leaves them for many
steps, take twice the time while another core idles; and one that is interrupted holds up the rest.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .cpu_quota import THREADS_VARIABLE

logger = logging.getLogger("max.pipelines")

WATCHED_SECONDS = 0.02
WAKES_A_SECOND = 500
"""A thread that wakes more often than this with nothing to do is a poller; MAX's wakes some 5000 times."""

_WORKER = re.compile(r"Thread(\d+)$")
"""How MAX names the workers of its pool, less what stands before; the number counts from 0."""

_SLEEPS = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)$", re.MULTILINE)


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


def rest_pollers(tasks: Path = Path("/proc/self/task")) -> None:
    """Lets MAX's pollers run only where a core has nothing else to do: they take time from a decoding step.

    From the first graph that a process runs, a thread of MAX's looks every 100 microseconds whether there are events to
    record. Called while nothing runs; threads of Python's, and of other names than the caller's, are left alone.

    Args:
        tasks: The folder of the process's threads, see proc(5).
    """
    if not hasattr(os, "SCHED_IDLE"):
        return
    own = {thread.native_id for thread in threading.enumerate()} | {threading.get_native_id()}
    name = (tasks / str(threading.get_native_id()) / "comm").read_text().strip()
    before = _wakes(tasks, name)
    time.sleep(WATCHED_SECONDS)
    for thread, wakes in _wakes(tasks, name).items():
        if thread not in own and wakes - before.get(thread, wakes) > WAKES_A_SECOND * WATCHED_SECONDS:
            with suppress(ProcessLookupError, PermissionError):
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _wakes(tasks: Path, name: str) -> Mapping[int, int]:
    """How often each of the threads called `name` went to sleep so far."""
    found = {}
    for folder, own_name in _threads(tasks):
        with suppress(FileNotFoundError, ProcessLookupError):
            if own_name == name:
                (count,) = _SLEEPS.findall((folder / "status").read_text())
                found[int(folder.name)] = int(count)
    return found


def _workers(tasks: Path) -> Mapping[int, Sequence[int]]:
    """The system's ids of every worker, by its number."""
    found = defaultdict[int, list[int]](list)
    for folder, name in _threads(tasks):
        match = _WORKER.search(name)
        if match is not None:
            found[int(match[1])].append(int(folder.name))
    return found


def _threads(tasks: Path) -> Iterator[tuple[Path, str]]:
    """Each thread's folder and name; threads may end meanwhile."""
    for comm in tasks.glob("*/comm"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield comm.parent, comm.read_text().strip()
