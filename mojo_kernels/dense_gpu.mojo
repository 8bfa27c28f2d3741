"""Dense layers for many tokens on Hopper's tensor cores: the grouped product with one expert that has every token."""

from max.gpu import global_idx
from max.gpu.host import DeviceBuffer, DeviceContext
from std.math import ceildiv

from .grouped_down_gpu import DownProduct, launch_down_wgmma
from .grouped_gate_up_gpu import GateUpProduct, launch_gate_up_wgmma
from .grouped_tiles_gpu import TILE_M
from .operands import Ids
from .stream_gpu import BFloats

comptime THREADS = 256


def dense_fits(in_features: Int, out_features: Int) -> Bool:
    """Whether the kernels can take a matrix of this size."""
    return in_features % 8 == 0 and out_features % 8 == 0


def list_tokens_kernel(rows: Ids, offsets: Ids, tokens: Int32):
    """Every token on expert 0."""
    var token = Int(global_idx.x)
    if token < Int(tokens):
        rows[unsafe_offset=token] = Int32(token)
    if token == 0:
        offsets[unsafe_offset=0] = 0
        offsets[unsafe_offset=1] = tokens


def list_tokens(
    tokens: Int, ctx: DeviceContext
) raises -> DeviceBuffer[DType.int32]:
    """The rows, and the offsets behind them, of one expert that has every token.
    """
    var buffer = ctx.enqueue_create_buffer[DType.int32](tokens + 2)
    var rows = buffer.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    ctx.enqueue_function[list_tokens_kernel](
        rows,
        rows.unsafe_offset(tokens),
        Int32(tokens),
        grid_dim=ceildiv(tokens, THREADS),
        block_dim=THREADS,
    )
    return buffer^


def tile_tokens(
    tokens: Int, out_features: Int, ctx: DeviceContext
) raises -> Int:
    """Most tokens of a tile with which the tiles still occupy every multiprocessor.
    """
    comptime multiprocessors = ctx.default_device_info.sm_count
    for width in [256, 128]:
        if (
            ceildiv(tokens, width) * ceildiv(out_features, TILE_M)
            >= multiprocessors
        ):
            return width
    return 64


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
    var lists = list_tokens(tokens, ctx)
    var rows = lists.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var product = DownProduct(y, x, rows, 0, out_features)

    def enqueue[width: Int, stages: Int]() raises {imm}:
        launch_down_wgmma[width, stages](
            product,
            w,
            rows.unsafe_offset(tokens),
            1,
            out_features,
            in_features,
            ctx,
        )

    var width = tile_tokens(tokens, out_features, ctx)
    if width == 256:
        enqueue[256, 4]()
    elif width == 128:
        enqueue[128, 6]()
    else:
        enqueue[64, 9]()
    _ = (
        lists^
    )  # Kept until the kernels are in the queue; it is freed behind them.


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
    """`act = silu(gate x) * (up x)`."""
    var lists = list_tokens(tokens, ctx)
    var rows = lists.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var product = GateUpProduct(act, x, rows, 1, intermediate_size, limit)

    def enqueue[width: Int, stages: Int]() raises {imm}:
        launch_gate_up_wgmma[width, stages](
            product,
            gate,
            up,
            rows.unsafe_offset(tokens),
            1,
            hidden_size,
            ctx,
        )

    var width = tile_tokens(tokens, 2 * intermediate_size, ctx)
    if width == 256:
        enqueue[256, 4]()
    elif width == 128:
        enqueue[128, 6]()
    else:
        enqueue[64, 9]()
    _ = lists^
