"""The weighted sum over a token's experts on a GPU, of products that lie in order of expert."""

from max.gpu import block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv

from .operands import Elements, Floats, Ids

comptime THREADS = 128

comptime WIDTH = 8
"""Columns a thread: 16 bytes of the parts."""


@__name("step3p5_grouped_places")
def places_kernel(
    places: Pointer[Int32, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    experts: Int32,
):
    """`places[rows[s]] = s` for all assignments that have an expert here."""
    wait_on_dependent_grids()
    launch_dependent_grids()
    var slot = Int(block_idx.x) * THREADS + Int(thread_idx.x)
    if slot < Int(offsets[unsafe_offset=Int(experts)]):
        places[unsafe_offset=Int(rows[unsafe_offset=slot])] = Int32(slot)


def launch_places(
    places: Ids,
    rows: Ids,
    offsets: Ids,
    experts: Int,
    assignments: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `places_kernel`."""
    ctx.enqueue_function[places_kernel](
        places,
        rows,
        offsets,
        Int32(experts),
        grid_dim=ceildiv(assignments, THREADS),
        block_dim=THREADS,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )


@__name(t"step3p5_grouped_combine_{y_dtype}_{unroll}_{based}")
def combine_gpu[
    y_dtype: DType, unroll: Int, based: Bool
](
    y: Pointer[Scalar[y_dtype], MutAnyOrigin],
    base: Pointer[BFloat16, MutAnyOrigin],
    parts: Pointer[BFloat16, MutAnyOrigin],
    places: Pointer[Int32, MutAnyOrigin],
    weights: Pointer[Float32, MutAnyOrigin],
    top_k: Int32,
    columns: Int32,
    y_columns: Int32,
    begin: Int32,
):
    """`y[t, begin + c] = sum_k weights[t, k] * parts[places[t * K + k], c]`, in the order of k and with `based` upon
    `base[t, begin + c]`: a block is a token's piece of columns.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var c = (Int(block_idx.y) * THREADS + Int(thread_idx.x)) * WIDTH
    if c >= Int(columns):
        return
    var t = Int(block_idx.x)
    var total = SIMD[DType.float32, WIDTH](0)
    var place = t * Int(y_columns) + Int(begin) + c
    comptime if based:
        total = (
            base.unsafe_offset(place)
            .unsafe_load[width=WIDTH, alignment=16]()
            .cast[DType.float32]()
        )
    for k in range(0, Int(top_k), unroll):
        var first = t * Int(top_k) + k
        # All are asked for before the first is looked at. An expert of another device has weight 0 and no place:
        # the first row stands in for its own.
        var scales = Array[Float32, unroll](fill=0)
        var values = Array[SIMD[DType.bfloat16, WIDTH], unroll](fill=0)
        comptime for u in range(unroll):
            scales[u] = weights[unsafe_offset=first + u]
            var row = Int(places[unsafe_offset=first + u])
            row = row if scales[u] != 0 else 0
            values[u] = parts.unsafe_offset(row * Int(columns) + c).unsafe_load[
                width=WIDTH, alignment=16
            ]()
        comptime for u in range(unroll):
            if scales[u] != 0:
                total += scales[u] * values[u].cast[DType.float32]()
    y.unsafe_offset(place).unsafe_store[alignment=16](total.cast[y_dtype]())


def launch_combine[
    y_dtype: DType, //, based: Bool
](
    y: Elements[y_dtype],
    base: Elements[DType.bfloat16],
    parts: Elements[DType.bfloat16],
    places: Ids,
    weights: Floats,
    tokens: Int,
    top_k: Int,
    columns: Int,
    y_columns: Int,
    begin: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues the sum over `parts [T * K, columns]`, found by `places [T * K]`, into columns `begin` ... of
    `y [T, y_columns]`, with `based` upon `base`, of the shape of `y`; both numbers of columns are multiples of 8.
    """
    comptime for unroll in [8, 1]:
        if top_k % unroll == 0:
            comptime kernel = combine_gpu[y_dtype, unroll, based]
            ctx.enqueue_function[kernel](
                y,
                base,
                parts,
                places,
                weights,
                Int32(top_k),
                Int32(columns),
                Int32(y_columns),
                Int32(begin),
                grid_dim=(tokens, ceildiv(columns, THREADS * WIDTH)),
                block_dim=THREADS,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )
            return
