"""The collectives of a plan as graph operations, on values that lie one on each device.

MAX's collectives run on accelerators. Where all devices are the host, which is how the graph is tested without
accelerators, the same sums and joins are plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from max.graph import BufferValue, DeviceRef, TensorValue, ops

from ..parallel_plan import Collective


@dataclass(frozen=True)
class Exchange:
    """What collectives need.

    Args:
        signals: Every accelerator's buffer that collectives synchronise through; none on the host.
    """

    signals: Sequence[BufferValue]

    def __call__(self, collective: Collective | None, values: Sequence[TensorValue]) -> list[TensorValue]:
        """The values after a collective over rows.

        Raises:
            ValueError: The collective is one of `Dispatch`, for which values alone do not suffice.
        """
        match collective:
            case None:
                return list(values)
            case Collective.ALL_REDUCE:
                return self._sum(values)
            case Collective.ALL_GATHER:
                return self._join(values, axis=0)
            case Collective.DISPATCH | Collective.COMBINE:
                raise ValueError(f"collective: found {collective}, expected one of values alone. Use a Dispatch.")

    def join_columns(self, collective: Collective | None, values: Sequence[TensorValue]) -> list[TensorValue]:
        """Joins parts of the columns of the same rows."""
        return list(values) if collective is None else self._join(values, axis=-1)

    def broadcast(self, value: TensorValue, devices: Sequence[DeviceRef]) -> list[TensorValue]:
        """Copies of a value on every device."""
        return list(ops.distributed_broadcast(value, self.signals)) if self.signals else [value for _ in devices]

    def _sum(self, values: Sequence[TensorValue]) -> list[TensorValue]:
        if self.signals:
            return list(ops.allreduce.sum(values, self.signals))
        return [reduce(ops.add, values)] * len(values)

    def _join(self, values: Sequence[TensorValue], axis: int) -> list[TensorValue]:
        if self.signals:
            return ops.allgather(values, self.signals, axis=axis)
        return [ops.concat(values, axis=axis)] * len(values)
