"""Brings tokens in the order of the experts, so that a tile's tokens lie behind one another."""

from max.gpu import block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv

from .operands import Elements, Ids, elements

comptime THREADS = 128

comptime WIDTH = 8
"""Columns a thread: 16 bytes."""

comptime ROWS = 8
"""Rows a block, which a thread reads before it writes the first."""


@__name("step3p5_grouped_sort")
def sort_kernel(
    sorted: Pointer[BFloat16, MutAnyOrigin],
    x: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    begin: Int32,
    end: Int32,
    top_k: Int32,
    columns: Int32,
):
    """`sorted[s - begin] = x[rows[s] // K]` for `begin <= s < end`: a block takes some columns of `ROWS` rows.

    Blocks of the same columns run one after the other, so that those columns of `x` stay in the cache.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var c = (Int(block_idx.y) * THREADS + Int(thread_idx.x)) * WIDTH
    if c >= Int(columns):
        return
    var first = Int(begin) + Int(block_idx.x) * ROWS
    var sources = Array[Int, ROWS](fill=0)
    comptime for i in range(ROWS):
        var slot = min(first + i, Int(end) - 1)
        sources[i] = Int(rows[unsafe_offset=slot] // top_k)
    var values = Array[SIMD[DType.bfloat16, WIDTH], ROWS](fill=0)
    comptime for i in range(ROWS):
        values[i] = x.unsafe_offset(sources[i] * Int(columns) + c).unsafe_load[
            width=WIDTH, alignment=16
        ]()
    comptime for i in range(ROWS):
        if first + i < Int(end):
            sorted.unsafe_offset(
                (first - Int(begin) + i) * Int(columns) + c
            ).unsafe_store[alignment=16](values[i])


def launch_sort(
    sorted: Elements[DType.bfloat16],
    x: Elements[DType.bfloat16],
    rows: Ids,
    begin: Int,
    end: Int,
    top_k: Int,
    columns: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `sort_kernel`; `columns` is a multiple of 8."""
    ctx.enqueue_function[sort_kernel](
        sorted,
        x,
        rows,
        Int32(begin),
        Int32(end),
        Int32(top_k),
        Int32(columns),
        grid_dim=(
            ceildiv(end - begin, ROWS),
            ceildiv(columns, THREADS * WIDTH),
        ),
        block_dim=THREADS,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
