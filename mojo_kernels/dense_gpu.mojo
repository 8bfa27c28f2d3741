"""Dense layers for many tokens on Hopper's tensor cores."""

from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import LinearOutput, SwigluOutput
from .dense_plan_gpu import MAX_SPLITS, plan_dense
from .dense_products_gpu import (
    DenseProducts,
    Linears,
    MOST_LINEARS,
    OneProduct,
)
from .dense_split_gpu import launch_dense_split
from .dense_wgmma_gpu import launch_dense_wgmma
from .grouped_tiles_gpu import TILE_K, TILE_M
from .operands import Elements
from .stream_gpu import BFloats


def dense_fits(in_features: Int, out_features: Int) -> Bool:
    """Whether the kernels can take a matrix of this size."""
    return in_features % 8 == 0 and out_features % 8 == 0


def linear_dense[
    dtype: DType, //
](
    y: Elements[dtype],
    x: BFloats,
    w: BFloats,
    tokens: Int,
    in_features: Int,
    out_features: Int,
    ctx: DeviceContext,
) raises:
    """`y = x w^T`, float32 sums rounded to bfloat16 or as they are."""
    var product = OneProduct(LinearOutput(y, out_features))
    var weights = StaticTuple[BFloats, 1](w)
    comptime if dtype == DType.float32:
        # A narrow matrix such as a router's, for which the plan's estimates were not made.
        var splits = float32_splits(
            ceildiv(out_features, TILE_M) * ceildiv(tokens, 64),
            ceildiv(in_features, TILE_K),
            ctx.default_device_info.sm_count,
        )
        if splits > 1:
            return launch_dense_split[
                OneProduct[LinearOutput[dtype]], 64, 4, 2
            ](product, x, weights, tokens, in_features, splits, ctx)
    _multiply(product, x, weights, tokens, in_features, ctx)


def linears_dense(
    products: Linears,
    x: BFloats,
    weights: StaticTuple[BFloats, MOST_LINEARS],
    tokens: Int,
    in_features: Int,
    ctx: DeviceContext,
) raises:
    """`y_i = x w_i^T` in one launch."""
    _multiply(products, x, weights, tokens, in_features, ctx)


def float32_splits(tiles: Int, steps: Int, multiprocessors: Int) -> Int:
    """Blocks that share a tile's depth, a power of two: as many as occupy every multiprocessor twice.
    """
    var splits = 1
    while (
        splits < MAX_SPLITS
        and 2 * splits <= steps
        and 2 * splits * tiles <= 2 * multiprocessors
    ):
        splits *= 2
    return splits


def swiglu_dense(
    act: BFloats,
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    tokens: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """`act = min(silu(gate x), limit) * clamp(up x, -limit, limit)`."""
    _multiply(
        OneProduct(SwigluOutput(act, intermediate_size, limit)),
        x,
        StaticTuple[BFloats, 2](gate, up),
        tokens,
        hidden_size,
        ctx,
    )


def _multiply[
    P: DenseProducts
](
    products: P,
    x: BFloats,
    weights: StaticTuple[BFloats, P.TENSORS],
    tokens: Int,
    depth: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues the kernel that the plan names."""
    var row_tiles = products.row_tiles()
    var multiprocessors = ctx.default_device_info.sm_count
    var plan = plan_dense(
        tokens,
        row_tiles,
        ceildiv(depth, TILE_K),
        TILE_M // P.Output.BOX_ROWS,
        multiprocessors,
    )

    def split[width: Int, stages: Int, blocks: Int]() raises {imm}:
        launch_dense_split[P, width, stages, blocks](
            products, x, weights, tokens, depth, plan.splits, ctx
        )

    def in_pairs[width: Int, stages: Int]() raises {imm}:
        launch_dense_wgmma[P, width, stages](
            products, x, weights, tokens, depth, ctx
        )

    if plan.width == 64:
        split[64, 4, 2]()
    elif plan.is_alone(tokens, row_tiles, multiprocessors):
        split[128, 6, 1]()
    elif plan.width == 128:
        split[128, 3, 2]()
    elif plan.width == 192 and plan.in_pairs():
        in_pairs[192, 5]()
    elif plan.width == 192:
        split[192, 4, 1]()
    elif plan.in_pairs():
        in_pairs[256, 4]()
    else:
        split[256, 4, 1]()
