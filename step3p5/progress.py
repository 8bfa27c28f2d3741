"""A progress bar on standard error, for what takes longer than a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SILENT_SECONDS = 2.0
"""What is done sooner shows no bar."""

T = TypeVar("T")


def with_progress(items: Iterable[T], num_bytes: Callable[[T], int], label: str) -> Iterator[T]:
    """`items` one by one; the bar counts the bytes of those that are done, as they were at first."""
    sized = [(item, num_bytes(item)) for item in items]
    total = sum(size for _, size in sized)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=SILENT_SECONDS, disable=not sized) as bar:
        for item, size in sized:
            yield item
            bar.update(size)
