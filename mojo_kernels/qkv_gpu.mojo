"""Norms, rotations and cache stores of queries, keys and values on a GPU: a warp a head."""

from max.gpu import WARP_SIZE, block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv, rsqrt

from .heads import HeadForm, Heads
from .operands import Elements

comptime WARPS = 4

comptime WIDTH = 4
"""Elements that a lane reads at once: a head of 128 is one read of a warp."""


@always_inline
def head_gpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool, width: Int
](
    y: Elements[dtype],
    x: Elements[dtype],
    weight: Elements[weight_dtype],
    angles: Elements[DType.float32],
    head_dim: Int,
    form: HeadForm[weight_dtype],
):
    """Norms and rotates one head, `width` elements a lane at a time; the partners are read again, from the cache.
    """
    comptime STRIDE = WARP_SIZE * width
    comptime Values = SIMD[DType.float32, width]
    var first = Int(lane_id()) * width
    var scale = Float32(1)
    comptime if normalize:
        var squares = Float32(0)
        for i in range(first, head_dim, STRIDE):
            var values = read[width](x, i)
            squares += (values * values).reduce_add()
        scale = rsqrt(warp.sum(squares) / Float32(head_dim) + form.eps)

    @always_inline
    def normed(i: Int) {imm} -> Values:
        var values = read[width](x, i)
        comptime if normalize:
            values *= scale * (form.offset + read[width](weight, i))
        return values

    var half = form.half
    for i in range(first, head_dim, STRIDE):
        var values = normed(i)
        if i < half:
            values = values * read[width](angles, i) - normed(i + half) * read[
                width
            ](angles, half + i)
        elif i < 2 * half:
            values = values * read[width](angles, i - half) + normed(
                i - half
            ) * read[width](angles, i)
        y.unsafe_offset(i).unsafe_store(values.cast[dtype]())


@always_inline
def read[
    dtype: DType, //, width: Int
](source: Elements[dtype], at: Int) -> SIMD[DType.float32, width]:
    """Elements in float32."""
    return (
        source.unsafe_offset(at)
        .unsafe_load[width=width]()
        .cast[DType.float32]()
    )


def qkv_kernel[
    dtype: DType, weight_dtype: DType, normalize: Bool, width: Int
](heads: Heads[dtype], form: HeadForm[weight_dtype], tokens: Int32):
    """One head of one token."""
    var token, head = divmod(
        Int(block_idx.x) * WARPS + Int(warp_id()), heads.count()
    )
    wait_on_dependent_grids()
    launch_dependent_grids()
    if token >= Int(tokens):
        return
    var y = heads.target(token, head, heads.request(token))
    var x = heads.source(token, head)
    var angles = form.angles.unsafe_offset(token * 2 * form.half)
    if head < heads.query_heads:
        head_gpu[normalize, width](
            y, x, form.q_weight, angles, heads.head_dim, form
        )
    elif head < heads.query_heads + heads.key_heads:
        head_gpu[normalize, width](
            y, x, form.k_weight, angles, heads.head_dim, form
        )
    else:
        for i in range(
            Int(lane_id()) * width, heads.head_dim, WARP_SIZE * width
        ):
            y.unsafe_offset(i).unsafe_store(
                x.unsafe_offset(i).unsafe_load[width=width]()
            )


def qkv_gpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](
    heads: Heads[dtype],
    form: HeadForm[weight_dtype],
    tokens: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `qkv_kernel`."""

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = qkv_kernel[dtype, weight_dtype, normalize, width]
        ctx.enqueue_function[kernel](
            heads,
            form,
            Int32(tokens),
            grid_dim=ceildiv(tokens * heads.count(), WARPS),
            block_dim=WARPS * WARP_SIZE,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if heads.head_dim % WIDTH == 0 and form.half % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()
