"""Worker threads on cores of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from step3p5.cpu_quota import THREADS_VARIABLE
from step3p5.worker_threads import rest_pollers, spread_workers

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no threads")


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """System ids of as many threads as cores, listed in the test's folder as MAX's workers are."""
    monkeypatch.setenv(THREADS_VARIABLE, "")  # to be restored
    monkeypatch.delenv(THREADS_VARIABLE)
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    ids = [thread.native_id or 0 for thread in threads]
    for index, thread_id in enumerate(ids):
        (tmp_path / str(thread_id)).mkdir()
        (tmp_path / str(thread_id) / "comm").write_text(f"\N{FIRE} Thread{index}\n")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "comm").write_text("python\n")
    yield ids
    end.set()
    for thread in threads:
        thread.join()


@needs_affinity
def test_every_worker_has_a_core(workers: list[int], tmp_path: Path) -> None:
    spread_workers(tmp_path)
    assert [os.sched_getaffinity(worker) for worker in workers] == [{core} for core in sorted(os.sched_getaffinity(0))]


@needs_affinity
@pytest.mark.parametrize("case", ["fewer threads asked for", "a worker more"])
def test_otherwise_the_system_places_them(
    case: str, workers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = os.sched_getaffinity(0)
    if case == "a worker more":
        (tmp_path / "1" / "comm").write_text(f"Thread{len(workers)}\n")
    else:
        monkeypatch.setenv(THREADS_VARIABLE, "0")
    spread_workers(tmp_path)
    assert [os.sched_getaffinity(worker) for worker in workers] == [cores] * len(workers)


@needs_affinity
def test_workers_that_have_ended_hold_nothing_up(workers: list[int], tmp_path: Path) -> None:
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    (tmp_path / str(ended.native_id)).mkdir()
    (tmp_path / str(ended.native_id) / "comm").write_text("Thread0\n")
    (tmp_path / "2").mkdir()  # as a thread's folder is when it ends while the list is read: without its files
    (tmp_path / "2" / "comm").symlink_to(tmp_path / "gone")
    spread_workers(tmp_path)
    assert [os.sched_getaffinity(worker) for worker in workers] == [{core} for core in sorted(os.sched_getaffinity(0))]


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="the system has no such class of threads")
@pytest.mark.parametrize(
    ("seconds", "of_python", "rests"), [(1e-4, False, True), (1e-4, True, False), (1, False, False)]
)
def test_threads_that_only_poll_rest(
    monkeypatch: pytest.MonkeyPatch, seconds: float, of_python: bool, rests: bool
) -> None:
    end = threading.Event()

    def poll() -> None:
        while not end.is_set():
            time.sleep(seconds)

    thread = threading.Thread(target=poll, name=Path("/proc/self/comm").read_text().strip())
    thread.start()
    if not of_python:
        monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])

    def has_rested() -> bool:
        rest_pollers()
        return os.sched_getscheduler(thread.native_id or 0) == os.SCHED_IDLE

    try:
        # Beside other work a thread may hardly get to poll while it is watched.
        assert any(has_rested() for _ in range(40 if rests else 1)) == rests
    finally:
        end.set()
        thread.join()
