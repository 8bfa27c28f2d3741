"""Norms, rotations and cache stores of queries, keys and values on a GPU: a warp a head, or a part of one."""

from max.gpu import (
    WARP_SIZE,
    block_idx,
    grid_dim,
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
from std.math import ceildiv, rsqrt
from std.sys import size_of

from .heads import HeadForm, Heads
from .operands import Elements

comptime WARPS = 4

comptime WARP_BITS = 6
"""The most halvings of a warp."""

comptime HEAD_DIM = 128
"""Size of the heads that have a kernel of their own."""

comptime HEADS_AT_ONCE = 4
"""Heads that a part of a warp reads before it writes the first, where there are many tokens."""

comptime PAIRS_A_MULTIPROCESSOR = 1
"""From so many tokens a multiprocessor on, a part of a warp reads two heads at once."""

comptime BLOCKS_A_MULTIPROCESSOR = 16
"""From so many tokens a multiprocessor on, a block takes all heads of its token."""

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
        y.unsafe_offset(i).unsafe_store[alignment=aligned[dtype, width]()](
            values.cast[dtype]()
        )


@always_inline
def read[
    dtype: DType, //, width: Int
](source: Elements[dtype], at: Int) -> SIMD[DType.float32, width]:
    """Elements in float32; `at` is a multiple of `width`."""
    return (
        source.unsafe_offset(at)
        .unsafe_load[width=width, alignment=aligned[dtype, width]()]()
        .cast[DType.float32]()
    )


def aligned[dtype: DType, width: Int]() -> Int:
    """Bytes by which so many elements are aligned in a matrix whose rows are multiples of them.
    """
    return min(width * size_of[dtype](), 16)


@__name(t"step3p5_qkv_{dtype}_{weight_dtype}_{normalize}_{width}")
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
            y.unsafe_offset(i).unsafe_store[alignment=aligned[dtype, width]()](
                x.unsafe_offset(i).unsafe_load[
                    width=width, alignment=aligned[dtype, width]()
                ]()
            )


@__name(t"step3p5_whole_heads_{dtype}_{weight_dtype}_{normalize}_{at_once}")
def whole_heads_kernel[
    dtype: DType, weight_dtype: DType, normalize: Bool, at_once: Int
](heads: Heads[dtype], form: HeadForm[weight_dtype]):
    """Heads of `HEAD_DIM` elements, 16 bytes a lane: `block_idx.x` is the token, `block_idx.y` the share of its heads.

    What lies in the partners of a lane's columns is read a second time, from the cache.
    """
    comptime WIDTH = 16 // size_of[dtype]()
    comptime LANES = HEAD_DIM // WIDTH
    comptime GROUPS = WARPS * WARP_SIZE // LANES
    comptime Values = SIMD[DType.float32, WIDTH]
    var column = Int(thread_idx.x) % LANES * WIDTH
    var step = Int(grid_dim.y) * GROUPS
    var first = Int(block_idx.y) * GROUPS + Int(thread_idx.x) // LANES
    var half = form.half
    var partner = column
    var sign = Float32(0)
    if column < half:
        partner = column + half
        sign = -1
    elif column < 2 * half:
        partner = column - half
        sign = 1
    wait_on_dependent_grids()
    launch_dependent_grids()
    var token = Int(block_idx.x)
    var cosines = Values(1)
    var sines = Values(0)
    if sign != 0:
        var angles = form.angles.unsafe_offset(token * 2 * half)
        cosines = read[WIDTH](angles, min(column, partner))
        sines = sign * read[WIDTH](angles, half + min(column, partner))
    var count = heads.count()
    for begin in range(first, count, step * at_once):
        var own = Array[SIMD[dtype, WIDTH], at_once](fill=0)
        var other = Array[SIMD[dtype, WIDTH], at_once](fill=0)
        comptime for i in range(at_once):
            # All lanes take part in the sums below; what is read twice is stored once.
            var x = heads.source(token, min(begin + i * step, count - 1))
            own[i] = x.unsafe_offset(column).unsafe_load[
                width=WIDTH, alignment=16
            ]()
            other[i] = x.unsafe_offset(partner).unsafe_load[
                width=WIDTH, alignment=16
            ]()
        # While those are on their way; queries do without.
        var request = 0
        if begin + (at_once - 1) * step >= heads.query_heads:
            request = heads.request(token)
        comptime for i in range(at_once):
            var head = begin + i * step
            var values = own[i].cast[DType.float32]()
            var scale = Float32(1)
            comptime if normalize:
                var squares = (values * values).reduce_add()
                comptime for d in range(WARP_BITS):
                    comptime if 1 << d < LANES:
                        squares += warp.shuffle_xor(squares, UInt32(1 << d))
                scale = rsqrt(squares / HEAD_DIM + form.eps)
            var result = own[i]
            if head < heads.query_heads + heads.key_heads:
                var partners = other[i].cast[DType.float32]()
                comptime if normalize:
                    var weight = form.k_weight
                    if head < heads.query_heads:
                        weight = form.q_weight
                    values *= scale * (
                        form.offset + read[WIDTH](weight, column)
                    )
                    partners *= scale * (
                        form.offset + read[WIDTH](weight, partner)
                    )
                if sign != 0:
                    values = values * cosines + partners * sines
                result = values.cast[dtype]()
            if head < count:
                heads.target(token, head, request).unsafe_offset(
                    column
                ).unsafe_store[alignment=16](result)


def qkv_gpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](
    heads: Heads[dtype],
    form: HeadForm[weight_dtype],
    tokens: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues the kernel for heads of this size, and for so many tokens."""
    comptime LANE = 16 // size_of[dtype]()
    if heads.head_dim == HEAD_DIM and form.half % LANE == 0:

        def enqueue_whole[at_once: Int](shares: Int) raises {imm}:
            comptime kernel = whole_heads_kernel[
                dtype, weight_dtype, normalize, at_once
            ]
            ctx.enqueue_function[kernel](
                heads,
                form,
                grid_dim=(tokens, shares),
                block_dim=WARPS * WARP_SIZE,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )

        comptime GROUPS = WARPS * WARP_SIZE * LANE // HEAD_DIM
        var multiprocessors = ctx.default_device_info.sm_count
        if tokens < PAIRS_A_MULTIPROCESSOR * multiprocessors:
            enqueue_whole[1](ceildiv(heads.count(), GROUPS))
        elif tokens < BLOCKS_A_MULTIPROCESSOR * multiprocessors:
            enqueue_whole[2](ceildiv(heads.count(), 2 * GROUPS))
        else:
            enqueue_whole[HEADS_AT_ONCE](1)
        return

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
