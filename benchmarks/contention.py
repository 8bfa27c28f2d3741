"""How much of the processor others took while a benchmark ran: times on a busy machine mean little."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuTimes:
    """Seconds up to now: by the clock, of all cores' work (a hypervisor's stolen time included), of this process's."""

    clock: float
    all_work: float
    own_work: float

    @classmethod
    def now(cls, stat: Path = Path("/proc/stat")) -> CpuTimes | None:
        """Reads the counters; `None` where the system has no such file."""
        if not stat.exists():
            return None
        user, nice, system, _idle, _iowait, *others = map(int, stat.read_text().splitlines()[0].split()[1:9])
        ticks = user + nice + system + sum(others)
        own = os.times()
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system)


def cores_taken(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Cores that others kept busy on average between two readings; `None` where either is missing."""
    if before is None or after is None:
        return None
    others = (after.all_work - before.all_work) - (after.own_work - before.own_work)
    return max(0.0, others / (after.clock - before.clock))
