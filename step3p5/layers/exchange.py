"""The collectives of a plan as graph operations, on values that lie one on each device.

MAX's collectives run on accelerators. Where all devices are the host, which is how the graph is tested without
accelerators, the same sums and joins are plain operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from max.graph import BufferValue, DeviceRef, TensorType, TensorValue, ops

from ..parallel_plan import Collective


@dataclass(frozen=True)
class Exchange:
    """What collectives need.

    Args:
        signals: Every accelerator's buffer that collectives synchronise through; none on the host.
        row_bounds: `[devices + 1]` int64 on the host, where every device's own rows begin among all; `None` where all
            devices have all rows.
    """

    signals: Sequence[BufferValue]
    row_bounds: TensorValue | None = None

    def __call__(
        self, collective: Collective | None, values: Sequence[TensorValue], own: Sequence[TensorValue]
    ) -> list[TensorValue]:
        """The values after a collective over rows; `own` has as many rows as every device has of its own."""
        match collective:
            case None:
                return list(values)
            case Collective.ALL_REDUCE:
                return self._sum(values)
            case Collective.ALL_GATHER:
                return self._join(values, axis=0)
            case Collective.REDUCE_SCATTER:
                return self._sum_own_rows(values, own)

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

    def _sum_own_rows(self, values: Sequence[TensorValue], own: Sequence[TensorValue]) -> list[TensorValue]:
        """The sum of every device's own rows.

        MAX's reduce-scatter cuts into equal parts. Devices whose requests do not have equally many tokens sum all rows
        instead, each on twice as many bytes sent, and keep theirs. Captured decode steps, and prefills as long as the
        scheduler allows, are equal. On the host the two ways are one.
        """
        assert self.row_bounds is not None
        if not self.signals:
            return self._own_parts(self._sum(values), own)
        rows = self.row_bounds[1:] - self.row_bounds[:-1]
        are_equal = ops.squeeze(ops.max(rows) == ops.min(rows), 0)
        return ops.cond(
            are_equal,
            [
                TensorType(value.dtype, of_device.shape, value.device)
                for value, of_device in zip(values, own, strict=True)
            ],
            lambda: self._equal_parts(values, own),
            lambda: self._own_parts(self._sum(values), own),
        )

    def _equal_parts(self, values: Sequence[TensorValue], own: Sequence[TensorValue]) -> list[TensorValue]:
        parts = ops.reducescatter.sum(values, self.signals)
        return [ops.rebind(part, of_device.shape) for part, of_device in zip(parts, own, strict=True)]

    def _own_parts(self, values: Sequence[TensorValue], own: Sequence[TensorValue]) -> list[TensorValue]:
        assert self.row_bounds is not None
        return [
            ops.slice_tensor(
                value,
                [(slice(self.row_bounds[device], self.row_bounds[device + 1]), own[device].shape[0]), slice(None)],
            )
            for device, value in enumerate(values)
        ]
