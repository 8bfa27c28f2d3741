"""What cycles leave for depths that rest: each request's rows that count, one after the other."""

from __future__ import annotations

import numpy as np
import pytest

from step3p5.speculation.kept_rows import CycleRows, concatenated

BATCH, ROWS, WIDTH = 3, 4, 5


@pytest.mark.parametrize("limit", [7, 1000])
def test_rows_that_count_are_found_and_the_last_are_kept(rng: np.random.Generator, limit: int) -> None:
    cycles = CycleRows(BATCH, limit)
    every: list[list[np.ndarray]] = [[] for _ in range(BATCH)]
    for _ in range(20):
        hidden = rng.standard_normal((BATCH, ROWS, WIDTH))
        counts = rng.integers(1, ROWS + 1, size=BATCH)
        cycles.add(hidden, counts)
        for own, rows, count in zip(every, hidden, counts, strict=True):
            own += list(rows[:count])
    for request, own in enumerate(every):
        rows = cycles.of(request)
        assert min(limit, len(own)) <= len(rows) <= len(own)
        for part in (rows, rows[-limit:], rows[2:], rows[3:5], rows[-1:], rows[:0]):
            found = concatenated([part], WIDTH, np.float64)
            assert len(found) == len(part)
            end = len(own) - rows.end + part.end
            np.testing.assert_array_equal(found, np.reshape(own[end - len(part) : end], (-1, WIDTH)))


def test_a_run_without_a_cycle_leaves_nothing() -> None:
    assert len(CycleRows(BATCH, 10).of(2)) == 0
