"""The number of threads under a control group's quota."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from step3p5 import cpu_quota
from step3p5.cpu_quota import THREADS_VARIABLE

FILES = {
    "none": {},
    "v2": {"pod/box/cpu.max": "150000 100000\n", "cpu.max": "max 100000\n"},
    "v2, above": {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "200000 50000\n"},
    "v2, beside v1": {"unified/pod/cpu.max": "300000 100000\n"},
    "v2, as a container sees it": {"cpu.max": "50000 100000\n"},
    "v1": {"cpu/pod/cpu.cfs_quota_us": "250000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
    "v1, none": {"cpu/pod/cpu.cfs_quota_us": "-1\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
    "v1, joint": {"cpu,cpuacct/pod/cpu.cfs_quota_us": "10000\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "40000\n"},
}
QUOTAS = {
    "none": None,
    "v2": 1.5,
    "v2, above": 4.0,
    "v2, beside v1": 3.0,
    "v2, as a container sees it": 0.5,
    "v1": 2.5,
    "v1, none": None,
    "v1, joint": 0.25,
}


@pytest.mark.parametrize("case", FILES)
def test_the_smallest_quota_in_cores(case: str, tmp_path: Path) -> None:
    controllers = "cpu,cpuacct" if case == "v1, joint" else "cpu"
    (tmp_path / "cgroup").write_text(f"5:memory:/other\n3:{controllers}:/pod\n0::/pod/box\n")
    for name, text in FILES[case].items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert cpu_quota.cpu_quota(tmp_path, tmp_path / "mount") == QUOTAS[case]


def test_no_control_groups_no_quota(tmp_path: Path) -> None:
    assert cpu_quota.cpu_quota(tmp_path, tmp_path) is None


@pytest.mark.parametrize(("quota", "threads"), [(None, None), (0.2, "1"), (1.5, "2"), (4.0, "4")])
def test_threads_that_fill_the_quota(quota: float | None, threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "")  # to be restored
    monkeypatch.delenv(THREADS_VARIABLE)
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: quota)
    cpu_quota.limit_threads()
    assert os.environ.get(THREADS_VARIABLE) == threads


def test_the_users_number_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "3")
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: 1.0)
    cpu_quota.limit_threads()
    assert os.environ[THREADS_VARIABLE] == "3"
