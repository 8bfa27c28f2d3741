"""Which path multiplies on a GPU, by its kind, the operands' types and sizes, and measured numbers of tokens."""

from max.gpu.host import DeviceContext

from std.utils.static_tuple import StaticTuple

from .dense_gpu import dense_fits, linear_dense, linears_dense, swiglu_dense
from .dense_products_gpu import Linears, MOST_LINEARS
from .down_gpu import SharedDown, down_fits, down_stream
from .gate_up_gpu import (
    SharedGateUp,
    gate_up_fits,
    gate_up_stream,
    swiglu_stream,
)
from .grouped_gpu import down_grouped, gate_up_grouped
from .linear_gpu import MATRICES, linear_fits, linear_stream
from .narrow_gpu import blocks_needed, linear_narrow, narrow_fits
from .operands import Elements, Floats, Ids
from .plain_gpu import down_plain, gate_up_plain, linear_plain, swiglu_plain
from .stream_gpu import BFloats

comptime GROUPED_FROM_TOKENS = 12
"""From so many tokens on, the experts run as a grouped matrix product; below, their weights are streamed (on an H100).
"""

comptime DENSE_FROM_TOKENS = 33
"""From so many tokens on, dense products run through WGMMA; below, their weights are streamed."""

comptime WIDE_FROM_TOKENS = 17
"""Likewise where there are more results than input features: blocks enough without sharing the depth."""

comptime DENSE_SWIGLU_FROM_TOKENS = 17
comptime WIDE_SWIGLU_FROM_TOKENS = 9
"""Likewise a dense layer's first half, whose two matrices leave a streaming warp less time for each token."""

comptime NARROW_TO_BLOCKS = 160
"""Up to so many blocks, a product has its weights in registers before the tokens are there: 288 rows, the router's, take
144 for 64 tokens. WGMMA is 2 microseconds faster for 64 (on an H200), but up to there a token has the same bits in any
batch."""

comptime BF16 = DType.bfloat16


@always_inline
def prefer_grouped(tokens: Int, ctx: DeviceContext) -> Bool:
    """Whether there are enough tokens for the grouped product; without WGMMA it is a plain kernel, and never preferred.
    """
    comptime if ctx.default_device_info.compute == 9.0:
        return tokens >= GROUPED_FROM_TOKENS
    else:
        return False


def prefer_dense(tokens: Int, in_features: Int, out_features: Int) -> Bool:
    """Whether there are enough tokens for WGMMA."""
    if out_features > in_features:
        return tokens >= WIDE_FROM_TOKENS
    return tokens >= DENSE_FROM_TOKENS


def prefer_dense_swiglu(
    tokens: Int, hidden_size: Int, intermediate_size: Int
) -> Bool:
    """As `prefer_dense`, for a dense layer's first half."""
    if intermediate_size > hidden_size:
        return tokens >= WIDE_SWIGLU_FROM_TOKENS
    return tokens >= DENSE_SWIGLU_FROM_TOKENS


def prefer_narrow(tokens: Int, in_features: Int, out_features: Int) -> Bool:
    """Whether a product has its weights in registers before the tokens are there.
    """
    return (
        narrow_fits(in_features, out_features)
        and blocks_needed(tokens, out_features) <= NARROW_TO_BLOCKS
    )


def gate_up_gpu[
    x_dtype: DType, dtype: DType, act_dtype: DType
](
    act: Elements[act_dtype],
    x: Elements[x_dtype],
    gate: Elements[dtype],
    up: Elements[dtype],
    rows: Ids,
    offsets: Ids,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    shared_act: Elements[act_dtype],
    shared_gate: Elements[dtype],
    shared_up: Elements[dtype],
    shared_size: Int,
    shared_limit: Float32,
    ctx: DeviceContext,
) raises:
    """The experts' first half, and that of a shared expert unless `shared_size` is 0: see `step3p5_moe_gate_up` and
    `step3p5_moe_gate_up_shared`.
    """
    comptime if x_dtype == BF16 and dtype == BF16 and act_dtype == BF16:
        comptime if ctx.default_device_info.api == "cuda":
            if (
                gate_up_fits(hidden_size, intermediate_size, experts)
                and gate_up_fits(hidden_size, shared_size, 1)
                and not prefer_grouped(tokens, ctx)
            ):
                return gate_up_stream(
                    act,
                    rebind[BFloats](x),
                    rebind[BFloats](gate),
                    rebind[BFloats](up),
                    rows,
                    offsets,
                    tokens,
                    top_k,
                    experts,
                    hidden_size,
                    intermediate_size,
                    limit,
                    SharedGateUp[act_dtype](
                        shared_act,
                        rebind[BFloats](shared_gate),
                        rebind[BFloats](shared_up),
                        shared_size,
                        shared_limit,
                    ),
                    ctx,
                )
        gate_up_grouped(
            rebind[BFloats](act),
            rebind[BFloats](x),
            rebind[BFloats](gate),
            rebind[BFloats](up),
            rows,
            offsets,
            tokens,
            top_k,
            experts,
            hidden_size,
            intermediate_size,
            limit,
            ctx,
        )
    else:
        gate_up_plain(
            act,
            x,
            gate,
            up,
            rows,
            offsets,
            tokens * top_k,
            top_k,
            experts,
            hidden_size,
            intermediate_size,
            limit,
            ctx,
        )
    if shared_size > 0:
        swiglu_gpu(
            shared_act,
            x,
            shared_gate,
            shared_up,
            tokens,
            hidden_size,
            shared_size,
            shared_limit,
            ctx,
        )


def down_gpu[
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
    shared_act: Elements[act_dtype],
    shared_down: Elements[dtype],
    shared_size: Int,
    ctx: DeviceContext,
) raises:
    """The experts' second half, upon that of a shared expert unless `shared_size` is 0: see `step3p5_moe_down` and
    `step3p5_moe_down_shared`.
    """
    comptime if act_dtype == BF16 and dtype == BF16:
        comptime if ctx.default_device_info.api == "cuda":
            if (
                down_fits(tokens, hidden_size, intermediate_size, experts)
                and down_fits(tokens, hidden_size, shared_size, 1)
                and not prefer_grouped(tokens, ctx)
            ):
                return down_stream(
                    y,
                    rebind[BFloats](act),
                    rebind[BFloats](down),
                    rows,
                    offsets,
                    weights,
                    tokens,
                    top_k,
                    experts,
                    hidden_size,
                    intermediate_size,
                    SharedDown(
                        rebind[BFloats](shared_act),
                        rebind[BFloats](shared_down),
                        shared_size,
                    ),
                    ctx,
                )
        if hidden_size % 8 == 0:

            def grouped[based: Bool](base: BFloats) raises {imm}:
                down_grouped[based](
                    y,
                    base,
                    rebind[BFloats](act),
                    rebind[BFloats](down),
                    rows,
                    offsets,
                    weights,
                    tokens,
                    top_k,
                    experts,
                    hidden_size,
                    intermediate_size,
                    ctx,
                )

            if shared_size == 0:
                return grouped[False](rebind[BFloats](act))
            var buffer = ctx.enqueue_create_buffer[BF16](tokens * hidden_size)
            var base = buffer.unsafe_ptr().unsafe_origin_cast[
                MutUntrackedOrigin
            ]()
            linear_gpu(
                base,
                rebind[BFloats](shared_act),
                rebind[BFloats](shared_down),
                tokens,
                shared_size,
                hidden_size,
                ctx,
            )
            grouped[True](base)
            _ = buffer^
            return
    if shared_size > 0:
        raise Error(
            "step3p5_moe_down_shared: found other types than bfloat16, or a"
            " hidden size that is no multiple of 8; expected both, or"
            " step3p5_moe_down and a shared expert beside it"
        )
    down_plain(
        y,
        act,
        down,
        rows,
        offsets,
        weights,
        tokens,
        top_k,
        experts,
        hidden_size,
        intermediate_size,
        ctx,
    )


def swiglu_gpu[
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
    """A dense layer's first half: see `step3p5_swiglu`."""
    comptime if (
        ctx.default_device_info.compute == 9.0
        and x_dtype == BF16
        and dtype == BF16
        and act_dtype == BF16
    ):
        if prefer_dense_swiglu(
            tokens, hidden_size, intermediate_size
        ) and dense_fits(hidden_size, intermediate_size):
            return swiglu_dense(
                rebind[BFloats](act),
                rebind[BFloats](x),
                rebind[BFloats](gate),
                rebind[BFloats](up),
                tokens,
                hidden_size,
                intermediate_size,
                limit,
                ctx,
            )
    comptime if (
        ctx.default_device_info.api == "cuda"
        and x_dtype == BF16
        and dtype == BF16
    ):
        if gate_up_fits(hidden_size, intermediate_size, 1):
            return swiglu_stream(
                act,
                rebind[BFloats](x),
                rebind[BFloats](gate),
                rebind[BFloats](up),
                tokens,
                hidden_size,
                intermediate_size,
                limit,
                ctx,
            )
    swiglu_plain(
        act, x, gate, up, tokens, hidden_size, intermediate_size, limit, ctx
    )


def linear_gpu[
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
    """A dense product: see `step3p5_linear`."""
    comptime if (
        ctx.default_device_info.api == "cuda"
        and x_dtype == BF16
        and dtype == BF16
    ):
        if prefer_narrow(tokens, in_features, out_features):
            return linear_narrow(
                y,
                rebind[BFloats](x),
                rebind[BFloats](w),
                tokens,
                in_features,
                out_features,
                ctx,
            )
    comptime if (
        ctx.default_device_info.compute == 9.0
        and x_dtype == BF16
        and dtype == BF16
        and (y_dtype == BF16 or y_dtype == DType.float32)
    ):
        if prefer_dense(tokens, in_features, out_features) and dense_fits(
            in_features, out_features
        ):
            return linear_dense(
                y,
                rebind[BFloats](x),
                rebind[BFloats](w),
                tokens,
                in_features,
                out_features,
                ctx,
            )
    comptime if (
        ctx.default_device_info.api == "cuda"
        and x_dtype == BF16
        and dtype == BF16
    ):
        if linear_fits(in_features, out_features):
            var matrix = rebind[BFloats](w)
            return linear_stream(
                StaticTuple[Elements[y_dtype], MATRICES](fill=y),
                rebind[BFloats](x),
                StaticTuple[BFloats, MATRICES](fill=matrix),
                tokens,
                in_features,
                StaticTuple[Int, MATRICES](out_features, 0, 0, 0),
                ctx,
            )
    linear_plain(y, x, w, tokens, in_features, out_features, ctx)


def linear4_gpu[
    x_dtype: DType, dtype: DType
](
    y: StaticTuple[Elements[x_dtype], MATRICES],
    x: Elements[x_dtype],
    w: StaticTuple[Elements[dtype], MATRICES],
    tokens: Int,
    in_features: Int,
    out_features: StaticTuple[Int, MATRICES],
    ctx: DeviceContext,
) raises:
    """Dense products of the same tokens: one launch where they are streamed, one of those that WGMMA takes, else one for
    each matrix.
    """
    comptime if (
        ctx.default_device_info.api == "cuda"
        and x_dtype == BF16
        and dtype == BF16
    ):
        var fit = True
        for i in range(MATRICES):
            fit = fit and linear_fits(in_features, out_features[i])
        if fit and tokens < WIDE_FROM_TOKENS:
            return linear_stream(
                rebind[StaticTuple[BFloats, MATRICES]](y),
                rebind[BFloats](x),
                rebind[StaticTuple[BFloats, MATRICES]](w),
                tokens,
                in_features,
                out_features,
                ctx,
            )
    comptime if (
        ctx.default_device_info.compute == 9.0
        and x_dtype == BF16
        and dtype == BF16
    ):
        if tokens >= WIDE_FROM_TOKENS:
            return _linear4_dense(
                rebind[StaticTuple[BFloats, MATRICES]](y),
                rebind[BFloats](x),
                rebind[StaticTuple[BFloats, MATRICES]](w),
                tokens,
                in_features,
                out_features,
                ctx,
            )
    for i in range(MATRICES):
        if out_features[i] > 0:
            linear_gpu(y[i], x, w[i], tokens, in_features, out_features[i], ctx)


def _linear4_dense(
    y: StaticTuple[BFloats, MATRICES],
    x: BFloats,
    w: StaticTuple[BFloats, MATRICES],
    tokens: Int,
    in_features: Int,
    out_features: StaticTuple[Int, MATRICES],
    ctx: DeviceContext,
) raises:
    """`linear4_gpu` where WGMMA takes what is not narrow: as many as one launch can, behind the others.
    """
    var count = 0
    var results = StaticTuple[BFloats, MOST_LINEARS](fill=y[0])
    # Where there is no product, something to make a map of.
    var weights = StaticTuple[BFloats, MOST_LINEARS](fill=x)
    var features = StaticTuple[Int, MOST_LINEARS](fill=0)
    for i in range(MATRICES):
        if (
            count < MOST_LINEARS
            and out_features[i] > 0
            and dense_fits(in_features, out_features[i])
            and not prefer_narrow(tokens, in_features, out_features[i])
        ):
            results[count] = y[i]
            weights[count] = w[i]
            features[count] = out_features[i]
            count += 1
        elif out_features[i] > 0:
            linear_gpu(y[i], x, w[i], tokens, in_features, out_features[i], ctx)
    if count > 0:
        linears_dense(
            Linears(results, features), x, weights, tokens, in_features, ctx
        )
