"""The stopwatch of the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from stopwatch import Stopwatch


class Worker:
    """Takes 1 s itself and 2 s in an inner call, on a clock of its own."""

    now = 0.0

    def outer(self) -> int:
        Worker.now += 1
        return self.inner()

    def inner(self) -> int:
        Worker.now += 2
        return 7


def test_each_call_has_its_own_seconds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stopwatch.time.perf_counter", lambda: Worker.now)
    stopwatch, worker = Stopwatch(), Worker()
    with stopwatch.watching([("outer", worker, "outer"), ("inner", Worker, "inner")]):
        assert [worker.outer(), worker.outer()] == [7, 7]
    assert stopwatch.seconds == {"outer": 2, "inner": 4}


def test_nothing_is_watched_after_the_block() -> None:
    stopwatch, worker = Stopwatch(), Worker()
    with pytest.raises(ZeroDivisionError), stopwatch.watching([("a", worker, "outer"), ("b", Worker, "inner")]):
        _ = 1 / 0
    assert worker.outer() == 7
    assert not stopwatch.seconds
    assert vars(worker) == {}
