"""Memory of tensors that are mapped from a file, given back once they were cast: nothing reads the originals again.

The system keeps what it read of the file for as long as nobody else needs the memory, so another start is as fast.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path

from max.driver import Buffer

from .huge_pages import madvise, span

MADV_DONTNEED = 4


class MappedFiles:
    """The files that this process had mapped to read when this was made, see proc(5)."""

    def __init__(self, maps: Path = Path("/proc/self/maps")) -> None:
        self._spans = _read_only_files(maps.read_text()) if maps.exists() else []

    def release(self, buffer: Buffer) -> None:
        """Gives back the whole pages of a host buffer that lies in such a file; other memory stays as it is.

        The buffer stays readable: its contents would be read from the file again.
        """
        call = madvise()
        first, end = span(buffer)
        # A page that could be written may differ from the file, and would be lost.
        if call is None or not any(begin <= first and end <= limit for begin, limit in self._spans):
            return
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            call(first, end - first, MADV_DONTNEED)


def _read_only_files(maps: str) -> list[tuple[int, int]]:
    """Spans of addresses `(first, end)`; neighbouring ones are one."""
    spans: list[tuple[int, int]] = []
    for first, end, permissions, inode in _mappings(maps.splitlines()):
        if inode == 0 or "w" in permissions:
            continue
        if spans and spans[-1][1] == first:
            spans[-1] = spans[-1][0], end
        else:
            spans.append((first, end))
    return spans


def _mappings(lines: Iterable[str]) -> Iterable[tuple[int, int, str, int]]:
    for line in lines:
        addresses, permissions, _offset, _device, inode, *_path = line.split()
        first, end = addresses.split("-")
        yield int(first, 16), int(end, 16), permissions, int(inode)
