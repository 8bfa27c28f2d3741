"""The token of the greatest logit on a GPU: a block a row."""

from max.gpu import barrier, block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.memory import unsafe_stack_allocation
from std.utils.numerics import neg_inf

from .operands import Elements, Floats

comptime THREADS = 512

comptime UNROLL = 4
"""Vectors that a thread requests before it looks at the first."""


def greedy_kernel[
    width: Int
](
    ids: Elements[DType.int64],
    logits: Floats,
    known: Elements[DType.int64],
    vocab_size: Int32,
):
    """Every thread finds the greatest of its own logits, then half of the threads the greater of two, and so on.

    Parameters:
        width: Logits of a vector, a divisor of `vocab_size`.
    """
    var values = unsafe_stack_allocation[
        THREADS, Float32, address_space=AddressSpace.SHARED
    ]()
    var places = unsafe_stack_allocation[
        THREADS, Int32, address_space=AddressSpace.SHARED
    ]()
    wait_on_dependent_grids()
    launch_dependent_grids()
    var thread = Int(thread_idx.x)
    var size = Int(vocab_size)
    var row = logits.unsafe_offset(Int(block_idx.x) * size)
    var end = min(Int(known[unsafe_offset=0]), size)
    var best = neg_inf[DType.float32]()
    var place = Int32(0)
    for first in range(thread * width, end, UNROLL * THREADS * width):
        var vectors = Array[SIMD[DType.float32, width], UNROLL](fill=best)
        comptime for u in range(UNROLL):
            var at = first + u * THREADS * width
            if at < end:
                vectors[u] = row.unsafe_offset(at).unsafe_load[
                    width=width, alignment=4 * width
                ]()
        comptime for u in range(UNROLL):
            comptime for i in range(width):
                var at = first + u * THREADS * width + i
                if at < end and vectors[u][i] > best:
                    best = vectors[u][i]
                    place = Int32(at)
    values[unsafe_offset=thread] = best
    places[unsafe_offset=thread] = place
    var half = THREADS // 2
    while half > 0:
        barrier()
        if thread < half:
            var other = values[unsafe_offset=thread + half]
            var at = places[unsafe_offset=thread + half]
            if other > best or (other == best and at < place):
                best = other
                place = at
                values[unsafe_offset=thread] = best
                places[unsafe_offset=thread] = place
        half //= 2
    if thread == 0:
        ids[unsafe_offset=Int(block_idx.x)] = Int64(place)


def greedy_gpu(
    ids: Elements[DType.int64],
    logits: Floats,
    known: Elements[DType.int64],
    rows: Int,
    vocab_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `greedy_kernel`."""
    if rows == 0:
        return
    comptime for width in [4, 1]:
        if vocab_size % width == 0:
            comptime kernel = greedy_kernel[width]
            ctx.enqueue_function[kernel](
                ids,
                logits,
                known,
                Int32(vocab_size),
                grid_dim=rows,
                block_dim=THREADS,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )
            return
