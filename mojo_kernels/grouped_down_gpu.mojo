"""The down product of the experts on Hopper's tensor cores, one row of parts for every assignment."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, lane_id
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.primitives.grid_controls import PDLLevel, pdl_launch_attributes
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_ring_gpu import BF16, DenseRing, SWIZZLE, Sums, THREADS
from .grouped_pairs_gpu import Pair, store_transposed
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .grouped_wgmma_gpu import Grouped, run_tiles
from .operands import Elements, Ids, elements


@fieldwise_init
struct DownProduct(Grouped, ImplicitlyCopyable):
    """Columns `begin` to `end` of `down_e act` go to the row of the assignment.
    """

    comptime BOX_ROWS = TILE_M
    comptime TENSORS = 1
    comptime BOX_TOKENS = 8

    var parts: Elements[BF16]
    """`[T * K, end - begin]`"""
    var rows: Ids
    var begin: Int
    var end: Int

    @always_inline
    def source_row(self, slot: Int) -> Int:
        return slot

    @always_inline
    def store[
        N: Int
    ](self, sums: Sums[N], warp: Int, row: Int, slot: Int, tokens: Int):
        var h = row + warp * 16
        if h >= self.end:
            return
        var columns = self.end - self.begin
        comptime for j in range(N // 8):
            var token = 8 * j + Int(lane_id()) // 4
            var stored = token < tokens
            var assignment = 0
            if stored:
                assignment = Int(self.rows[unsafe_offset=slot + token])
            var to = self.parts.unsafe_offset(
                assignment * columns + h - self.begin
            )
            comptime for half in range(2):
                comptime i = 4 * j + 2 * half
                store_transposed(
                    to.unsafe_offset(8 * half),
                    Pair(sums[i].cast[BF16](), sums[i + 1].cast[BF16]()),
                    stored and h + 8 * half < self.end,
                )


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(down, `nvvm.grid_constant`)
@__llvm_arg_metadata(act, `nvvm.grid_constant`)
def down_wgmma[
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    parts: Pointer[BFloat16, MutAnyOrigin],
    rows: Pointer[Int32, MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    down: TMATensorTile[BF16, w_shape, w_desc],
    act: TMATensorTile[BF16, x_shape, x_desc],
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    begin: Int32,
    end: Int32,
):
    """Writes `parts [T * K, end - begin]`; see `run_tiles`. `begin` is a multiple of `TILE_M`.
    """
    run_tiles[G=DownProduct, MAX_N=MAX_N, STAGES=STAGES, SHARERS=SHARERS](
        DownProduct(
            elements(parts),
            elements(rows),
            Int(begin),
            Int(end),
        ),
        TileWalk[MAX_N](
            elements(offsets),
            Int(experts),
            ceildiv(Int(end - begin), SHARERS * TILE_M),
        ),
        down,
        down,
        act,
        Int(hidden_size),
        Int(begin) // TILE_M,
        Int(intermediate_size),
    )


def launch_down_wgmma[
    MAX_N: Int, STAGES: Int, SHARERS: Int
](
    product: DownProduct,
    act: Elements[BF16],
    down: Elements[BF16],
    offsets: Ids,
    assignments: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `down_wgmma` for experts of mostly up to `MAX_N` tokens."""
    comptime BYTES = DenseRing[MAX_N, STAGES, SHARERS].BYTES
    var shape = Coord(experts * hidden_size, intermediate_size)
    var down_tma = create_tma_tile[
        DownProduct.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(down, row_major(shape)))
    var act_tma = create_tma_tile[
        DownProduct.BOX_TOKENS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(act, row_major(Coord(assignments, intermediate_size))))
    comptime W = type_of(down_tma)
    comptime X = type_of(act_tma)
    comptime kernel = down_wgmma[
        MAX_N,
        STAGES,
        SHARERS,
        W.tile_shape,
        W.desc_shape,
        X.tile_shape,
        X.desc_shape,
    ]
    ctx.enqueue_function[kernel](
        product.parts,
        product.rows,
        offsets,
        down_tma,
        act_tma,
        Int32(experts),
        Int32(hidden_size),
        Int32(intermediate_size),
        Int32(product.begin),
        Int32(product.end),
        grid_dim=ctx.default_device_info.sm_count // SHARERS * SHARERS,
        block_dim=THREADS,
        cluster_dim=Dim(SHARERS),
        shared_mem_bytes=BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(BYTES)
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
