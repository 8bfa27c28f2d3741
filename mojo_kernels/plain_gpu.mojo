"""The products of experts and dense layers on any GPU and for any types and sizes: a warp for every sum.

The path where no faster one applies.
"""

from max.gpu import WARP_SIZE, block_idx, global_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from std.math import ceildiv, fma

from .activation import activate
from .operands import Elements, Floats, Ids

comptime WARPS = 4
"""Warps of a block."""

comptime TOKENS = 8
"""Tokens that a warp multiplies with a row of a dense matrix at once."""


@always_inline
def warp_dots[
    x_dtype: DType, dtype: DType, //, width: Int, tokens: Int
](x: Elements[x_dtype], w: Elements[dtype], depth: Int, count: Int) -> Array[
    Float32, tokens
]:
    """The products of a row of weights with `count <= tokens` rows of `x`, the same in all lanes.

    Parameters:
        x_dtype: Type of the tokens' values.
        dtype: Type of the weights.
        width: Elements that a lane reads at once, a divisor of `depth`.
        tokens: Most rows of `x`.
    """
    var sums = Array[SIMD[DType.float32, width], tokens](fill=0)
    for k in range(Int(lane_id()) * width, depth, WARP_SIZE * width):
        var weights = (
            w.unsafe_offset(k).unsafe_load[width=width]().cast[DType.float32]()
        )
        comptime for i in range(tokens):
            if i < count:
                var values = (
                    x.unsafe_offset(i * depth + k)
                    .unsafe_load[width=width]()
                    .cast[DType.float32]()
                )
                sums[i] = fma(values, weights, sums[i])
    var dots = Array[Float32, tokens](fill=0)
    comptime for i in range(tokens):
        dots[i] = warp.sum(sums[i].reduce_add())
    return dots^


@always_inline
def warp_dot[
    x_dtype: DType, dtype: DType, //, width: Int
](x: Elements[x_dtype], w: Elements[dtype], depth: Int) -> Float32:
    """The product of a row of weights with one row of `x`."""
    return warp_dots[width, 1](x, w, depth, 1)[0]


@always_inline
def warp_row() -> Int:
    """The warp's row of weights: blocks in `y` have `WARPS` each."""
    return Int(block_idx.y) * WARPS + Int(warp_id())


@always_inline
def expert_of(offsets: Ids, experts: Int, slot: Int) -> Int:
    """The last expert whose first slot is not above `slot`."""
    var low = 0
    var high = experts
    while high - low > 1:
        var middle = (low + high) // 2
        if Int(offsets[unsafe_offset=middle]) <= slot:
            low = middle
        else:
            high = middle
    return low


@__name(t"step3p5_gate_up_plain_{x_dtype}_{dtype}_{act_dtype}_{width}")
def gate_up_plain_gpu[
    x_dtype: DType, dtype: DType, act_dtype: DType, width: Int
](
    act: Elements[act_dtype],
    x: Elements[x_dtype],
    gate: Elements[dtype],
    up: Elements[dtype],
    rows: Ids,
    offsets: Ids,
    top_k: Int32,
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    limit: Float32,
):
    """`act[slot, m]`; blocks in `x` are slots."""
    var m = warp_row()
    if m >= Int(intermediate_size):
        return
    var slot = Int(block_idx.x)
    var expert = expert_of(offsets, Int(experts), slot)
    var depth = Int(hidden_size)
    var values = x.unsafe_offset(Int(rows[unsafe_offset=slot] // top_k) * depth)
    var row = (expert * Int(intermediate_size) + m) * depth
    var g = warp_dot[width](values, gate.unsafe_offset(row), depth)
    var u = warp_dot[width](values, up.unsafe_offset(row), depth)
    if lane_id() == 0:
        act[unsafe_offset=slot * Int(intermediate_size) + m] = activate(
            g, u, limit
        ).cast[act_dtype]()


@__name(t"step3p5_swiglu_plain_{x_dtype}_{dtype}_{act_dtype}_{width}")
def swiglu_plain_gpu[
    x_dtype: DType, dtype: DType, act_dtype: DType, width: Int
](
    act: Elements[act_dtype],
    x: Elements[x_dtype],
    gate: Elements[dtype],
    up: Elements[dtype],
    hidden_size: Int32,
    intermediate_size: Int32,
    limit: Float32,
):
    """`act[t, m]`; blocks in `x` are tokens."""
    var m = warp_row()
    if m >= Int(intermediate_size):
        return
    var token = Int(block_idx.x)
    var depth = Int(hidden_size)
    var values = x.unsafe_offset(token * depth)
    var g = warp_dot[width](values, gate.unsafe_offset(m * depth), depth)
    var u = warp_dot[width](values, up.unsafe_offset(m * depth), depth)
    if lane_id() == 0:
        act[unsafe_offset=token * Int(intermediate_size) + m] = activate(
            g, u, limit
        ).cast[act_dtype]()


@__name("step3p5_invert")
def invert_gpu(slots: Ids, rows: Ids, count: Int32):
    """`slots[rows[s]] = s`."""
    var slot = Int(global_idx.x)
    if slot < Int(count):
        slots[unsafe_offset=Int(rows[unsafe_offset=slot])] = Int32(slot)


@__name(t"step3p5_down_plain_{act_dtype}_{dtype}_{y_dtype}_{width}")
def down_plain_gpu[
    act_dtype: DType, dtype: DType, y_dtype: DType, width: Int
](
    y: Elements[y_dtype],
    act: Elements[act_dtype],
    down: Elements[dtype],
    slots: Ids,
    offsets: Ids,
    weights: Floats,
    top_k: Int32,
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
):
    """`y[t, h]`, summed in the order of a token's choices; blocks in `x` are tokens.
    """
    var h = warp_row()
    if h >= Int(hidden_size):
        return
    var token = Int(block_idx.x)
    var depth = Int(intermediate_size)
    var total = Float32(0)
    for k in range(Int(top_k)):
        var assignment = token * Int(top_k) + k
        var slot = Int(slots[unsafe_offset=assignment])
        var expert = expert_of(offsets, Int(experts), slot)
        var row = (expert * Int(hidden_size) + h) * depth
        var dot = warp_dot[width](
            act.unsafe_offset(slot * depth), down.unsafe_offset(row), depth
        )
        total = fma(weights[unsafe_offset=assignment], dot, total)
    if lane_id() == 0:
        y[unsafe_offset=token * Int(hidden_size) + h] = total.cast[y_dtype]()


@__name(t"step3p5_linear_plain_{x_dtype}_{dtype}_{y_dtype}_{width}")
def linear_plain_gpu[
    x_dtype: DType, dtype: DType, y_dtype: DType, width: Int
](
    y: Elements[y_dtype],
    x: Elements[x_dtype],
    w: Elements[dtype],
    tokens: Int32,
    in_features: Int32,
    out_features: Int32,
):
    """`y[t, n]`; blocks in `x` have `TOKENS` tokens each."""
    var n = warp_row()
    if n >= Int(out_features):
        return
    var first = Int(block_idx.x) * TOKENS
    var count = min(Int(tokens) - first, TOKENS)
    var depth = Int(in_features)
    var dots = warp_dots[width, TOKENS](
        x.unsafe_offset(first * depth), w.unsafe_offset(n * depth), depth, count
    )
    comptime for i in range(TOKENS):
        if i < count and lane_id() == 0:
            y[unsafe_offset=(first + i) * Int(out_features) + n] = dots[i].cast[
                y_dtype
            ]()


comptime WIDTH = 4
"""Elements that a lane reads at once where the depth is a multiple of it."""


def gate_up_plain[
    x_dtype: DType, dtype: DType, act_dtype: DType
](
    act: Elements[act_dtype],
    x: Elements[x_dtype],
    gate: Elements[dtype],
    up: Elements[dtype],
    rows: Ids,
    offsets: Ids,
    slots: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `gate_up_plain_gpu`."""

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = gate_up_plain_gpu[x_dtype, dtype, act_dtype, width]
        ctx.enqueue_function[kernel](
            act,
            x,
            gate,
            up,
            rows,
            offsets,
            Int32(top_k),
            Int32(experts),
            Int32(hidden_size),
            Int32(intermediate_size),
            limit,
            grid_dim=(slots, ceildiv(intermediate_size, WARPS)),
            block_dim=WARPS * WARP_SIZE,
        )

    if hidden_size % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()


def swiglu_plain[
    x_dtype: DType, dtype: DType, act_dtype: DType
](
    act: Elements[act_dtype],
    x: Elements[x_dtype],
    gate: Elements[dtype],
    up: Elements[dtype],
    tokens: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `swiglu_plain_gpu`."""

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = swiglu_plain_gpu[x_dtype, dtype, act_dtype, width]
        ctx.enqueue_function[kernel](
            act,
            x,
            gate,
            up,
            Int32(hidden_size),
            Int32(intermediate_size),
            limit,
            grid_dim=(tokens, ceildiv(intermediate_size, WARPS)),
            block_dim=WARPS * WARP_SIZE,
        )

    if hidden_size % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()


def down_plain[
    act_dtype: DType, dtype: DType, y_dtype: DType
](
    y: Elements[y_dtype],
    act: Elements[act_dtype],
    down: Elements[dtype],
    rows: Ids,
    offsets: Ids,
    weights: Floats,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `invert_gpu` and `down_plain_gpu`."""
    var count = tokens * top_k
    var buffer = ctx.enqueue_create_buffer[DType.int32](max(count, 1))
    var slots = buffer.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    comptime threads = 256
    if count > 0:
        ctx.enqueue_function[invert_gpu](
            slots,
            rows,
            Int32(count),
            grid_dim=ceildiv(count, threads),
            block_dim=threads,
        )

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = down_plain_gpu[act_dtype, dtype, y_dtype, width]
        ctx.enqueue_function[kernel](
            y,
            act,
            down,
            slots,
            offsets,
            weights,
            Int32(top_k),
            Int32(experts),
            Int32(hidden_size),
            Int32(intermediate_size),
            grid_dim=(tokens, ceildiv(hidden_size, WARPS)),
            block_dim=WARPS * WARP_SIZE,
        )

    if intermediate_size % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()
    _ = (
        buffer^
    )  # Kept until the kernels are in the queue; it is freed behind them.


def linear_plain[
    x_dtype: DType, dtype: DType, y_dtype: DType
](
    y: Elements[y_dtype],
    x: Elements[x_dtype],
    w: Elements[dtype],
    tokens: Int,
    in_features: Int,
    out_features: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `linear_plain_gpu`."""

    def enqueue[width: Int]() raises {imm}:
        comptime kernel = linear_plain_gpu[x_dtype, dtype, y_dtype, width]
        ctx.enqueue_function[kernel](
            y,
            x,
            w,
            Int32(tokens),
            Int32(in_features),
            Int32(out_features),
            grid_dim=(ceildiv(tokens, TOKENS), ceildiv(out_features, WARPS)),
            block_dim=WARPS * WARP_SIZE,
        )

    if in_features % WIDTH == 0:
        enqueue[WIDTH]()
    else:
        enqueue[1]()
