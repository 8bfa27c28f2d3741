"""Requests that nobody made, which fill a batch up to a size whose graphs are captured."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from max.pipelines.context import EOSTracker, TextContext, TokenBuffer

logger = logging.getLogger("max.pipelines")


def padded_size(batch_size: int, largest: int) -> int:
    """The next of the sizes 1, 2, 3, 4, 6, 8, 12, 16, 24, … from `batch_size` on, or `largest` before it."""
    power = 1 << (batch_size - 1).bit_length()
    size = 3 * power // 4 if batch_size <= 3 * power // 4 and power >= 4 else power
    return min(size, largest)


class Padding:
    """Requests with a page of the cache each, which are kept for good and never get any further.

    Args:
        manager: The cache.
        position: Tokens that each seems to have in the cache.
    """

    def __init__(self, manager: Any, position: int) -> None:
        self._manager, self._position = manager, position
        self._requests: list[TextContext] = []
        self._works = True

    def take(self, count: int) -> list[TextContext] | None:
        """The first `count` of them; `None` where the cache has no room."""
        while self._works and len(self._requests) < count:
            context = TextContext(
                max_length=self._position + 1,
                tokens=TokenBuffer(np.zeros(self._position + 1, dtype=np.int64)),
                eos_tracker=EOSTracker(),
            )
            context.tokens.skip_processing(self._position)
            try:
                self._manager.claim(context, replica_idx=0)
                self._manager.alloc(context)
            except Exception:  # MAX names no common class for a cache that is full
                logger.warning("No room in the cache to fill up batches, so some sizes run without.", exc_info=True)
                self._works = False
                break
            self._requests.append(context)
        return self._requests[:count] if len(self._requests) >= count else None
