"""The gate of every head on a GPU: 16 bytes a thread at a time."""

from max.gpu import block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv, exp, recip
from std.sys import size_of
from std.utils.numerics import isnan

from .operands import Elements

comptime THREADS = 128

comptime AT_ONCE = 4
"""Pieces that a thread reads before it writes the first, where there are many."""

comptime MANY_BLOCKS = 2048
"""Blocks of one piece a thread from which on a thread takes several."""


@always_inline
def gate_factor(gate: Float32) -> Float32:
    """`1 / (1 + exp(-gate))`."""
    # `exp` takes NaN to a number.
    return gate if isnan(gate) else recip(1 + exp(-gate))


@__name(t"step3p5_head_gate_{dtype}_{width}_{at_once}")
def head_gate_kernel[
    dtype: DType, width: Int, at_once: Int
](
    y: Elements[dtype],
    x: Elements[dtype],
    gate: Elements[dtype],
    pieces: Int32,
    pieces_a_head: Int32,
):
    """`y = x * sigmoid(gate of the head)` in pieces of `width` elements."""
    var first = Int32(block_idx.x) * Int32(THREADS * at_once) + Int32(
        thread_idx.x
    )
    wait_on_dependent_grids()
    launch_dependent_grids()
    var values = Array[SIMD[dtype, width], at_once](fill=0)
    var gates = Array[Scalar[dtype], at_once](fill=0)
    comptime for i in range(at_once):
        var piece = min(first + Int32(i * THREADS), pieces - 1)
        values[i] = x.unsafe_offset(Int(piece) * width).unsafe_load[
            width=width, alignment=width * size_of[dtype]()
        ]()
        gates[i] = gate[unsafe_offset=Int(piece // pieces_a_head)]
    comptime for i in range(at_once):
        var piece = first + Int32(i * THREADS)
        if piece < pieces:
            var factor = gate_factor(gates[i].cast[DType.float32]())
            y.unsafe_offset(Int(piece) * width).unsafe_store[
                alignment=width * size_of[dtype]()
            ]((values[i].cast[DType.float32]() * factor).cast[dtype]())


def head_gate_gpu[
    dtype: DType, //
](
    y: Elements[dtype],
    x: Elements[dtype],
    gate: Elements[dtype],
    heads: Int,
    head_dim: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `head_gate_kernel`; `heads` are those of all tokens."""
    if heads * head_dim == 0:
        return

    def enqueue[width: Int, at_once: Int]() raises {imm}:
        var pieces = heads * head_dim // width
        comptime kernel = head_gate_kernel[dtype, width, at_once]
        ctx.enqueue_function[kernel](
            y,
            x,
            gate,
            Int32(pieces),
            Int32(head_dim // width),
            grid_dim=ceildiv(pieces, THREADS * at_once),
            block_dim=THREADS,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    comptime WIDTH = 16 // size_of[dtype]()
    if head_dim % WIDTH != 0:
        enqueue[1, 1]()
    elif heads * head_dim // WIDTH >= MANY_BLOCKS * THREADS:
        enqueue[WIDTH, AT_ONCE]()
    else:
        enqueue[WIDTH, 1]()
