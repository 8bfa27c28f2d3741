"""Root-mean-square norm of rows on a GPU, also of a sum: a block a row.

MAX's kernel lets the next one begin only when it has ended; this one at once, so that weights are on their way meanwhile.
"""

from max.gpu import WARP_SIZE, barrier, block_idx, lane_id, thread_idx, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import rsqrt
from std.memory import unsafe_stack_allocation

from .operands import Elements

comptime THREADS = 512

comptime WIDTH = 8
"""Elements that a thread takes at once: a row of 4096 is read once."""


@always_inline
def block_sum(value: Float32) -> Float32:
    """The sum over all threads, in a fixed order; once a kernel."""
    comptime WARPS = THREADS // WARP_SIZE
    var shared = unsafe_stack_allocation[
        WARPS, Float32, address_space=AddressSpace.SHARED
    ]()
    var own = warp.sum(value)
    if lane_id() == 0:
        shared[unsafe_offset=Int(warp_id())] = own
    barrier()
    var total = Float32(0)
    comptime for w in range(WARPS):
        total += shared[unsafe_offset=w]
    return total


def norm_kernel[
    dtype: DType,
    delta_dtype: DType,
    weight_dtype: DType,
    adds: Bool,
    width: Int,
](
    y: Elements[dtype],
    sum: Elements[dtype],
    x: Elements[dtype],
    delta: Elements[delta_dtype],
    weight: Elements[weight_dtype],
    columns: Int32,
    eps: Float32,
    offset: Float32,
):
    """`y = s * rsqrt(mean(s^2) + eps) * (offset + weight)` of `s = x`, or of `sum = x + delta` rounded to `dtype`.
    """
    comptime Values = SIMD[DType.float32, width]
    comptime STRIDE = THREADS * width
    wait_on_dependent_grids()
    launch_dependent_grids()
    var row = Int(block_idx.x) * Int(columns)
    var first = Int(thread_idx.x) * width

    @always_inline
    def read[
        source_dtype: DType, //
    ](source: Elements[source_dtype], at: Int) {imm} -> Values:
        return (
            source.unsafe_offset(at)
            .unsafe_load[width=width]()
            .cast[DType.float32]()
        )

    var kept = Values(0)
    var squares = Float32(0)
    for c in range(first, Int(columns), STRIDE):
        var values = read(x, row + c)
        comptime if adds:
            var rounded = (values + read(delta, row + c)).cast[dtype]()
            sum.unsafe_offset(row + c).unsafe_store(rounded)
            values = rounded.cast[DType.float32]()
        squares += (values * values).reduce_add()
        if c == first:
            kept = values
    var scale = rsqrt(block_sum(squares) / Float32(Int(columns)) + eps)
    for c in range(first, Int(columns), STRIDE):
        var values = kept
        if c != first:
            comptime if adds:
                values = read(sum, row + c)
            else:
                values = read(x, row + c)
        values *= scale * (read(weight, c) + offset)
        y.unsafe_offset(row + c).unsafe_store(values.cast[dtype]())


def norm_gpu[
    dtype: DType, delta_dtype: DType, weight_dtype: DType, //, adds: Bool
](
    y: Elements[dtype],
    sum: Elements[dtype],
    x: Elements[dtype],
    delta: Elements[delta_dtype],
    weight: Elements[weight_dtype],
    rows: Int,
    columns: Int,
    eps: Float32,
    offset: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `norm_kernel`."""
    if rows == 0 or columns == 0:
        return

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = norm_kernel[
            dtype, delta_dtype, weight_dtype, adds, width
        ]
        ctx.enqueue_function[kernel](
            y,
            sum,
            x,
            delta,
            weight,
            Int32(columns),
            eps,
            offset,
            grid_dim=rows,
            block_dim=THREADS,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if columns % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()
