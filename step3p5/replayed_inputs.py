"""Which inputs have to be brought to where a captured graph reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from max.driver import Buffer


def stays(buffer: Buffer) -> bool:
    """Whether a replay does not read the buffer: what lies on the host was read when the graph was captured."""
    return bool(buffer.device.is_host or buffer.pinned)


def addresses(buffers: Sequence[Buffer]) -> tuple[int, ...]:
    """Where the buffers lie that a replay reads."""
    return tuple(buffer._data_ptr() for buffer in buffers if not stays(buffer))


def elsewhere(pairs: Iterable[tuple[Buffer, Buffer]]) -> list[tuple[Buffer, Buffer]]:
    """Those of `pairs`, each of what a replay reads and of an input, that are not one and the same memory."""
    return [(to, own) for to, own in pairs if not stays(to) and to._data_ptr() != own._data_ptr()]
