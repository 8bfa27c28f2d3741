"""The step from one verification of drafts to the next pass of the depths, in one op."""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .accept_gpu import accept_gpu
from .accepted import Accepted
from .operands import elements, expect_size


def accept_cpu(all: Accepted):
    """Request by request."""
    for request in range(all.requests):
        var count = all.count(request)
        for row in range(all.rows()):
            all.store_row(request, row, count)
        # A token of the window moves towards its beginning.
        for place in range(all.keep + 1):
            all.store_window(
                request, place, all.token(request, count + 1 + place)
            )
        comptime WIDTH = 16
        var whole = all.hidden_size // WIDTH * WIDTH
        for column in range(0, whole, WIDTH):
            all.move_states[WIDTH](request, count, column)
        for column in range(whole, all.hidden_size):
            all.move_states[1](request, count, column)


@extensibility.register("step3p5_accept")
struct Step3p5Accept:
    """Accepts drafts and chooses what the depths read."""

    @staticmethod
    def execute[
        target: StaticString, dtype: DType
    ](
        previous: OutputTensor[dtype=dtype, rank=2, ...],
        tokens: OutputTensor[dtype=DType.int64, rank=1, ...],
        following: OutputTensor[dtype=DType.int64, rank=1, ...],
        last_rows: OutputTensor[dtype=DType.int64, rank=1, ...],
        lengths: OutputTensor[dtype=DType.uint32, rank=1, ...],
        summary: OutputTensor[dtype=DType.int64, rank=2, ...],
        drawn: InputTensor[dtype=DType.int64, rank=2, ...],
        hidden: InputTensor[dtype=dtype, rank=3, ...],
        cache_lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        verified: MutableInputTensor[dtype=DType.int64, rank=2, ...],
        kept: MutableInputTensor[dtype=dtype, rank=3, ...],
        window: MutableInputTensor[dtype=DType.int64, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """See `Accepted` for the operands; `R = d + 1`.

        Parameters:
            target: Kind of device.
            dtype: Type of the hidden states.

        Args:
            previous: Result `[B * R, H]`.
            tokens: Result `[B * R]`.
            following: Result `[B * R]`.
            last_rows: Result `[B]`.
            lengths: Result `[B]`.
            summary: Result `[B, d + 2]`.
            drawn: `[B, d + 1]`.
            hidden: `[B, d + 1, H]`.
            cache_lengths: `[B]`.
            verified: `[B, d + 1]`, written.
            kept: `[B, K, H]`, written.
            window: `[B, K + 1]`, written.
            ctx: The device.
        """
        comptime op = "step3p5_accept"
        var requests = drawn.dim_size(0)
        var width = drawn.dim_size(1)
        var keep = kept.dim_size(1)
        var hidden_size = hidden.dim_size(2)
        var rows = requests * width
        expect_size(op, "previous[B * R, H], dim 0", previous.dim_size(0), rows)
        expect_size(
            op, "previous[B * R, H], dim H", previous.dim_size(1), hidden_size
        )
        expect_size(op, "tokens[B * R]", tokens.dim_size(0), rows)
        expect_size(op, "following[B * R]", following.dim_size(0), rows)
        expect_size(op, "last_rows[B]", last_rows.dim_size(0), requests)
        expect_size(op, "lengths[B]", lengths.dim_size(0), requests)
        expect_size(
            op, "summary[B, d + 2], dim B", summary.dim_size(0), requests
        )
        expect_size(
            op, "summary[B, d + 2], dim 1", summary.dim_size(1), width + 1
        )
        expect_size(
            op, "hidden[B, d + 1, H], dim B", hidden.dim_size(0), requests
        )
        expect_size(op, "hidden[B, d + 1, H], dim 1", hidden.dim_size(1), width)
        expect_size(
            op, "verified[B, d + 1], dim B", verified.dim_size(0), requests
        )
        expect_size(
            op, "verified[B, d + 1], dim 1", verified.dim_size(1), width
        )
        expect_size(op, "cache_lengths[B]", cache_lengths.dim_size(0), requests)
        expect_size(op, "kept[B, K, H], dim B", kept.dim_size(0), requests)
        expect_size(op, "kept[B, K, H], dim H", kept.dim_size(2), hidden_size)
        expect_size(op, "window[B, K + 1], dim B", window.dim_size(0), requests)
        expect_size(op, "window[B, K + 1], dim 1", window.dim_size(1), keep + 1)
        var all = Accepted[dtype](
            elements(previous.unsafe_ptr()),
            elements(tokens.unsafe_ptr()),
            elements(following.unsafe_ptr()),
            elements(last_rows.unsafe_ptr()),
            elements(lengths.unsafe_ptr()),
            elements(summary.unsafe_ptr()),
            elements(drawn.unsafe_ptr()),
            elements(hidden.unsafe_ptr()),
            elements(verified.unsafe_ptr()),
            elements(cache_lengths.unsafe_ptr()),
            elements(kept.unsafe_ptr()),
            elements(window.unsafe_ptr()),
            requests,
            width - 1,
            keep,
            hidden_size,
        )
        comptime if target == "cpu":
            accept_cpu(all)
        else:
            accept_gpu(all, ctx)
