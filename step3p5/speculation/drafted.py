"""What the depths drafted: on the device as soon as it is made, on the host when it is first read.

The device begins the next verification with drafts that the host has not seen; the host reads them beside the tokens
that the target drew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, DeviceEvent, Usage
from max.dtype import DType
from typing_extensions import override


class Drafted:
    """The drafts of one pass.

    Args:
        by_depth: What each depth drafted, `[requests]` int64.
        ready: When `on_host` holds them; `None` if it does.
        on_host: `[depths, requests]` int64, memory that is written again once this has been read.
    """

    def __init__(self, by_depth: Sequence[Buffer], on_host: npt.NDArray[np.int64], ready: DeviceEvent | None) -> None:
        self.by_depth = tuple(by_depth)
        self._on_host, self._ready = on_host, ready

    @property
    def num_requests(self) -> int:
        """How many requests the pass drafted for."""
        return self._on_host.shape[1]

    def read(self) -> npt.NDArray[np.int64]:
        """`[depths, requests]`; waits for the device where it has not drafted yet."""
        if self._ready is not None:
            self._ready.synchronize()
            self._on_host, self._ready = self._on_host.copy(), None
        return self._on_host


@dataclass(frozen=True)
class Drafts(Sequence[int]):
    """The first `length` drafts of the request at place `request` of a pass; its length is known before its tokens."""

    made: Drafted
    request: int
    length: int

    @override
    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    @override
    def __getitem__(self, index: int | slice) -> int | list[int]:
        tokens: list[int] = self.made.read()[: self.length, self.request].tolist()
        return tokens[index]

    def first(self, count: int) -> Drafts:
        """The first `count` of them, or all."""
        return Drafts(self.made, self.request, max(0, min(self.length, count)))


class DraftReader:
    """Copies drafts to the host while the device goes on; `device` is where they are made."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Buffer | None = None
        self._last: Drafted | None = None

    def start(self, by_depth: Sequence[Buffer]) -> Drafted:
        """Begins to copy what the depths drafted, each `[requests]`."""
        num_requests = int(by_depth[0].shape[0]) if by_depth else 0
        if self._device.is_host or not num_requests:
            arrays = [drafts.to_numpy() for drafts in by_depth]
            return Drafted(by_depth, np.array(arrays, dtype=np.int64).reshape(len(by_depth), num_requests), None)
        if self._last is not None:
            self._last.read()  # its memory is written again
        size = len(by_depth) * num_requests
        if self._memory is None or self._memory.num_elements < size:
            capacity = 1 << (size - 1).bit_length()
            self._memory = Buffer(DType.int64, [capacity], self._device, Usage.STAGING | Usage.UNTRACKED)
        for depth, drafts in enumerate(by_depth):
            self._memory[depth * num_requests : (depth + 1) * num_requests].inplace_copy_from(drafts)
        ready = self._device.default_queue.record_event()
        self._last = Drafted(by_depth, self._memory.to_numpy()[:size].reshape(len(by_depth), num_requests), ready)
        return self._last
