"""What of this process lies in memory, mapping by mapping, as Linux tells it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+)\s*(.*)")
_COUNT = re.compile(r"(\w+): +(\d+) kB")


@dataclass(frozen=True)
class Mapping:
    """One mapping; bytes."""

    first: int
    """Its first address."""

    end: int
    permissions: str
    """As proc(5) spells them: `r-xp`."""

    path: str
    """The file's, or a name in brackets, or nothing."""

    is_file: bool
    resident: int
    own: int
    """Of the mapping, what this process wrote, swapped out or not: a file does not have it."""


def memory_maps(smaps: Path = Path("/proc/self/smaps")) -> list[Mapping]:
    """The process's mappings by address, see proc(5); none where the system does not tell."""
    try:
        lines = smaps.read_text().splitlines()
    except OSError:
        return []
    heads: list[tuple[str, ...]] = []
    counts: list[dict[str, int]] = []
    for line in lines:
        if (head := _HEAD.match(line)) is not None:
            heads.append(head.groups())
            counts.append({})
        elif (count := _COUNT.match(line)) is not None:
            counts[-1][count[1]] = int(count[2]) << 10
    return [
        Mapping(
            first=int(first, 16),
            end=int(end, 16),
            permissions=permissions,
            path=path,
            is_file=inode != "0",
            resident=count["Rss"],
            own=count["Anonymous"] + count.get("Swap", 0),
        )
        for (first, end, permissions, inode, path), count in zip(heads, counts, strict=True)
    ]


def shared_libraries(maps: list[Mapping]) -> set[str]:
    """The paths of the files from which code is run."""
    return {mapping.path for mapping in maps if mapping.is_file and "x" in mapping.permissions}
