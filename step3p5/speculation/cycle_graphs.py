"""The graphs of a cycle that needs no host between verifying and drafting: acceptance and the next tokens.

Names of dimensions: `B` requests, `d` depths that draft, `K` positions that they read once more (one less than the
deepest cycle has depths), `R = K + d + 1` rows of a request in a pass of the depths. A cycle begins with `p` positions
in each request's cache; its rows stand for the positions `p - K … p + d`, whether their tokens were accepted or not:
what lies behind the last accepted one is read by nobody and written again by the next cycle.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, TensorType, TensorValue, Type, ops
from max.nn.layer import Module


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
        verified: TensorValue,
        cache_lengths: TensorValue,
        columns: TensorValue,
        first_rows: TensorValue,
        row_places: TensorValue,
        draft_places: TensorValue,
        kept: BufferValue,
        window: BufferValue,
    ) -> tuple[TensorValue, ...]:
        """Advances `kept` and `window` by a cycle.

        Args:
            drawn: What the target draws after every verified token, `[B, d + 1]` int64.
            hidden: The target's hidden states of the same, `[B, d + 1, hidden_size]`.
            verified: Of each request its last token and its drafts, `[B, d + 1]` int64.
            cache_lengths: `p`, `[B]` uint32.
            columns: `0 … d - 1`, then `d` as often as makes `[deepest]`, int64.
            first_rows: `0, R, 2 R, …`, `[B]` int64.
            row_places: `0 … B R - 1` as `[B, R]` int64.
            draft_places: `B R … B R + B - 1`, int64.
            kept: Hidden states of the positions `p - K … p - 1`, `[B, K, hidden_size]`.
            window: The tokens at the positions `p - K … p`, `[B, K + 1]` int64.

        Returns:
            What `MTPDepth` takes: `previous [B R, hidden_size]`, `tokens [B R]`, `following [B R]`, `last_rows [B]` and
            the lengths `[B]` of its cache; and for the host `[B, d + 2]` int64, the drawn tokens of each request and
            how many of its drafts were accepted.
        """
        keep, batch, rows = self.deepest - 1, row_places.shape[0], row_places.shape[1]
        # After the last draft nothing was drafted: no token is -1.
        none = ops.unsqueeze(first_rows - first_rows - 1, 1)
        drafts = ops.rebind(ops.concat([verified[:, 1:], none], axis=1), drawn.shape)
        right = ops.gather(ops.cast(ops.equal(drafts, drawn), DType.int64), columns, axis=1)
        reached = accepted = right[:, 0]
        for depth in range(1, self.deepest):
            reached = reached * right[:, depth]
            accepted = accepted + reached

        last_rows = first_rows + accepted + keep
        positions = ops.concat([ops.buffer_load(window), drawn], axis=1)
        states = ops.concat([ops.buffer_load(kept), hidden], axis=1)
        previous = ops.reshape(ops.rebind(states, (batch, rows, self.hidden_size)), (batch * rows, self.hidden_size))
        tokens = ops.reshape(ops.rebind(positions[:, 1:], (batch, rows)), (batch * rows,))

        # A row's token at the next depth is that of the row after it here; of the last row it is drafted.
        is_last = ops.equal(row_places, ops.unsqueeze(last_rows, 1))
        following = ops.where(is_last, ops.unsqueeze(draft_places, 1), row_places + 1)

        # `p` grows by `accepted + 1`.
        starts = ops.unsqueeze(first_rows + accepted + 1, 1)
        kept_rows = ops.reshape(starts + self._count(keep), (batch * keep,))
        ops.buffer_store(kept, ops.reshape(ops.gather(previous, kept_rows, axis=0), (batch, keep, self.hidden_size)))
        # The token before a row's is that of the position before: the first of the window is that of the last row kept.
        window_rows = ops.reshape(starts + self._count(keep + 1) - 1, (batch * (keep + 1),))
        ops.buffer_store(window, ops.reshape(ops.gather(tokens, window_rows, axis=0), (batch, keep + 1)))
        return (
            previous,
            tokens,
            ops.reshape(following, (batch * rows,)),
            last_rows,
            cache_lengths - ops.constant(keep, DType.uint32, device=self.device),
            ops.concat([drawn, ops.unsqueeze(accepted, 1)], axis=1),
        )

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        keep, device = self.deepest - 1, self.device
        return (
            TensorType(DType.int64, ["batch", "verified"], device),
            TensorType(self.dtype, ["batch", "verified", self.hidden_size], device),
            TensorType(DType.int64, ["batch", "verified"], device),
            TensorType(DType.uint32, ["batch"], device),
            TensorType(DType.int64, [self.deepest], device),
            TensorType(DType.int64, ["batch"], device),
            TensorType(DType.int64, ["batch", "rows"], device),
            TensorType(DType.int64, ["batch"], device),
            BufferType(self.dtype, ["batch", keep, self.hidden_size], device),
            BufferType(DType.int64, ["batch", keep + 1], device),
        )

    def _count(self, end: int) -> TensorValue:
        """`0 … end - 1` in a row, int64."""
        numbers = ops.range(0, end, 1, out_dim=end, dtype=DType.int64, device=self.device)
        return ops.unsqueeze(numbers, 0)


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
