"""Dense layers for many tokens on Hopper's tensor cores."""

from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.utils.numerics import inf

from .dense_output_gpu import DenseOutput, LinearOutput, SwigluOutput
from .dense_plan_gpu import plan_dense
from .dense_split_gpu import launch_dense_split
from .dense_wgmma_gpu import launch_dense_wgmma
from .grouped_tiles_gpu import TILE_K, TILE_M
from .stream_gpu import BFloats


def dense_fits(in_features: Int, out_features: Int) -> Bool:
    """Whether the kernels can take a matrix of this size."""
    return in_features % 8 == 0 and out_features % 8 == 0


def linear_dense(
    y: BFloats,
    x: BFloats,
    w: BFloats,
    tokens: Int,
    in_features: Int,
    out_features: Int,
    ctx: DeviceContext,
) raises:
    """`y = x w^T`, float32 sums rounded to bfloat16."""
    _multiply(
        LinearOutput(y, out_features),
        x,
        w,
        w,
        tokens,
        in_features,
        inf[DType.float32](),
        ctx,
    )


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
        ctx.default_device_info.sm_count,
    )

    def split[width: Int, stages: Int, blocks: Int]() raises {imm}:
        launch_dense_split[D, width, stages, blocks](
            output, x, first, second, tokens, depth, limit, plan.splits, ctx
        )

    if plan.width == 64:
        split[64, 4, 2]()
    elif plan.width == 128:
        split[128, 3, 2]()
    elif plan.splits > 1:
        split[256, 4, 1]()
    else:
        launch_dense_wgmma[D, 256, 4](
            output, x, first, second, tokens, depth, limit, ctx
        )
