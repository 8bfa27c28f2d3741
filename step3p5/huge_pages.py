"""Large pages for weights that a decode step reads: with small ones, looking up addresses takes part of the time.

Linux gives anonymous memory pages of 2 MiB where a program asks for them (`madvise(2)`). Weights that are mapped from
a file keep small pages. Elsewhere, and where the system declines, nothing happens: the memory works either way.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from max.driver import Buffer
from max.dtype import DType

logger = logging.getLogger("max.pipelines")

HUGE_PAGE_BYTES = 2 << 20

MADV_COLLAPSE = 25
"""Linux 6.1 and later."""


def collapse(buffers: Iterable[Buffer]) -> None:
    """Moves filled host buffers onto large pages; what lies next to one another is taken together."""
    call = madvise()
    if call is None:
        return
    declined = 0
    for first, end in whole_pages(span(buffer) for buffer in buffers):
        if call(first, end - first, MADV_COLLAPSE) != 0:
            declined += end - first
    if declined:
        logger.debug("The system declined large pages for %d MiB.", declined >> 20)


def whole_pages(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The large pages that lie within spans of addresses `(first, end)`, spans less than a page apart taken as one.

    Returns:
        Spans of whole pages, ascending and disjoint.
    """
    merged: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if merged and first - merged[-1][1] < HUGE_PAGE_BYTES:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((first, end))
    pages = ((-(-first // HUGE_PAGE_BYTES), end // HUGE_PAGE_BYTES) for first, end in merged)
    return [(first * HUGE_PAGE_BYTES, end * HUGE_PAGE_BYTES) for first, end in pages if first < end]


def span(buffer: Buffer) -> tuple[int, int]:
    """First address, and the end."""
    size = buffer.num_elements * buffer.dtype.size_in_bytes
    first = int(buffer.view(DType.uint8, (size,)).to_numpy().ctypes.data)
    return first, first + size


@cache
def madvise() -> Any:
    """The system's call; `None` where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
