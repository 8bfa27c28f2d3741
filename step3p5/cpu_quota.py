"""How many threads the CPU kernels use where a container may not use all cores: threads beyond its quota only wait.

MAX counts the cores that the process may run on; a quota of their time is not among what it looks at.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

THREADS_VARIABLE = "STEP3P5_CPU_THREADS"
"""Environment variable that the CPU kernels read at every launch; what the user sets stands."""


def limit_threads() -> None:
    """Tells the CPU kernels to use no more threads than the quota of this process's control groups fills."""
    quota = cpu_quota()
    if quota is not None:
        os.environ.setdefault(THREADS_VARIABLE, str(max(1, math.ceil(quota))))


def cpu_quota(process: Path = Path("/proc/self"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The smallest quota among the process's control groups and those above them, in cores; `None` where there is none.

    Reads `cpu.max` of version 2 and `cpu.cfs_quota_us`, `cpu.cfs_period_us` of version 1, see cgroups(7).

    Args:
        process: The process's folder.
        mount: Where the control groups are mounted.
    """
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += [_quota_v2(folder) for base in (mount, mount / "unified") for folder in _with_parents(base, path)]
        elif "cpu" in controllers.split(","):
            quotas += [
                _quota_v1(folder)
                for base in (mount / "cpu", mount / controllers)
                for folder in _with_parents(base, path)
            ]
    return min((quota for quota in quotas if quota is not None), default=None)


def _with_parents(base: Path, path: str) -> list[Path]:
    """The folder of the group `path` and those of the groups that hold it; inside a container some are not mounted."""
    group = Path(path.lstrip("/"))
    return [base / group, *(base / parent for parent in group.parents)]


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return quota / int((folder / "cpu.cfs_period_us").read_text()) if quota > 0 else None
    except (OSError, ValueError):
        return None
