"""The experts on a GPU for many tokens, grouped by expert: kernels by the GPU's kind and the number of tokens."""

from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.utils.numerics import inf

from .dense_output_gpu import DenseOutput, LinearOutput, SwigluOutput
from .grouped_combine_gpu import launch_combine, launch_places
from .grouped_plain_gpu import launch_down_plain, launch_gate_up_plain
from .grouped_sort_gpu import launch_sort
from .grouped_tiles_gpu import TILE_M
from .grouped_wgmma_gpu import (
    GroupedShape,
    launch_grouped_wgmma,
)
from .operands import Elements, Floats, Ids

comptime BFloats = Elements[DType.bfloat16]

comptime PARTS_BYTES = 256 * 1024 * 1024
"""Most memory for the products of all assignments that wait for their sum."""

comptime SORTED_BYTES = 512 * 1024 * 1024
"""Most memory for tokens in the order of the experts."""

comptime FEW_TOKENS = 768
"""Up to so many tokens, 64 columns of tokens a tile leave most room for weights on their way."""

comptime MANY_TOKENS = 3072
"""From so many tokens on, tiles of 256 columns."""

comptime SHARERS = 2
"""Blocks of a cluster that share an expert's tokens."""

comptime FEW_BOX = 32
"""Tokens that one copy brings, up to `FEW_TOKENS`."""

comptime MIDDLE_BOX = 32
"""Likewise between `FEW_TOKENS` and `MANY_TOKENS`."""

comptime MANY_BOX = 64
"""Likewise from `MANY_TOKENS` on."""


def gate_up_grouped(
    act: BFloats,
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    rows: Ids,
    offsets: Ids,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """`act[s] = min(silu(gate_e x_t), L) * clamp(up_e x_t, -L, L)` for assignment `rows[s]` of token t to expert e.

    Args:
        act: Result `[T * K, M]`, in the order of `rows`.
        x: Tokens `[T, H]`.
        gate: Gate matrices `[E, M, H]`.
        up: Up matrices `[E, M, H]`.
        rows: Assignments `t * K + k` grouped by expert `[T * K]`.
        offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
        tokens: `T`.
        top_k: `K`.
        experts: `E`.
        hidden_size: `H`.
        intermediate_size: `M`.
        limit: `L > 0`; 0 or infinite: no limit.
        ctx: The device.
    """
    if tokens * top_k == 0:
        return
    var bound = limit if limit > 0 else inf[DType.float32]()
    comptime if ctx.default_device_info.compute == 9.0:
        if hidden_size % 8 == 0 and intermediate_size % 8 == 0:
            _gate_up_wgmma(
                SwigluOutput(act, intermediate_size, bound),
                x,
                gate,
                up,
                rows,
                offsets,
                tokens,
                top_k,
                experts,
                hidden_size,
                ctx,
            )
            return
    launch_gate_up_plain(
        act,
        x,
        gate,
        up,
        rows,
        offsets,
        top_k,
        experts,
        hidden_size,
        intermediate_size,
        bound,
        ctx,
    )


def _gate_up_wgmma(
    output: SwigluOutput,
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    rows: Ids,
    offsets: Ids,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    ctx: DeviceContext,
) raises:
    """The activations of as many assignments at a time as their tokens in order of expert fit `SORTED_BYTES`.
    """
    var assignments = tokens * top_k
    var each = min(SORTED_BYTES // (hidden_size * 2), assignments)
    var buffer = ctx.enqueue_create_buffer[DType.bfloat16](each * hidden_size)
    var sorted = buffer.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    for begin in range(0, assignments, each):
        var end = min(begin + each, assignments)
        launch_sort(sorted, x, rows, begin, end, top_k, hidden_size, ctx)
        _multiply(
            output,
            offsets,
            gate,
            up,
            sorted,
            GroupedShape(
                experts,
                output.features(),
                0,
                output.features(),
                hidden_size,
                begin,
                end,
            ),
            tokens,
            output.limit,
            ctx,
        )
    _ = buffer^


def _multiply[
    D: DenseOutput, //
](
    output: D,
    offsets: Ids,
    first: BFloats,
    second: BFloats,
    x: BFloats,
    shape: GroupedShape,
    tokens: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues the kernel for so many tokens."""

    def launch[width: Int, stages: Int, box: Int]() raises {imm}:
        launch_grouped_wgmma[D, width, stages, SHARERS, box](
            output, offsets, first, second, x, shape, limit, ctx
        )

    if tokens <= FEW_TOKENS:
        launch[64, 8, FEW_BOX]()
    elif tokens < MANY_TOKENS:
        launch[128, 6, MIDDLE_BOX]()
    else:
        launch[256, 4, MANY_BOX]()


def down_grouped[
    y_dtype: DType, //, based: Bool
](
    y: Elements[y_dtype],
    base: BFloats,
    act: BFloats,
    down: BFloats,
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
    """`y_t = sum_k weights[t, k] * (down_e act)`, in the order of k, of products rounded to bfloat16.

    The columns of `y` are computed in as many pieces as bound the memory for the products to `PARTS_BYTES`; every
    piece reads its own rows of `down`, so that nothing is read twice.

    Parameters:
        y_dtype: Type of the result, whose sums are float32.
        based: Adds to `base`; otherwise that is not looked at.

    Args:
        y: Result `[T, H]`.
        base: What the sums begin with `[T, H]`.
        act: Activations `[T * K, M]`, in the order of `rows`.
        down: Down matrices `[E, H, M]`.
        rows: Assignments `t * K + k` grouped by expert `[T * K]`.
        offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
        weights: Weight of every assignment `[T, K]`.
        tokens: `T`.
        top_k: `K`.
        experts: `E`.
        hidden_size: `H`, a multiple of 8.
        intermediate_size: `M`.
        ctx: The device.
    """
    if hidden_size % 8 != 0:
        raise Error(
            "down_grouped: hidden_size is ",
            hidden_size,
            ", expected a multiple of 8",
        )
    var assignments = tokens * top_k
    if assignments == 0:
        return
    var pieces = ceildiv(assignments * hidden_size * 2, PARTS_BYTES)
    var columns = ceildiv(ceildiv(hidden_size, pieces), TILE_M) * TILE_M
    columns = min(columns, hidden_size)
    var buffer = ctx.enqueue_create_buffer[DType.bfloat16](
        assignments * columns
    )
    var parts = buffer.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin]()
    var places_buffer = ctx.enqueue_create_buffer[DType.int32](assignments)
    var places = places_buffer.unsafe_ptr().unsafe_origin_cast[
        MutUntrackedOrigin
    ]()
    launch_places(places, rows, offsets, experts, assignments, ctx)
    for begin in range(0, hidden_size, columns):
        var end = min(begin + columns, hidden_size)
        _down_parts(
            LinearOutput(parts, end - begin),
            begin,
            act,
            down,
            offsets,
            tokens,
            top_k,
            experts,
            hidden_size,
            intermediate_size,
            ctx,
        )
        launch_combine[based](
            y,
            base,
            parts,
            places,
            weights,
            tokens,
            top_k,
            end - begin,
            hidden_size,
            begin,
            ctx,
        )
    _ = buffer^
    _ = places_buffer^


def _down_parts(
    output: LinearOutput[DType.bfloat16],
    begin: Int,
    act: BFloats,
    down: BFloats,
    offsets: Ids,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    ctx: DeviceContext,
) raises:
    """The products of all assignments in columns `begin` ..., one row for every assignment in order of expert.
    """
    comptime if ctx.default_device_info.compute == 9.0:
        if intermediate_size % 8 == 0:
            _multiply(
                output,
                offsets,
                down,
                down,
                act,
                GroupedShape(
                    experts,
                    hidden_size,
                    begin,
                    output.features(),
                    intermediate_size,
                    0,
                    tokens * top_k,
                ),
                tokens,
                inf[DType.float32](),
                ctx,
            )
            return
    launch_down_plain(
        output.results(),
        act,
        down,
        offsets,
        experts,
        hidden_size,
        intermediate_size,
        begin,
        begin + output.features(),
        ctx,
    )
