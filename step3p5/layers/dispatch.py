"""How tokens that devices have of their own come to the experts of all devices, and the experts' sums back.

Each device chooses the experts of its own tokens. A token goes once to every device that has experts of it, and one sum
comes back from each: `kernels` of this project that read the other GPUs' memory, see `mojo_kernels/mailbox_gpu.mojo`.
A device waits for the others only where it needs their tokens or sums; what does not depend on them, the shared expert
above all, is enqueued between sending and receiving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorType, TensorValue, ops

from ..custom_ops import custom_op
from .moe import RoutedTokens


class Dispatch(Protocol):
    """The way to the experts and back; a call's lists have one value a device."""

    def send(self, own: Sequence[RoutedTokens]) -> None:
        """Sends every device's own tokens."""

    def receive(self, own: Sequence[RoutedTokens]) -> list[RoutedTokens]:
        """All devices' tokens, in order, as every device needs them: weights of other devices' experts are zero, and
        hidden states of tokens without an expert on the device undefined."""

    def combine(
        self, sums: Sequence[TensorValue], received: Sequence[RoutedTokens], own: Sequence[RoutedTokens]
    ) -> list[TensorValue]:
        """The sums of every device's own tokens, `[own tokens, hidden_size]`.

        Args:
            sums: Of each device's experts, `[all tokens, hidden_size]` float32.
            received: From `receive`.
            own: As it was sent.
        """


@dataclass(frozen=True)
class HostDispatch:
    """`Dispatch` where all devices are the host, which is how the graph is tested without GPUs.

    Args:
        experts: Those of every device.
        row_bounds: `[devices + 1]` int64 on the host, where every device's own tokens begin among all.
    """

    experts: Sequence[range]
    row_bounds: TensorValue

    def send(self, own: Sequence[RoutedTokens]) -> None:
        """Nothing: all tokens are where they should be."""

    def receive(self, own: Sequence[RoutedTokens]) -> list[RoutedTokens]:
        """See `Dispatch`."""
        x, ids, weights = (ops.concat(values, axis=0) for values in zip(*own, strict=True))
        return [RoutedTokens(x, ids, weights).only(experts) for experts in self.experts]

    def combine(
        self, sums: Sequence[TensorValue], received: Sequence[RoutedTokens], own: Sequence[RoutedTokens]
    ) -> list[TensorValue]:
        """See `Dispatch`."""
        total = reduce(ops.add, [of_device.cast(tokens.x.dtype) for of_device, tokens in zip(sums, own, strict=True)])
        return [
            ops.slice_tensor(
                total, [(slice(self.row_bounds[i], self.row_bounds[i + 1]), tokens.x.shape[0]), slice(None)]
            )
            for i, tokens in enumerate(own)
        ]


@dataclass(frozen=True)
class MailboxDispatch:
    """`Dispatch` through memory that all GPUs read.

    Args:
        experts: Those of every GPU: equally many, in order.
        row_bounds: See `HostDispatch`.
        mailboxes: Every GPU's; see `step3p5.mailboxes`.
        addresses: `[devices]` int64 on the host, where they lie.
    """

    experts: Sequence[range]
    row_bounds: TensorValue
    mailboxes: Sequence[BufferValue]
    addresses: TensorValue

    def send(self, own: Sequence[RoutedTokens]) -> None:
        """See `Dispatch`."""
        for i, tokens in enumerate(own):
            custom_op(
                "step3p5_dispatch_send",
                tokens.x.device,
                [self.mailboxes[i], self.addresses, *tokens, _scalar(i)],
                [],
            )

    def receive(self, own: Sequence[RoutedTokens]) -> list[RoutedTokens]:
        """See `Dispatch`."""
        rows = reduce(lambda a, b: a + b, [tokens.x.shape[0] for tokens in own])
        return [
            RoutedTokens(
                *custom_op(
                    "step3p5_dispatch_receive",
                    tokens.x.device,
                    [self.mailboxes[i], self.addresses, self.row_bounds, _scalar(i), *self._experts(i)],
                    [TensorType(of.dtype, (rows, of.shape[1]), of.device) for of in tokens],
                )
            )
            for i, tokens in enumerate(own)
        ]

    def combine(
        self, sums: Sequence[TensorValue], received: Sequence[RoutedTokens], own: Sequence[RoutedTokens]
    ) -> list[TensorValue]:
        """See `Dispatch`; the sums travel in the type of the hidden states."""
        for i, (y, tokens) in enumerate(zip(sums, received, strict=True)):
            custom_op(
                "step3p5_combine_send",
                y.device,
                [
                    self.mailboxes[i],
                    self.addresses,
                    y,
                    tokens.ids,
                    self.row_bounds,
                    _scalar(i),
                    *self._experts(i),
                ],
                [],
                parameters={"dtype": tokens.x.dtype},
            )
        return [
            custom_op(
                "step3p5_combine_receive",
                tokens.x.device,
                [self.mailboxes[i], self.addresses, tokens.ids, _scalar(i), _scalar(self.experts[-1].stop)],
                [tokens.x.type],
            )[0]
            for i, tokens in enumerate(own)
        ]

    def _experts(self, device: int) -> tuple[TensorValue, TensorValue]:
        return _scalar(self.experts[device].start), _scalar(self.experts[device].stop)


def _scalar(value: int) -> TensorValue:
    return ops.constant(value, DType.int32, device=DeviceRef.CPU())
