"""Weights on large pages: which pages, and that their contents stay."""

from __future__ import annotations

import numpy as np
import pytest
from max.driver import Buffer

from step3p5 import huge_pages
from step3p5.huge_pages import HUGE_PAGE_BYTES as PAGE


@pytest.mark.parametrize(
    ("spans", "pages"),
    [
        ([], []),
        ([(PAGE + 1, 3 * PAGE - 1)], []),
        ([(PAGE, 3 * PAGE)], [(PAGE, 3 * PAGE)]),
        ([(PAGE - 1, 3 * PAGE + 1)], [(PAGE, 3 * PAGE)]),
        ([(2 * PAGE + 9, 4 * PAGE), (PAGE, 2 * PAGE + 5)], [(PAGE, 4 * PAGE)]),
        ([(0, PAGE), (2 * PAGE, 3 * PAGE)], [(0, PAGE), (2 * PAGE, 3 * PAGE)]),
    ],
)
def test_whole_pages_within_neighbouring_spans(spans: list[tuple[int, int]], pages: list[tuple[int, int]]) -> None:
    assert huge_pages.whole_pages(spans) == pages


def test_collapsed_buffers_keep_their_contents() -> None:
    values = np.random.default_rng().integers(2**16, size=(3, 5 * PAGE // 2), dtype=np.uint16)
    buffers = [Buffer.from_numpy(row.copy()) for row in values]
    huge_pages.collapse(buffers)
    assert all(np.array_equal(buffer.to_numpy(), row) for buffer, row in zip(buffers, values, strict=True))


def test_a_system_that_declines_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def decline(first: int, size: int, advice: int) -> int:
        asked.append((first % PAGE, size % PAGE))
        return -1

    monkeypatch.setattr(huge_pages, "madvise", lambda: decline)
    huge_pages.collapse([Buffer.from_numpy(np.zeros(4 * PAGE, np.uint8))])
    assert asked == [(0, 0)]
