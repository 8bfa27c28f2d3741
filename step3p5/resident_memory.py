"""Memory that loading and compiling a model needed and running it does not, given back to the system.

It is of two kinds. The C library keeps freed memory for its next allocation: tens of MB where the graphs were compiled
before, hundreds where they were compiled just now. And of shared libraries, a compiler's above all, whatever was ever
run or read stays mapped; the system keeps the files' contents for as long as nobody else needs the memory, and maps
again what is used again.
"""

from __future__ import annotations

import ctypes
import logging

from .huge_pages import madvise
from .mapped_files import MADV_DONTNEED
from .memory_maps import Mapping, memory_maps, shared_libraries

logger = logging.getLogger("max.pipelines")


def give_back() -> None:
    """Gives back freed memory and the pages of shared libraries; what is in use stays or comes back by itself.

    Nothing happens where the system has no way to do so.
    """
    trim_heap()
    unmap_libraries()


def trim_heap() -> None:
    """Hands freed memory of the C library's allocator to the system; GNU's has a call for it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def unmap_libraries() -> None:
    """Takes pages of shared libraries out of this process; the system still has the files' contents."""
    call = madvise()
    if call is None:
        return
    pages = library_pages(memory_maps())
    for mapping in pages:
        call(mapping.first, mapping.end - mapping.first, MADV_DONTNEED)  # locked pages stay, which is no fault
    logger.debug("Of shared libraries, %d MiB were given back.", sum(mapping.resident for mapping in pages) >> 20)


def library_pages(maps: list[Mapping]) -> list[Mapping]:
    """The resident mappings of shared libraries that hold nothing but what the files do.

    Linked addresses and variables are not among them: a page that was ever written would be lost.
    """
    libraries = shared_libraries(maps)
    return [
        mapping
        for mapping in maps
        if mapping.path in libraries
        and mapping.is_file
        and "w" not in mapping.permissions
        and mapping.own == 0
        and mapping.resident
    ]
