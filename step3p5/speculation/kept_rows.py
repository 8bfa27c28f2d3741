"""Hidden states that depths have yet to read for good, on the device that made them or on the host.

While every depth drafts, what a step keeps is a row or two of each request, read by the next step: that stays on the
device. Where drafting rests, rows gather for hundreds of steps, and do so on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
class DeviceRows:
    """Rows `start … end - 1` of `kept`: one request's."""

    kept: KeptRows
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: slice) -> DeviceRows:
        start, end, _ = index.indices(len(self))
        return DeviceRows(self.kept, self.start + start, self.start + max(start, end))


Rows = npt.NDArray[Any] | DeviceRows
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
    arrays = [p.kept.on_host[p.start : p.end] if isinstance(p, DeviceRows) else p for p in pieces]
    return np.concatenate([np.empty((0, width), dtype=dtype), *arrays])
