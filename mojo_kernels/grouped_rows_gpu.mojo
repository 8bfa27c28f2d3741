"""Grouped products of many tokens whose rows lie in the order of the experts: both operands come by TMA."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    grid_dim,
    thread_idx,
)
from max.gpu.host import DeviceContext, FuncAttribute
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import DenseOutput
from .dense_ring_gpu import (
    BF16,
    BOX_TOKENS,
    DenseRing,
    LOADER,
    SWIZZLE,
    THREADS,
)
from .dense_store_gpu import ResultRows, staging_bytes, staging_of, store_tile
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .grouped_wgmma_gpu import widths
from .operands import Elements, Ids, elements


@fieldwise_init
struct SlotRows[SCATTERED: Bool](ImplicitlyCopyable, ResultRows):
    """Results of the assignments `first` ... go to rows of the same numbers, or where `rows` says if `SCATTERED`.
    """

    var rows: Ids
    var first: Int
    var tokens: Int

    @always_inline
    def row(self, token: Int) -> Int:
        if token >= self.tokens:
            return -1
        comptime if Self.SCATTERED:
            return Int(self.rows[unsafe_offset=self.first + token])
        else:
            return self.first + token


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
def grouped_rows[
    D: DenseOutput,
    SCATTERED: Bool,
    MAX_N: Int,
    STAGES: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    results: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    experts: Int32,
    expert_rows: Int32,
    begin: Int32,
    features: Int32,
    depth: Int32,
    limit: Float32,
):
    """All tiles of a grouped product with the weight rows `begin` to `begin + features` of every expert.
    """
    comptime ROWS = TILE_M // D.TENSORS
    var output = D.of(elements(results), Int(features), limit)
    var ring = DenseRing[MAX_N, STAGES, 1]()
    barrier()
    var steps = ceildiv(Int(depth), TILE_K)
    var walk = TileWalk[MAX_N](
        elements(offsets), Int(experts), ceildiv(Int(features), ROWS)
    )
    var warp = Int(thread_idx.x) // 32
    var tile = Int(block_idx.x)
    if warp == LOADER:
        while walk.find(tile):
            tile += Int(grid_dim.x)
            var row = (
                walk.expert * Int(expert_rows)
                + Int(begin)
                + walk.row_tile * ROWS
            )
            var boxes = ceildiv(walk.tokens, BOX_TOKENS)
            for step in range(steps):
                ring.wait_empty()
                ring.expect(boxes * BOX_TOKENS)
                ring.load_weights[D.BOX_ROWS, D.TENSORS](
                    first, second, row, step * TILE_K
                )
                ring.load_boxes(x, boxes, walk.slot, step * TILE_K)
                ring.step()
        return
    var group = warp // 4
    var staging = staging_of[D](ring.base, ring.BYTES, group)
    while walk.find(tile):
        tile += Int(grid_dim.x)
        comptime for v in range(len(widths[MAX_N]())):
            comptime N = widths[MAX_N]()[v]
            comptime LESS = widths[MAX_N]()[v - 1] if v > 0 else 0
            if walk.tokens > LESS and walk.tokens <= N:
                store_tile(
                    output,
                    SlotRows[SCATTERED](elements(rows), walk.slot, walk.tokens),
                    ring.multiply[N](group, steps),
                    staging,
                    group,
                    walk.row_tile * ROWS + group * (ROWS // 2),
                )


def launch_grouped_rows[
    D: DenseOutput, SCATTERED: Bool, MAX_N: Int, STAGES: Int
](
    output: D,
    x: Elements[BF16],
    first: Elements[BF16],
    second: Elements[BF16],
    rows: Ids,
    offsets: Ids,
    assignments: Int,
    experts: Int,
    expert_rows: Int,
    begin: Int,
    depth: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `grouped_rows` on all multiprocessors, for experts of mostly up to `MAX_N` tokens.

    Args:
        output: Results `[T * K, features]` of every expert's weight rows from `begin` on.
        x: `[T * K, depth]`, in the order of the experts.
        first: Weights `[E, expert_rows, depth]`.
        second: As `first`; the other tensor if there are two.
        rows: Assignments grouped by expert `[T * K]`; results go to their rows if `SCATTERED`.
        offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
        assignments: `T * K`.
        experts: `E`.
        expert_rows: Weight rows of an expert in each tensor.
        begin: The first of them that counts.
        depth: Length of the dot products, a multiple of 8.
        limit: Bound of an activation.
        ctx: The device.
    """
    comptime BYTES = DenseRing[MAX_N, STAGES, 1].BYTES + staging_bytes[D]()
    var shape = Coord(experts * expert_rows, depth)
    var first_tma = create_tma_tile[D.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(first, row_major(shape))
    )
    var second_tma = create_tma_tile[D.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(second, row_major(shape))
    )
    var x_tma = create_tma_tile[BOX_TOKENS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(assignments, depth)))
    )
    comptime W = type_of(first_tma)
    comptime X = type_of(x_tma)
    comptime kernel = grouped_rows[
        D,
        SCATTERED,
        MAX_N,
        STAGES,
        W.tile_shape,
        W.desc_shape,
        X.tile_shape,
        X.desc_shape,
    ]
    ctx.enqueue_function[kernel](
        output.results(),
        rows,
        offsets,
        first_tma,
        second_tma,
        x_tma,
        Int32(experts),
        Int32(expert_rows),
        Int32(begin),
        Int32(output.features()),
        Int32(depth),
        limit,
        grid_dim=ctx.default_device_info.sm_count,
        block_dim=THREADS,
        shared_mem_bytes=BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(BYTES)
        ),
    )
