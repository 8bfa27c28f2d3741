"""What cycles leave for depths that rest: each request's rows that count, one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from step3p5.speculation.kept_rows import CycleRows, RowsOfCycles, concatenated

PLACES, ROWS, WIDTH = 3, 4, 5

Rows = list[np.ndarray]


def assert_last_rows(rows: RowsOfCycles, every: Rows, limit: int) -> None:
    """Whether `rows` are the last of `every`, as many as there are or at least `limit`."""
    assert min(limit, len(every)) <= len(rows) <= len(every)
    for part in (rows, rows[-limit:], rows[2:], rows[3:5], rows[-1:], rows[:0]):
        found = concatenated([part], WIDTH, np.float64)
        assert len(found) == len(part)
        end = len(every) - rows.end + part.end
        np.testing.assert_array_equal(found, np.reshape(every[end - len(part) : end], (-1, WIDTH)))


@pytest.mark.parametrize("limit", [7, 1000])
def test_rows_that_count_are_found_and_the_last_are_kept(rng: np.random.Generator, limit: int) -> None:
    """Requests take the place of others, which find their rows whatever comes after them."""
    cycles = CycleRows(PLACES, limit)
    every: list[Rows] = [[] for _ in range(PLACES)]
    gone: list[tuple[RowsOfCycles, Rows]] = []
    for _ in range(60):
        hidden = rng.standard_normal((PLACES, ROWS, WIDTH))
        counts = rng.integers(1, ROWS + 1, size=PLACES)
        cycles.add(hidden, counts)
        for own, rows, count in zip(every, hidden, counts, strict=True):
            own += list(rows[:count])
        if rng.random() < 0.2:
            place = int(rng.integers(PLACES))
            gone.append((cycles.of([place])[0], every[place]))
            cycles.forget(place)
            every[place] = []
    assert len(gone) > 3
    for rows, own in [*zip(cycles.of(range(PLACES)), every, strict=True), *gone]:
        assert_last_rows(rows, own, limit)


def test_no_more_is_kept_than_is_wanted(rng: np.random.Generator) -> None:
    """However often requests come to places, and where nobody is."""
    limit, cycles = 5, CycleRows(PLACES, 5)
    nobody = PLACES - 1
    cycles.forget(nobody)
    for cycle in range(100):
        counts = np.ones(PLACES, dtype=np.int64)
        counts[nobody] = 0
        cycles.add(rng.standard_normal((PLACES, 1, WIDTH)), counts)
        cycles.forget(cycle % nobody)
        assert len(cycles) <= limit


def test_a_run_without_a_cycle_leaves_nothing() -> None:
    assert [len(rows) for rows in CycleRows(PLACES, 10).of([2, 0])] == [0, 0]
