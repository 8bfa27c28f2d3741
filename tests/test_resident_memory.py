"""Memory that is given back after the first step, and memory that must not be."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from step3p5 import model
from step3p5.memory_maps import Mapping, memory_maps
from step3p5.model import Step3p5Model
from step3p5.resident_memory import library_pages, trim_heap, unmap_libraries

PAGES = 16
CHUNK, CHUNKS = 32 << 10, 2048
LIBC = ctypes.CDLL(None)

needs_smaps = pytest.mark.skipif(not memory_maps(), reason="the system does not say what is resident")
needs_trim = pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="the C library keeps what is freed")

SMAPS = """\
1000-3000 r-xp 00000000 fe:00 7    /lib/library.so
Size:                  8 kB
Rss:                   8 kB
Anonymous:             0 kB
Swap:                  0 kB
VmFlags: rd ex
3000-5000 r--p 00002000 fe:00 7    /lib/library.so
Rss:                   8 kB
Anonymous:             4 kB
Swap:                  0 kB
5000-6000 r--p 00004000 fe:00 7    /lib/library.so
Rss:                   4 kB
Anonymous:             0 kB
Swap:                  4 kB
6000-7000 r--p 00005000 fe:00 7    /lib/library.so
Rss:                   4 kB
Anonymous:             0 kB
7000-8000 rw-p 00006000 fe:00 7    /lib/library.so
Rss:                   4 kB
Anonymous:             0 kB
8000-9000 r--p 00000000 fe:00 8    /weights of a model
Rss:                   4 kB
Anonymous:             0 kB
9000-a000 r-xp 00000000 00:00 0 
Rss:                   4 kB
Anonymous:             0 kB
a000-b000 r-xp 00000000 00:00 0    [vdso]
Rss:                   4 kB
Anonymous:             0 kB
b000-c000 r--p 00006000 fe:00 7    /lib/library.so
Rss:                   0 kB
Anonymous:             0 kB
"""


def library_of_own(path: Path) -> Mapping:
    """A private mapping of a file, to read, write and run."""
    call = LIBC.mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    with path.open("rb") as file:
        protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        first = call(None, path.stat().st_size, protection, mmap.MAP_PRIVATE, file.fileno(), 0)
    (found,) = (mapping for mapping in memory_maps() if mapping.first == first)
    return found


def forbid_writing(mapping: Mapping) -> None:
    size = mapping.end - mapping.first
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    assert LIBC.mprotect(ctypes.c_void_p(mapping.first), ctypes.c_size_t(size), protection) == 0


def content(mapping: Mapping) -> bytes:
    return ctypes.string_at(mapping.first, mapping.end - mapping.first)


def resident(mapping: Mapping) -> int:
    return sum(now.resident for now in memory_maps() if mapping.first <= now.first < mapping.end)


@pytest.fixture
def library(tmp_path: Path, rng: np.random.Generator) -> Mapping:
    rng.integers(256, size=PAGES * mmap.PAGESIZE, dtype=np.uint8).tofile(tmp_path / "library")
    return library_of_own(tmp_path / "library")


@needs_smaps
def test_libraries_are_unmapped_and_read_again(library: Mapping) -> None:
    forbid_writing(library)
    before = content(library)
    assert resident(library) == PAGES * mmap.PAGESIZE
    unmap_libraries()
    assert resident(library) == 0
    assert content(library) == before


@needs_smaps
def test_a_library_that_was_written_to_keeps_what_was_written(library: Mapping) -> None:
    ctypes.memset(library.first, 7, mmap.PAGESIZE + 1)
    before = content(library)
    forbid_writing(library)
    unmap_libraries()
    assert content(library) == before


def test_only_what_the_file_has_is_unmapped(tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text(SMAPS)
    maps = memory_maps(tmp_path / "smaps")
    assert [mapping.first for mapping in maps] == [0x1000 * (1 + page) for page in (0, 2, 4, 5, 6, 7, 8, 9, 10)]
    assert [mapping.first for mapping in library_pages(maps)] == [0x1000, 0x6000]


def test_a_system_that_does_not_tell_is_no_error(tmp_path: Path) -> None:
    assert memory_maps(tmp_path / "none") == []


@needs_smaps
@needs_trim
def test_freed_memory_goes_back_to_the_system() -> None:
    LIBC.malloc.restype = ctypes.c_void_p
    chunks = [LIBC.malloc(ctypes.c_size_t(CHUNK)) for _ in range(CHUNKS)]
    for chunk in chunks:
        ctypes.memset(chunk, 1, CHUNK)
    for chunk in chunks[:-1]:  # the last one keeps the C library from giving the others back by itself
        LIBC.free(ctypes.c_void_p(chunk))
    before = sum(mapping.own for mapping in memory_maps())
    trim_heap()
    after = sum(mapping.own for mapping in memory_maps())
    LIBC.free(ctypes.c_void_p(chunks[-1]))
    assert before - after > CHUNK * CHUNKS // 2


def test_memory_is_given_back_after_the_first_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(model, "rest_pollers", lambda: None)
    monkeypatch.setattr(model, "give_back", lambda: calls.append("given back"))
    loaded = Step3p5Model.__new__(Step3p5Model)
    loaded.devices = [SimpleNamespace(is_host=True)]
    for _ in range(2):
        loaded.after_step()
    assert calls == ["given back"]
