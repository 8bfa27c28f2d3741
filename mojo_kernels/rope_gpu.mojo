"""The angles of the rotary embedding on a GPU: a thread an angle."""

from max.gpu import global_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv

from .operands import Elements, Floats

comptime THREADS = 256

comptime RADIANS = Float64(
    6.283185307179586476925286766559 / 18446744073709551616.0
)
"""Radians of the fixed-point unit of a turn, 2^-64."""

comptime SERIES = 17
"""Highest power in the series below: on an eighth of a turn the next term is under 1e-17."""


@always_inline
def cosine_and_sine(turn: Int64) -> Tuple[Float64, Float64]:
    """Of an angle in fixed-point turns, by the Taylor series on the eighth of a turn next to a multiple of a quarter.
    """
    var quarter = (UInt64(turn) + (UInt64(1) << 61)) >> 62
    var rest = Int64(UInt64(turn) - (quarter << 62))
    var angle = rest.cast[DType.float64]() * RADIANS
    var square = angle * angle
    var cosine = Float64(1)
    var sine = Float64(1)
    comptime for i in range(SERIES - 1, 0, -2):
        cosine = 1 - square / Float64(i * (i - 1)) * cosine
        sine = 1 - square / Float64(i * (i + 1)) * sine
    sine *= angle
    if quarter & 1 == 1:
        cosine, sine = -sine, cosine
    if quarter & 2 == 2:
        cosine, sine = -cosine, -sine
    return cosine, sine


@__name("step3p5_rope_table")
def rope_table_kernel(
    table: Floats,
    row_offsets: Elements[DType.uint32],
    cache_lengths: Elements[DType.uint32],
    turns: Elements[DType.uint64],
    requests: Int32,
    tokens: Int32,
    half: Int32,
):
    """One cosine and one sine of `table [T, 2 * half]`."""
    wait_on_dependent_grids()
    launch_dependent_grids()
    var token, i = divmod(Int32(global_idx.x), half)
    if token >= tokens:
        return
    # The last request whose first row is not behind the token.
    var low = 0
    var high = Int(requests)
    while high - low > 1:
        var middle = (low + high) // 2
        if Int(row_offsets[unsafe_offset=middle]) <= Int(token):
            low = middle
        else:
            high = middle
    var position = UInt64(cache_lengths[unsafe_offset=low]) + UInt64(
        UInt32(token) - row_offsets[unsafe_offset=low]
    )
    # Signed, so that the angle lies in [-pi, pi).
    var turn = Int64(turns[unsafe_offset=Int(i)] * position)
    var cosine, sine = cosine_and_sine(turn)
    var to = table.unsafe_offset(Int(token) * 2 * Int(half) + Int(i))
    to[unsafe_offset=0] = cosine.cast[DType.float32]()
    to[unsafe_offset=Int(half)] = sine.cast[DType.float32]()


def rope_table_gpu(
    table: Floats,
    row_offsets: Elements[DType.uint32],
    cache_lengths: Elements[DType.uint32],
    turns: Elements[DType.uint64],
    requests: Int,
    tokens: Int,
    half: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `rope_table_kernel`."""
    if tokens * half == 0 or requests == 0:
        return
    ctx.enqueue_function[rope_table_kernel](
        table,
        row_offsets,
        cache_lengths,
        turns,
        Int32(requests),
        Int32(tokens),
        Int32(half),
        grid_dim=ceildiv(tokens * half, THREADS),
        block_dim=THREADS,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
