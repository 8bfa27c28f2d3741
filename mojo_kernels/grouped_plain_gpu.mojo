"""The experts for many tokens on any GPU: plain kernels without tensor cores, a warp a row of weights."""

from max.gpu import WARP_SIZE, block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from std.math import ceildiv, exp
from std.utils.static_tuple import StaticTuple

from .operands import Elements, Ids, elements

comptime WARPS = 4

comptime BATCH = 8
"""Tokens that share a read of the weights."""

comptime BFloats = Elements[DType.bfloat16]

comptime Batch = StaticTuple[BFloats, BATCH]


@always_inline
def dots[
    width: Int
](w: BFloats, tokens: Batch, depth: Int) -> SIMD[DType.float32, BATCH]:
    """A row of weights times the rows of a batch of tokens, in every lane."""
    comptime align = 2 * width
    var sums = StaticTuple[SIMD[DType.float32, width], BATCH](fill=0)
    for k in range(Int(lane_id()) * width, depth, WARP_SIZE * width):
        var weights = (
            w.unsafe_offset(k)
            .unsafe_load[width=width, alignment=align]()
            .cast[DType.float32]()
        )
        comptime for b in range(BATCH):
            sums[b] = (
                sums[b]
                + weights
                * tokens[b]
                .unsafe_offset(k)
                .unsafe_load[width=width, alignment=align]()
                .cast[DType.float32]()
            )
    var result = SIMD[DType.float32, BATCH](0)
    comptime for b in range(BATCH):
        result[b] = warp.sum(sums[b].reduce_add())
    return result


@__name(t"step3p5_grouped_gate_up_plain_{width}")
def gate_up_plain[
    width: Int
](
    act: Pointer[BFloat16, MutAnyOrigin],
    x: Pointer[BFloat16, MutAnyOrigin],
    gate: Pointer[BFloat16, MutAnyOrigin],
    up: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    top_k: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    limit: Float32,
):
    """`act [T * K, M]`: block (m, e) computes `WARPS` columns of expert e's rows.
    """
    var m = Int(block_idx.x) * WARPS + Int(warp_id())
    var e = Int(block_idx.y)
    if m >= Int(intermediate_size):
        return
    var row = (e * Int(intermediate_size) + m) * Int(hidden_size)
    var end = Int(offsets[unsafe_offset=e + 1])
    for slot in range(Int(offsets[unsafe_offset=e]), end, BATCH):
        var tokens = Batch()
        comptime for b in range(BATCH):
            var t = rows[unsafe_offset=min(slot + b, end - 1)] // top_k
            tokens[b] = elements(x).unsafe_offset(Int(t) * Int(hidden_size))
        var g = dots[width](
            elements(gate).unsafe_offset(row), tokens, Int(hidden_size)
        )
        var u = dots[width](
            elements(up).unsafe_offset(row), tokens, Int(hidden_size)
        )
        # Comparisons, not min and max, which would drop a NaN.
        g = g / (1 + exp(-g))
        g = g.gt(limit).select(limit, g)
        u = u.gt(limit).select(limit, u)
        u = u.lt(-limit).select(-limit, u)
        var result = (g * u).cast[DType.bfloat16]()
        comptime for b in range(BATCH):
            if lane_id() == 0 and slot + b < end:
                act[
                    unsafe_offset=(slot + b) * Int(intermediate_size) + m
                ] = result[b]


@__name(t"step3p5_grouped_down_plain_{width}")
def down_plain[
    width: Int
](
    parts: Pointer[BFloat16, MutAnyOrigin],
    act: Pointer[BFloat16, MutAnyOrigin],
    down: Pointer[BFloat16, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    hidden_size: Int32,
    intermediate_size: Int32,
    begin: Int32,
    end: Int32,
):
    """`parts [T * K, end - begin]` in order of expert: block (h, e) computes `WARPS` columns of expert e's rows.
    """
    var h = Int(begin) + Int(block_idx.x) * WARPS + Int(warp_id())
    var e = Int(block_idx.y)
    if h >= Int(end):
        return
    var row = (e * Int(hidden_size) + h) * Int(intermediate_size)
    var last = Int(offsets[unsafe_offset=e + 1])
    for slot in range(Int(offsets[unsafe_offset=e]), last, BATCH):
        var tokens = Batch()
        comptime for b in range(BATCH):
            tokens[b] = elements(act).unsafe_offset(
                min(slot + b, last - 1) * Int(intermediate_size)
            )
        var sums = dots[width](
            elements(down).unsafe_offset(row), tokens, Int(intermediate_size)
        ).cast[DType.bfloat16]()
        comptime for b in range(BATCH):
            if lane_id() == 0 and slot + b < last:
                parts[
                    unsafe_offset=(slot + b) * Int(end - begin) + h - Int(begin)
                ] = sums[b]


def launch_gate_up_plain(
    act: BFloats,
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    rows: Ids,
    offsets: Ids,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `gate_up_plain`."""
    comptime for width in [8, 1]:
        if hidden_size % width == 0:
            comptime kernel = gate_up_plain[width]
            ctx.enqueue_function[kernel](
                act,
                x,
                gate,
                up,
                rows,
                offsets,
                Int32(top_k),
                Int32(hidden_size),
                Int32(intermediate_size),
                limit,
                grid_dim=(ceildiv(intermediate_size, WARPS), experts),
                block_dim=WARPS * WARP_SIZE,
            )
            return


def launch_down_plain(
    parts: BFloats,
    act: BFloats,
    down: BFloats,
    offsets: Ids,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    begin: Int,
    end: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `down_plain`."""
    comptime for width in [8, 1]:
        if intermediate_size % width == 0:
            comptime kernel = down_plain[width]
            ctx.enqueue_function[kernel](
                parts,
                act,
                down,
                offsets,
                Int32(hidden_size),
                Int32(intermediate_size),
                Int32(begin),
                Int32(end),
                grid_dim=(ceildiv(end - begin, WARPS), experts),
                block_dim=WARPS * WARP_SIZE,
            )
            return
