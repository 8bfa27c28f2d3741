"""Memory of mapped files that is given back, and memory that must not be."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from max.driver import Buffer

from step3p5 import mapped_files
from step3p5.mapped_files import MappedFiles

PAGES = 16


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(256, size=PAGES * mmap.PAGESIZE, dtype=np.uint8)


def release(array: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases an array, which need not be one that MAX would take."""
    first = array.ctypes.data
    monkeypatch.setattr(mapped_files, "span", lambda _: (first, first + array.nbytes))
    MappedFiles().release(Buffer.from_numpy(np.zeros(1)))


def resident_kib(address: int) -> int:
    """Of the mapping that begins at an address."""
    found = re.search(rf"^{address:x}-.*?^Rss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M | re.S)
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is resident")
def test_whole_pages_of_a_tensor_in_a_mapped_file_are_given_back(
    values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values.tofile(tmp_path / "weights")
    mapped = np.memmap(tmp_path / "weights", np.uint8, "r")
    assert np.array_equal(mapped, values)
    before = resident_kib(mapped.ctypes.data)
    release(mapped[1:], monkeypatch)
    assert (before, resident_kib(mapped.ctypes.data)) == (PAGES * mmap.PAGESIZE >> 10, mmap.PAGESIZE >> 10)
    assert np.array_equal(mapped, values)


@pytest.mark.parametrize("kind", ["own", "a file's that was written to"])
def test_other_memory_keeps_its_contents(
    kind: str, values: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = values.copy()
    if kind != "own":
        np.zeros_like(values).tofile(tmp_path / "weights")
        array = np.memmap(tmp_path / "weights", np.uint8, "c")
        array[:] = values
    release(array, monkeypatch)
    assert np.array_equal(array, values)
