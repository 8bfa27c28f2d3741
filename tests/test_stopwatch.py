"""The stopwatch of the benchmarks."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from stopwatch import Stopwatch


class Worker:
    """Takes 10 ms itself and 20 ms in an inner call."""

    def outer(self) -> int:
        time.sleep(0.01)
        return self.inner()

    def inner(self) -> int:
        time.sleep(0.02)
        return 7


def test_each_call_has_its_own_seconds_alone() -> None:
    stopwatch, worker = Stopwatch(), Worker()
    with stopwatch.watching([("outer", worker, "outer"), ("inner", Worker, "inner")]):
        assert [worker.outer(), worker.outer()] == [7, 7]
    assert 0.02 <= stopwatch.seconds["outer"] < 0.04 <= stopwatch.seconds["inner"]


def test_nothing_is_watched_after_the_block() -> None:
    stopwatch, worker = Stopwatch(), Worker()
    with pytest.raises(ZeroDivisionError), stopwatch.watching([("a", worker, "outer"), ("b", Worker, "inner")]):
        _ = 1 / 0
    assert worker.outer() == 7
    assert not stopwatch.seconds
    assert vars(worker) == {}
