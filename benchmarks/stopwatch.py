"""Times of named calls, taken from outside: methods of a loaded object are wrapped for as long as they are watched."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Adds up the seconds of what it watches; of calls within each other each has its own seconds alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def reset(self) -> None:
        """Forgets what was added up."""
        self.seconds.clear()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its seconds added to those of `name`."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self.seconds[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return wrapper

    @contextmanager
    def watching(self, calls: Sequence[tuple[str, Any, str]]) -> Iterator[None]:
        """Watches calls, each given as (name, owner, attribute), until the end of the block."""
        found = [
            (owner, attribute, attribute in vars(owner), getattr(owner, attribute)) for _, owner, attribute in calls
        ]
        for (name, owner, attribute), (*_, call) in zip(calls, found, strict=True):
            setattr(owner, attribute, self.timed(name, call))
        try:
            yield
        finally:
            for owner, attribute, own, call in found:
                setattr(owner, attribute, call) if own else delattr(owner, attribute)
