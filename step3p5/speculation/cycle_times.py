"""What a cycle takes by batch size and depth: measured, or as the bytes foretell from the likest ones that were."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SAMPLES = 9
"""Measurements of a time of which the median counts."""

FIRST_SAMPLES = 3
"""How often a depth is measured at first."""

NEAR = 2.0
"""Batch sizes up to this factor apart foretell each other's times well."""


@dataclass
class _Measured:
    verifying: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    drafting: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))

    @property
    def seconds(self) -> float:
        return statistics.median(self.verifying) + (statistics.median(self.drafting) if self.drafting else 0.0)


class CycleTimes:
    """Seconds of cycles, each known by its batch size and the drafts of a request that it verifies.

    Args:
        cycle_bytes: What a cycle reads, in any unit.
    """

    def __init__(self, cycle_bytes: Callable[[int, int], float]) -> None:
        self._cycle_bytes = cycle_bytes
        self._measured: dict[tuple[int, int], _Measured] = {}

    def record_verification(self, size: int, depth: int, seconds: float) -> None:
        """Learns the time of a verification."""
        self._measured.setdefault((size, depth), _Measured()).verifying.append(seconds)

    def record_drafting(self, size: int, depth: int, seconds: float) -> None:
        """Learns the time of drafting."""
        self._measured.setdefault((size, depth), _Measured()).drafting.append(seconds)

    def is_measured(self, size: int, depth: int) -> bool:
        """Whether the very cycle was measured."""
        times = self._measured.get((size, depth))
        if times is None or len(times.verifying) < FIRST_SAMPLES:
            return False
        return not depth or len(times.drafting) >= FIRST_SAMPLES

    def is_known(self, size: int, depth: int) -> bool:
        """Whether a cycle of the depth and about the size was measured."""
        return any(
            deep == depth and max(other, size) <= NEAR * min(other, size) and self.is_measured(other, deep)
            for other, deep in self._measured
        )

    def seconds(self, size: int, depth: int) -> float:
        """A cycle's time; before anything was measured, its bytes."""
        if self.is_measured(size, depth):
            return self._measured[size, depth].seconds
        measured = [key for key in self._measured if self.is_measured(*key)]
        if not measured:
            return self._cycle_bytes(size, depth)
        at_size = [deep for other, deep in measured if other == size]
        if at_size and min(at_size) < depth < max(at_size):
            less, more = max(deep for deep in at_size if deep < depth), min(deep for deep in at_size if deep > depth)
            return self._between(size, depth, less, more)

        def distance(key: tuple[int, int]) -> tuple[float, int]:
            depths = abs(key[1] - depth)
            return abs(math.log2(key[0] / size)) + depths, depths

        likest = min(measured, key=distance)
        return self._measured[likest].seconds * self._cycle_bytes(size, depth) / self._cycle_bytes(*likest)

    def _between(self, size: int, depth: int, less: int, more: int) -> float:
        """The time of a depth between two measured ones: the bytes say how far it lies from them.

        Arithmetic, of which the bytes know nothing, grows with the depth as well.
        """
        first, last = (self._measured[size, deep].seconds for deep in (less, more))
        begin, at, end = (self._cycle_bytes(size, deep) for deep in (less, depth, more))
        share = (at - begin) / (end - begin) if end > begin else (depth - less) / (more - less)
        return first + (last - first) * share
