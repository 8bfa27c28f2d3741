"""Hidden states that depths have yet to read for good, on the device that made them or on the host.

While every depth drafts, what a step keeps is a row or two of each request, read by the next step: that stays on the
device. Where drafting rests, rows gather for hundreds of steps, and do so on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from max.driver import Buffer

from .host_rows import rows_to_host


class KeptRows:
    """What one step kept of all its requests, `[rows, hidden_size]` on the device."""

    def __init__(self, on_device: Buffer) -> None:
        self.on_device = on_device

    @cached_property
    def on_host(self) -> npt.NDArray[Any]:
        """The same rows as `rows_to_host` gives them."""
        return rows_to_host(self.on_device)


@dataclass(frozen=True)
class _Span:
    """Rows `start … end - 1` of something larger: one request's. A slice is a span of the same."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: slice) -> Self:
        start, end, _ = index.indices(len(self))
        return replace(self, start=self.start + start, end=self.start + max(start, end))


@dataclass(frozen=True)
class DeviceRows(_Span):
    """A span of `kept`."""

    kept: KeptRows


BLOCK = 64
"""Cycles whose rows are stored in one piece: new memory is dear in small pieces."""


class CycleRows:
    """What cycles that do not draft at full depth leave for the depths that rest, on the host, cycle by cycle.

    Args:
        places: Requests of a cycle.
        limit: Rows of each request after which older ones are given up.
    """

    def __init__(self, places: int, limit: int) -> None:
        self._limit = limit
        self._hidden: deque[npt.NDArray[Any]] = deque()
        self._counts: deque[npt.NDArray[np.int64]] = deque()
        self._stored = np.zeros(places, dtype=np.int64)
        self._spare = np.zeros(places, dtype=np.int64)
        """How many of a place's stored rows, the oldest ones, nobody wants."""
        self._block: npt.NDArray[Any] | None = None
        self._used = 0

    def __len__(self) -> int:
        """Cycles of which rows are stored."""
        return len(self._hidden)

    def forget(self, place: int) -> None:
        """Nobody wants what is stored of a place: another request comes, or none is there any more."""
        self._spare[place] = self._stored[place]

    def add(self, hidden: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> None:
        """Copies a cycle's hidden states `[places, rows, hidden_size]`, of which the first `counts [places]` count."""
        if self._block is None or self._used == BLOCK:
            self._block, self._used = np.empty((BLOCK, *hidden.shape), dtype=hidden.dtype), 0
        rows = self._block[self._used]
        rows[:] = hidden
        self._used += 1
        self._hidden.append(rows)
        self._counts.append(counts)
        self._stored = self._stored + counts
        while self._hidden and self._is_spare(self._counts[0]):
            self._hidden.popleft()
            oldest = self._counts.popleft()
            self._stored = self._stored - oldest
            self._spare = np.maximum(self._spare - oldest, 0)

    def _is_spare(self, oldest: npt.NDArray[np.int64]) -> bool:
        """Whether no request wants the oldest cycle's rows."""
        return bool(((oldest <= self._spare) | (self._stored - oldest >= self._spare + self._limit)).all())

    def of(self, places: Sequence[int]) -> list[RowsOfCycles]:
        """All wanted rows of the requests at `places`, whatever is added later."""
        stored = StoredCycles(list(self._hidden), np.array(self._counts).reshape(-1, len(self._stored)))
        return [RowsOfCycles(int(self._spare[p]), int(self._stored[p]), stored, p) for p in places]


@dataclass(frozen=True, eq=False)
class StoredCycles:
    """What some cycles left, one after the other."""

    hidden: list[npt.NDArray[Any]]
    """Of each cycle, `[places, rows, hidden_size]`."""

    counts: npt.NDArray[np.int64]
    """How many of a place's rows count, `[cycles, places]`."""

    def on_host(self, place: int, start: int, end: int) -> npt.NDArray[Any]:
        """Rows `start … end - 1` of a place."""
        counts = self.counts[:, place]
        ends = np.cumsum(counts)
        first, last = np.searchsorted(ends, [start, end - 1], side="right")
        pieces = [self.hidden[cycle][place, : counts[cycle]] for cycle in range(first, last + 1)]
        skipped = start - int(ends[first] - counts[first])
        return np.concatenate(pieces)[skipped : skipped + end - start]


@dataclass(frozen=True)
class RowsOfCycles(_Span):
    """A span of what `cycles` left of a place."""

    cycles: StoredCycles
    place: int


Rows = npt.NDArray[Any] | DeviceRows | RowsOfCycles
"""Hidden states `[n, hidden_size]` of one request."""


def split_rows(rows: Rows, counts: Sequence[int]) -> list[Rows]:
    """Takes rows `[sum(counts), hidden_size]` apart."""
    ends = np.cumsum(counts)
    return [rows[end - count : end] for count, end in zip(counts, ends.tolist(), strict=True)]


def common_source(pieces: Sequence[Rows]) -> tuple[KeptRows, npt.NDArray[np.int64]] | None:
    """What all `pieces` are parts of, and the places of their rows in it; `None` if they are parts of several."""
    if not pieces or not isinstance(pieces[0], DeviceRows):
        return None
    kept = pieces[0].kept
    places = [np.arange(p.start, p.end) for p in pieces if isinstance(p, DeviceRows) and p.kept is kept]
    return (kept, np.concatenate(places)) if len(places) == len(pieces) else None


def concatenated(pieces: Sequence[Rows], width: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The pieces `[n, width]` one after the other on the host; none gives `[0, width]`."""
    return np.concatenate([np.empty((0, width), dtype=dtype), *(_on_host(piece) for piece in pieces if len(piece))])


def _on_host(rows: Rows) -> npt.NDArray[Any]:
    if isinstance(rows, DeviceRows):
        return rows.kept.on_host[rows.start : rows.end]
    if isinstance(rows, RowsOfCycles):
        return rows.cycles.on_host(rows.place, rows.start, rows.end)
    return rows
