"""The graphs of a cycle that needs no host between verifying and drafting: greedy draws, acceptance, the next tokens.

Names of dimensions: `B` requests, `d` depths, `K = d - 1` positions that the depths read once more, `R = K + d + 1`
rows of a request in a pass of the depths. A cycle begins with `p` positions in each request's cache; its rows stand for
the positions `p - K … p + d`, whether their tokens were accepted or not: what lies behind the last accepted one is read
by nobody and written again by the next cycle.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, Dim, TensorType, TensorValue, Type, ops
from max.nn.layer import Module


class GreedyDraw(Module):
    """The token of the greatest logit.

    Args:
        vocab_size: Of the logits.
        device: Where they are.
    """

    def __init__(self, vocab_size: int, device: DeviceRef) -> None:
        super().__init__()
        self.vocab_size, self.device = vocab_size, device

    def __call__(self, logits: TensorValue, known_tokens: TensorValue) -> tuple[TensorValue]:
        """Draws a token a row.

        Args:
            logits: `[rows, vocab_size]` float32.
            known_tokens: `[1]` int64: tokens from this id on have no words and are not drawn.

        Returns:
            `[rows]` int64.
        """
        ids = ops.range(0, self.vocab_size, 1, out_dim=self.vocab_size, dtype=DType.int64, device=self.device)
        scores = ops.where(ids < known_tokens, logits, float("-inf"))
        return (ops.squeeze(ops.argmax(scores, axis=-1), -1),)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        return (
            TensorType(DType.float32, ["logit_rows", self.vocab_size], self.device),
            TensorType(DType.int64, [1], self.device),
        )


class Acceptance(Module):
    """Accepts drafts and chooses what the depths read.

    Args:
        depth: `d`, at least 2.
        hidden_size: Width of a hidden state.
        dtype: Type of the hidden states.
        device: Where they are.
    """

    def __init__(self, depth: int, hidden_size: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.depth, self.hidden_size = depth, hidden_size
        self.dtype, self.device = dtype, device

    def __call__(
        self,
        drawn: TensorValue,
        hidden: TensorValue,
        verified: TensorValue,
        cache_lengths: TensorValue,
        row_places: TensorValue,
        draft_places: TensorValue,
        kept: BufferValue,
        window: BufferValue,
    ) -> tuple[TensorValue, ...]:
        """Advances `kept` and `window` by a cycle.

        Args:
            drawn: What the target draws after every verified token, `[B (d + 1)]` int64.
            hidden: The target's hidden states of the same, `[B (d + 1), hidden_size]`.
            verified: Of each request its last token and its drafts, `[B (d + 1)]` int64.
            cache_lengths: `p`, `[B]` uint32.
            row_places: `0 … B R - 1`, int64.
            draft_places: `B R … B R + B - 1`, int64.
            kept: Hidden states of the positions `p - K … p - 1`, `[B, K, hidden_size]`.
            window: The tokens at the positions `p - K … p`, `[B, K + 1]` int64.

        Returns:
            What `MTPDepth` takes: `previous [B R, hidden_size]`, `tokens [B R]`, `following [B R]`, `last_rows [B]` and
            the lengths `[B]` of its cache; and for the host `[B, d + 2]` int64, the drawn tokens of each request and
            how many of its drafts were accepted.
        """
        depth, keep = self.depth, self.depth - 1
        rows = keep + depth + 1
        batch = cache_lengths.shape[0]
        drawn = _by_request(drawn, batch, depth + 1)
        drafts = _by_request(verified, batch, depth + 1)[:, 1:]
        right = ops.cast(ops.equal(drafts, drawn[:, :depth]), DType.int64)
        reached = accepted = right[:, 0]
        for index in range(1, depth):
            reached = reached * right[:, index]
            accepted = accepted + reached

        first_rows = (draft_places - draft_places[0]) * rows
        last_rows = first_rows + accepted + keep
        positions = ops.concat([ops.buffer_load(window), drawn], axis=1)
        states = ops.concat([ops.buffer_load(kept), _by_request(hidden, batch, depth + 1)], axis=1)
        previous = ops.reshape(states, (batch * rows, self.hidden_size))

        # A row's token at the next depth is that of the row after it here; of the last row it is drafted.
        places = _by_request(row_places, batch, rows)
        is_last = ops.equal(places, ops.unsqueeze(last_rows, 1))
        following = ops.where(is_last, ops.unsqueeze(draft_places, 1), places + 1)

        # `p` grows by `accepted + 1`.
        moved = ops.unsqueeze(accepted + 1, 1)
        starts = ops.unsqueeze(first_rows, 1) + moved
        kept_rows = starts + self._count(keep)
        new_kept = ops.gather(previous, ops.reshape(kept_rows, (batch * keep,)), axis=0)
        # A request has one token more in `positions` than it has rows.
        token_starts = ops.unsqueeze((draft_places - draft_places[0]) * (rows + 1), 1) + moved
        token_places = ops.reshape(token_starts + self._count(keep + 1), (batch * (keep + 1),))
        new_window = ops.gather(ops.reshape(positions, (batch * (rows + 1),)), token_places, axis=0)
        ops.buffer_store(kept, ops.reshape(new_kept, (batch, keep, self.hidden_size)))
        ops.buffer_store(window, ops.reshape(new_window, (batch, keep + 1)))
        return (
            previous,
            ops.reshape(positions[:, 1:], (batch * rows,)),
            ops.reshape(following, (batch * rows,)),
            last_rows,
            cache_lengths - ops.constant(keep, DType.uint32, device=self.device),
            ops.concat([drawn, ops.unsqueeze(accepted, 1)], axis=1),
        )

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        keep, device = self.depth - 1, self.device
        return (
            TensorType(DType.int64, ["verified"], device),
            TensorType(self.dtype, ["verified", self.hidden_size], device),
            TensorType(DType.int64, ["verified"], device),
            TensorType(DType.uint32, ["batch"], device),
            TensorType(DType.int64, ["rows"], device),
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
        depth: `d`.
        device: Where they are.
    """

    def __init__(self, depth: int, device: DeviceRef) -> None:
        super().__init__()
        self.depth, self.device = depth, device

    def __call__(self, window: TensorValue, verified: BufferValue, *drafted: TensorValue) -> tuple[TensorValue]:
        """Writes `verified`, and returns the same.

        Args:
            window: As `Acceptance` left it.
            verified: The next tokens to verify, `[B (d + 1)]` int64.
            drafted: What each depth drafted, `[B]` int64.
        """
        last = window[:, self.depth - 1 :]
        tokens = ops.concat([last, *(ops.unsqueeze(drafts, 1) for drafts in drafted)], axis=1)
        flat = ops.rebind(ops.reshape(tokens, (window.shape[0] * (self.depth + 1),)), verified.shape)
        ops.buffer_store(verified, flat)
        return (flat,)

    def input_types(self) -> tuple[Type[Any], ...]:
        """The graph's inputs: those of `__call__`, in its order."""
        return (
            TensorType(DType.int64, ["batch", self.depth], self.device),
            BufferType(DType.int64, ["verified"], self.device),
            *(TensorType(DType.int64, ["batch"], self.device) for _ in range(self.depth)),
        )


def _by_request(values: TensorValue, batch: Dim, each: int) -> TensorValue:
    """`[batch * each, …]` as `[batch, each, …]`."""
    rest = values.shape[1:]
    flat = ops.rebind(values, (batch * each, *rest), message=f"expected {each} rows a request")
    return ops.reshape(flat, (batch, each, *rest))
