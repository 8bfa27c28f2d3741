"""Root-mean-square norm of rows on a GPU, alone or of a sum: a block a row."""

from max.gpu import (
    WARP_SIZE,
    barrier,
    block_idx,
    lane_id,
    thread_idx,
    warp_id,
)
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
from .qkv_gpu import aligned, read

comptime THREADS = 512

comptime WIDTH = 8
"""Elements that a thread reads at once: a row of 4096 is one read of a block.
"""


@always_inline
def write[
    dtype: DType, //, width: Int
](target: Elements[dtype], at: Int, values: SIMD[dtype, width]):
    """Elements from `at` on, a multiple of `width`."""
    target.unsafe_offset(at).unsafe_store[alignment=aligned[dtype, width]()](
        values
    )


@__name(t"step3p5_norm_{dtype}_{delta_dtype}_{weight_dtype}_{adds}_{width}")
def norm_kernel[
    dtype: DType,
    delta_dtype: DType,
    weight_dtype: DType,
    adds: Bool,
    width: Int,
](
    y: Elements[dtype],
    total: Elements[dtype],
    x: Elements[dtype],
    delta: Elements[delta_dtype],
    weight: Elements[weight_dtype],
    size: Int32,
    eps: Float32,
    offset: Float32,
):
    """Norms `x`, or `total = x + delta`, whose rounded values count.

    Parameters:
        dtype: Type of the rows.
        delta_dtype: Type of what is added.
        weight_dtype: Type of the weights.
        adds: Whether there is a sum; `total` and `delta` go unused without.
        width: Elements of a vector, a divisor of `size`.
    """
    comptime Values = SIMD[DType.float32, width]
    comptime STRIDE = THREADS * width
    var shares = unsafe_stack_allocation[
        THREADS // WARP_SIZE, Float32, address_space=AddressSpace.SHARED
    ]()
    var first = Int(thread_idx.x) * width
    var end = Int(size)
    var row = Int(block_idx.x) * end
    var source = x
    comptime if adds:
        source = total
    # A thread's first vector stays in registers, and its weights do not depend on the preceding kernel.
    var own = Values(0)
    var own_scale = Values(0)
    if first < end:
        own_scale = read[width](weight, first) + offset
    wait_on_dependent_grids()
    launch_dependent_grids()
    var squares = Float32(0)
    for at in range(first, end, STRIDE):
        var values = read[width](x, row + at)
        comptime if adds:
            var sum = (values + read[width](delta, row + at)).cast[dtype]()
            write(total, row + at, sum)
            values = sum.cast[DType.float32]()
        squares += (values * values).reduce_add()
        if at == first:
            own = values
    squares = warp.sum(squares)
    if lane_id() == 0:
        shares[unsafe_offset=Int(warp_id())] = squares
    barrier()
    squares = 0
    comptime for w in range(THREADS // WARP_SIZE):
        squares += shares[unsafe_offset=w]
    var scale = rsqrt(squares / Float32(end) + eps)
    if first < end:
        write(y, row + first, (own * scale * own_scale).cast[dtype]())
    for at in range(first + STRIDE, end, STRIDE):
        var values = read[width](source, row + at) * scale
        values *= read[width](weight, at) + offset
        write(y, row + at, values.cast[dtype]())


def norm_gpu[
    dtype: DType, delta_dtype: DType, weight_dtype: DType, //, adds: Bool
](
    y: Elements[dtype],
    total: Elements[dtype],
    x: Elements[dtype],
    delta: Elements[delta_dtype],
    weight: Elements[weight_dtype],
    tokens: Int,
    size: Int,
    eps: Float32,
    offset: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `norm_kernel` for `tokens` rows of `size` elements."""
    if tokens == 0:
        return
    comptime for width in [WIDTH, 1]:
        if size % width == 0:
            comptime kernel = norm_kernel[
                dtype, delta_dtype, weight_dtype, adds, width
            ]
            ctx.enqueue_function[kernel](
                y,
                total,
                x,
                delta,
                weight,
                Int32(size),
                eps,
                offset,
                grid_dim=tokens,
                block_dim=THREADS,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )
            return
