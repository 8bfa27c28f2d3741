"""Dense layers for many tokens on Hopper's tensor cores."""

from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.utils.numerics import inf

from .dense_output_gpu import DenseOutput, LinearOutput, SwigluOutput
from .dense_plan_gpu import MAX_SPLITS, plan_dense
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
    var output = LinearOutput(y, out_features)
    var limit = inf[DType.float32]()
    comptime if dtype == DType.float32:
        # A narrow matrix such as a router's, for which the plan's estimates were not made.
        var splits = float32_splits(
            ceildiv(out_features, TILE_M) * ceildiv(tokens, 64),
            ceildiv(in_features, TILE_K),
            ctx.default_device_info.sm_count,
        )
        if splits > 1:
            return launch_dense_split[LinearOutput[dtype], 64, 4, 2](
                output, x, w, w, tokens, in_features, limit, splits, ctx
            )
    _multiply(output, x, w, w, tokens, in_features, limit, ctx)


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
        SwigluOutput(act, intermediate_size, limit),
        x,
        gate,
        up,
        tokens,
        hidden_size,
        limit,
        ctx,
    )


def _multiply[
    D: DenseOutput
](
    output: D,
    x: BFloats,
    first: BFloats,
    second: BFloats,
    tokens: Int,
    depth: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues the kernel that the plan names."""
    var plan = plan_dense(
        tokens,
        ceildiv(output.features(), TILE_M // D.TENSORS),
        ceildiv(depth, TILE_K),
        TILE_M // D.BOX_ROWS,
        ctx.default_device_info.sm_count,
    )

    def split[width: Int, stages: Int, blocks: Int]() raises {imm}:
        launch_dense_split[D, width, stages, blocks](
            output, x, first, second, tokens, depth, limit, plan.splits, ctx
        )

    def in_pairs[width: Int, stages: Int]() raises {imm}:
        launch_dense_wgmma[D, width, stages](
            output, x, first, second, tokens, depth, limit, ctx
        )

    if plan.width == 64:
        split[64, 4, 2]()
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
