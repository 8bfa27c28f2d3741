"""Copies of rows to places of a cycle: one for all that lie in a row on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from max.driver import Buffer

from .host_rows import host_dtype, rows_from_host
from .kept_rows import DeviceRows, KeptRows, Rows, concatenated


def copies_to_places(to: Buffer, source: Buffer, places: Iterable[int], size: int) -> Iterator[tuple[Buffer, Buffer]]:
    """Copies of `source`, which has `size` rows for each of the ascending `places` of `to`: one for places in a row."""
    at = 0
    for _, group in itertools.groupby(enumerate(places), key=lambda one: one[1] - one[0]):
        own = [place for _, place in group]
        count = len(own) * size
        yield _rows(to, own[0] * size, count), _rows(source, at, count)
        at += count


def copies_of_rows(to: Buffer, rows: Sequence[int], pieces: Sequence[Rows]) -> Iterator[tuple[Buffer, Buffer]]:
    """Copies of hidden states to `rows` of `to`, each piece from where it is.

    Args:
        to: `[n, hidden_size]` on the device.
        rows: Where the pieces go, which follow one another.
        pieces: As many rows in all.

    Returns:
        Targets and sources, on the device or the host.
    """
    on_device: list[tuple[int, KeptRows, int]] = []
    on_host: list[Rows] = []
    rows_on_host: list[int] = []
    left = iter(rows)
    for piece in pieces:
        own = list(itertools.islice(left, len(piece)))
        if isinstance(piece, DeviceRows):
            on_device += [(row, piece.kept, at) for row, at in zip(own, range(piece.start, piece.end), strict=True)]
        else:
            on_host.append(piece)
            rows_on_host += own
    yield from _copies_of_kept(to, on_device)
    if on_host:
        host = concatenated(on_host, int(to.shape[1]), host_dtype(to.dtype))
        yield from copies_to_places(to, rows_from_host(host, to.dtype, to.device), rows_on_host, 1)


def _copies_of_kept(to: Buffer, rows: Iterable[tuple[int, KeptRows, int]]) -> Iterator[tuple[Buffer, Buffer]]:
    """Copies of kept rows to rows of `to`, each `(row, kept, kept row)`: one for those in a row on both sides."""

    def span(one: tuple[int, tuple[int, KeptRows, int]]) -> tuple[int, int, int]:
        index, (row, kept, kept_row) = one
        return id(kept), row - index, kept_row - index

    for _, group in itertools.groupby(enumerate(rows), key=span):
        own = [one for _, one in group]
        row, kept, kept_row = own[0]
        yield _rows(to, row, len(own)), _rows(kept.on_device, kept_row, len(own))


def _rows(buffer: Buffer, first: int, count: int) -> Buffer:
    return buffer[(slice(first, first + count), *[slice(None)] * (buffer.rank - 1))]
