"""The small inputs of a graph, sent to the device in one copy from page-locked memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, DeviceEvent, Usage
from max.dtype import DType

ALIGNMENT = 256
"""Bytes on a multiple of which every array begins, as one with an allocation of its own would."""

_SMALLEST = 1 << 16


def placed(arrays: Sequence[npt.NDArray[Any]]) -> tuple[list[int], int]:
    """Where each of `arrays` begins when they lie one after the other, and the bytes of all."""
    places, end = [], 0
    for array in arrays:
        places.append(end)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return places, end


def taken_apart(packed: Buffer, arrays: Sequence[npt.NDArray[Any]], places: Sequence[int]) -> list[Buffer]:
    """Views of the bytes `packed` with the shapes and types of `arrays`, which lie at `places`."""
    return [
        packed[place : place + array.nbytes].view(DType.from_numpy(array.dtype), array.shape)
        if array.size
        else Buffer(DType.from_numpy(array.dtype), array.shape, packed.device)
        for array, place in zip(arrays, places, strict=True)
    ]


class OneCopy:
    """Sends arrays to `device`; on the host they stay where they are.

    Its page-locked memory is written again by the next call, which waits until the copy before has been made.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._staging: Buffer | None = None
        self._sent: DeviceEvent | None = None

    def send(self, *arrays: npt.NDArray[Any]) -> list[Buffer]:
        """The arrays on the device, in the same order."""
        if self._device.is_host:
            return [Buffer.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        places, size = placed(arrays)
        if self._sent is not None:
            self._sent.synchronize()
        if self._staging is None or self._staging.num_elements < size:
            capacity = max(_SMALLEST, 1 << math.ceil(math.log2(size or 1)))
            self._staging = Buffer(DType.uint8, [capacity], self._device, Usage.STAGING | Usage.UNTRACKED)
            self._host = self._staging.to_numpy()
        for array, place in zip(arrays, places, strict=True):
            self._host[place : place + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        packed = Buffer(DType.uint8, [size], self._device)
        if size:
            packed.inplace_copy_from(self._staging[:size])
            self._sent = self._device.default_queue.record_event()
        return taken_apart(packed, arrays, places)
