"""The graphs of a cycle that needs no host between verifying and drafting: acceptance and the next tokens.

Names of dimensions: `B` requests, `d` depths that draft, `K` positions that they may read once more (one less than the
deepest cycle has depths), `R = d + 1` rows of a request in a pass of the depths.

A cycle begins with `p` positions in each request's cache and adds those of its last token and of `m <= d` accepted
drafts. Depth `k` reads the token `k + 1` places on: before the cycle it has read the positions `p - k … p - 1` with
drafts, and the last `k - m` of these, if any, with drafts that are not accepted. What it has to read is therefore
within the `d + 1` positions up to `p + m`, the last accepted one. Where these begin before `p - K`, the rows begin
there, and those behind `p + m` are read by nobody and written again by the next cycle.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, DimLike, TensorType, TensorValue, Type, ops
from max.nn.layer import Module

from ..custom_ops import custom_op


class Acceptance(Module):
    """Accepts drafts and chooses what the depths read.

    Args:
        deepest: The most drafts of a request, 2 or more; `K` is one less.
        hidden_size: Width of a hidden state.
        dtype: Type of the hidden states.
        device: Where they are.
    """

    def __init__(self, deepest: int, hidden_size: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.deepest, self.hidden_size, self.dtype, self.device = deepest, hidden_size, dtype, device

    def __call__(
        self,
        drawn: TensorValue,
        hidden: TensorValue,
        cache_lengths: TensorValue,
        verified: BufferValue,
        kept: BufferValue,
        window: BufferValue,
    ) -> tuple[TensorValue, ...]:
        """Advances `kept`, `window` and the last tokens by a cycle.

        Args:
            drawn: What the target draws after every verified token, `[B, d + 1]` int64.
            hidden: The target's hidden states of the same, `[B, d + 1, hidden_size]`.
            cache_lengths: `p`, `[B]` uint32.
            verified: Of each request its last token and its drafts, `[B, d + 1]` int64; the new last token takes the
                place of the old one.
            kept: Hidden states of the positions `p - K … p - 1`, `[B, K, hidden_size]`.
            window: The tokens at the positions `p - K … p`, `[B, K + 1]` int64.

        Returns:
            What `MTPDepth` takes: `previous [B R, hidden_size]`, `tokens [B R]`, `following [B R]`, `last_rows [B]` and
            the lengths `[B]` of its cache; and for the host `[B, d + 2]` int64, the drawn tokens of each request and
            how many of its drafts were accepted.
        """
        batch, verified_each = drawn.shape[0], drawn.shape[1]
        rows = batch * verified_each

        def of(dtype: DType, *shape: DimLike) -> TensorType:
            return TensorType(dtype, shape, self.device)

        return tuple(
            custom_op(
                "step3p5_accept",
                self.device,
                [drawn, hidden, cache_lengths, verified, kept, window],
                [
                    of(self.dtype, rows, self.hidden_size),
                    of(DType.int64, rows),
                    of(DType.int64, rows),
                    of(DType.int64, batch),
                    of(DType.uint32, batch),
                    of(DType.int64, batch, verified_each + 1),
                ],
            )
        )

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        keep, device = self.deepest - 1, self.device
        return (
            TensorType(DType.int64, ["batch", "verified"], device),
            TensorType(self.dtype, ["batch", "verified", self.hidden_size], device),
            TensorType(DType.uint32, ["batch"], device),
            BufferType(DType.int64, ["batch", "verified"], device),
            BufferType(self.dtype, ["batch", keep, self.hidden_size], device),
            BufferType(DType.int64, ["batch", keep + 1], device),
        )


class Handover(Module):
    """Puts a cycle's last token and drafts where the next cycle's verification reads them.

    Args:
        deepest: The most drafts of a request; `K` is one less.
        device: Where they are.
    """

    def __init__(self, deepest: int, device: DeviceRef) -> None:
        super().__init__()
        self.deepest, self.device = deepest, device

    def __call__(
        self, window: TensorValue, places: TensorValue, verified: BufferValue, *drafted: TensorValue
    ) -> tuple[TensorValue]:
        """Writes `verified`, and returns the same.

        Args:
            window: As `Acceptance` left it.
            places: Of the next tokens to verify, in the last tokens followed by `drafted`: `[B (d + 1)]` int64.
            verified: The next tokens to verify, `[B (d + 1)]` int64.
            drafted: What each depth drafted, `[B]` int64; any tokens for the depths that `places` does not name.
        """
        last = window[:, self.deepest - 1]
        tokens = ops.gather(ops.concat([last, *drafted], axis=0), places, axis=0)
        ops.buffer_store(verified, tokens)
        return (tokens,)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        return (
            TensorType(DType.int64, ["batch", self.deepest], self.device),
            TensorType(DType.int64, ["verified"], self.device),
            BufferType(DType.int64, ["verified"], self.device),
            *(TensorType(DType.int64, ["batch"], self.device) for _ in range(self.deepest)),
        )
