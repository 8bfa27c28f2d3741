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


@always_inline
def head_gpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](
    y: Elements[dtype],
    x: Elements[dtype],
    weight: Elements[weight_dtype],
    angles: Elements[DType.float32],
    head_dim: Int,
    form: HeadForm[weight_dtype],
):
    """Norms and rotates one head; a lane reads its elements' partners again, which lie in the cache.
    """
    var scale = Float32(1)
    comptime if normalize:
        var squares = Float32(0)
        for i in range(Int(lane_id()), head_dim, WARP_SIZE):
            var value = x[unsafe_offset=i].cast[DType.float32]()
            squares += value * value
        scale = rsqrt(warp.sum(squares) / Float32(head_dim) + form.eps)

    @always_inline
    def normed(i: Int) {imm} -> Float32:
        var value = x[unsafe_offset=i].cast[DType.float32]()
        comptime if normalize:
            var w = weight[unsafe_offset=i].cast[DType.float32]()
            value *= scale * (form.offset + w)
        return value

    var half = form.half
    for i in range(Int(lane_id()), head_dim, WARP_SIZE):
        var value = normed(i)
        if i < half:
            value = (
                value * angles[unsafe_offset=i]
                - normed(i + half) * angles[unsafe_offset=half + i]
            )
        elif i < 2 * half:
            value = (
                value * angles[unsafe_offset=i - half]
                + normed(i - half) * angles[unsafe_offset=i]
            )
        y[unsafe_offset=i] = value.cast[dtype]()


def qkv_kernel[
    dtype: DType, weight_dtype: DType, normalize: Bool
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
        head_gpu[normalize](y, x, form.q_weight, angles, heads.head_dim, form)
    elif head < heads.query_heads + heads.key_heads:
        head_gpu[normalize](y, x, form.k_weight, angles, heads.head_dim, form)
    else:
        for i in range(Int(lane_id()), heads.head_dim, WARP_SIZE):
            y[unsafe_offset=i] = x[unsafe_offset=i]


def qkv_gpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](
    heads: Heads[dtype],
    form: HeadForm[weight_dtype],
    tokens: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `qkv_kernel`."""
    comptime kernel = qkv_kernel[dtype, weight_dtype, normalize]
    ctx.enqueue_function[kernel](
        heads,
        form,
        Int32(tokens),
        grid_dim=ceildiv(tokens * heads.count(), WARPS),
        block_dim=WARPS * WARP_SIZE,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
