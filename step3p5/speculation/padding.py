"""A request that nobody made, which fills batches up to sizes whose graphs are captured."""

from __future__ import annotations

import numpy as np
from max.pipelines.context import EOSTracker, TextContext, TokenBuffer
from max.pipelines.kv_cache import PagedKVCacheManager


def padded_size(batch_size: int, largest: int) -> int:
    """The next of the sizes 1, 2, 3, 4, 6, 8, 12, 16, 24, … from `batch_size` on, or `largest` before it."""
    power = 1 << (batch_size - 1).bit_length()
    size = 3 * power // 4 if batch_size <= 3 * power // 4 and power >= 4 else power
    return min(size, largest)


def padding_request(manager: PagedKVCacheManager, position: int) -> TextContext:
    """A request that stands at every free place of a batch at once, and never gets any further.

    Its page of the cache is the one that MAX keeps for this: whoever stands there writes to it, and nobody reads it.

    Args:
        manager: The cache.
        position: Tokens that it seems to have in the cache.
    """
    context = TextContext(
        max_length=position + 1,
        tokens=TokenBuffer(np.zeros(position + 1, dtype=np.int64)),
        eos_tracker=EOSTracker(),
    )
    context.tokens.skip_processing(position)
    manager.alloc_dummy(context)
    return context
