"""Dense products with few tiles: the blocks of a cluster share a tile's depth and add their sums in a fixed order."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    lane_id,
    thread_idx,
)
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.primitives.cluster import (
    cluster_arrive_relaxed,
    cluster_sync,
    cluster_wait,
)
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.builtin.device_passable import DevicePassable
from std.math import ceildiv
from std.sys._assembly import inlined_assembly
from std.sys.intrinsics import _RegisterPackType
from std.utils.static_tuple import StaticTuple

from .dense_maps_gpu import NoMap, WeightMaps
from .dense_output_gpu import DenseOutput, Quad
from .dense_plan_gpu import MAX_SPLITS
from .dense_products_gpu import DenseProducts, RowTile
from .dense_ring_gpu import (
    BF16,
    DenseRing,
    LOADER,
    MULTIPLIERS,
    SWIZZLE,
    SharedTile,
    Sums,
    THREADS,
)
from .dense_tokens_gpu import TokenTiles
from .grouped_pairs_gpu import store_transposed
from .grouped_tiles_gpu import TILE_K, TILE_M
from .operands import Elements
from .tasks import share

comptime QUAD_BYTES = MULTIPLIERS * 16
"""Shared memory between one quad of a thread's sums and its next."""


@always_inline
def multipliers_barrier():
    """A barrier of all threads that multiply."""
    inlined_assembly["bar.sync 1, 256;", NoneType, constraints="~{memory}"]()


@always_inline
def peer_address(address: Int32, rank: Int) -> Int32:
    """Where another block of the cluster has what lies at `address` here."""
    return inlined_assembly[
        "mapa.shared::cluster.u32 $0, $1, $2;",
        Int32,
        constraints="=r,r,r",
        has_side_effect=False,
    ](address, Int32(rank))


@always_inline
def load_peer(address: Int32) -> Quad:
    """Reads the shared memory of any block of the cluster."""
    var values = inlined_assembly[
        "ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];",
        _RegisterPackType[Float32, Float32, Float32, Float32],
        constraints="=f,=f,=f,=f,r,~{memory}",
    ](address)
    return Quad(values[0], values[1], values[2], values[3])


@always_inline
def load_share[
    D: DenseOutput,
    N: Int,
    STAGES: Int,
    ALL: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
    //,
](
    mut ring: DenseRing[N, STAGES, 1],
    weights: WeightMaps[ALL, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    rows: RowTile[D],
    token: Int,
    tokens: Int,
    begin: Int,
    end: Int,
):
    """The loading warp's part: steps `begin` to `end` of a tile of `tokens` tokens.

    The weights do not depend on the preceding kernel, so that the first of them are on their way before it ends.
    """
    var ahead = min(begin + STAGES, end)
    var tokens_ring = ring
    for step in range(begin, ahead):
        ring.expect(tokens)
        ring.load_weights[D.BOX_ROWS, D.TENSORS](
            weights, rows.tensor, rows.row, step * TILE_K
        )
        ring.step()
    wait_on_dependent_grids()
    for step in range(begin, ahead):
        tokens_ring.load_tokens(x, 0, tokens, token, step * TILE_K)
        tokens_ring.step()
    for step in range(ahead, end):
        ring.wait_empty()
        ring.expect(tokens)
        ring.load_weights[D.BOX_ROWS, D.TENSORS](
            weights, rows.tensor, rows.row, step * TILE_K
        )
        ring.load_tokens(x, 0, tokens, token, step * TILE_K)
        ring.step()


@always_inline
def store_share[
    D: DenseOutput, N: Int, SPLITS: Int
](output: D, base: SharedTile, rank: Int, row: Int, token: Int, end: Int):
    """Adds the sums of the cluster's blocks for a share of the tile's tokens, and stores the results.

    Args:
        output: The product.
        base: Where the blocks' sums begin in shared memory.
        rank: Index of the share.
        row: First result of the warp.
        token: First token of the tile.
        end: The end of the tile's tokens.
    """
    # So many reads are on their way at once.
    comptime TOGETHER = MAX_SPLITS // SPLITS
    comptime QUADS = ceildiv(N // 8, SPLITS * TOGETHER) * TOGETHER
    comptime assert QUADS <= N // 8
    var own = Int32(Int(own_quads(base)))
    # The last shares begin early enough to end with the tile: a quad in two shares is stored twice, with the same bits.
    var first = min(rank * QUADS, N // 8 - QUADS)
    for begin in range(first, first + QUADS, TOGETHER):
        var parts = StaticTuple[Quad, MAX_SPLITS]()
        comptime for i in range(TOGETHER):
            comptime for peer in range(SPLITS):
                parts[i * SPLITS + peer] = load_peer(
                    peer_address(own + Int32((begin + i) * QUAD_BYTES), peer)
                )
        comptime for i in range(TOGETHER):
            var sums = parts[i * SPLITS]
            comptime for peer in range(1, SPLITS):
                sums += parts[i * SPLITS + peer]
            output.store(sums, row, token + 8 * (begin + i), end)


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(third, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
@__name(t"step3p5_dense_split_{P.NAME}_{P.Output.dtype}_{N}_{STAGES}_{BLOCKS}")
def dense_split[
    P: DenseProducts,
    N: Int,
    STAGES: Int,
    BLOCKS: Int,
    w_shape: Coord,
    w_desc: Coord,
    Second: DevicePassable,
    Third: DevicePassable,
    x_shape: Coord,
    x_desc: Coord,
](
    products: P,
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: Second,
    third: Third,
    x: TMATensorTile[BF16, x_shape, x_desc],
    tokens: Int32,
    depth: Int32,
    splits: Int32,
):
    """One tile of dense products, `TILE_M / TENSORS` rows of every weight tensor of one of them and up to `N` tokens, by
    each cluster.

    Every block adds the products over its share of the depth; then each adds all blocks' sums of its share of the
    tokens, in the order of the blocks, and stores the results. `BLOCKS` fit on a multiprocessor. `second` and `third`
    are maps or `NoMap`s.
    """
    comptime D = P.Output
    var ring = DenseRing[N, STAGES, 1]()
    barrier()
    var rank = Int(block_idx.x) % Int(splits)
    var tile = Int(block_idx.x) // Int(splits)
    var token_tiles = TokenTiles[N, 1](Int(tokens))
    var row_tile = tile // token_tiles.count
    var of_tile = token_tiles.range(tile - row_tile * token_tiles.count)
    var rows = products.row_tile(row_tile)
    var begin, end = share(ceildiv(Int(depth), TILE_K), rank, Int(splits))
    var warp = Int(thread_idx.x) // 32
    if warp == LOADER:
        load_share(
            ring,
            WeightMaps[P.TENSORS](first, second, third),
            x,
            rows,
            of_tile.first,
            token_tiles.each(),
            begin,
            end,
        )
        launch_dependent_grids()
    else:
        var sums = ring.multiply[N](warp // 4, end - begin)
        # The other warps may still read the stages that the sums replace.
        multipliers_barrier()
        var to = own_quads(ring.base)
        comptime for j in range(N // 8):
            to.unsafe_offset(j * QUAD_BYTES // 4).unsafe_store[alignment=16](
                Quad(
                    sums[4 * j],
                    sums[4 * j + 1],
                    sums[4 * j + 2],
                    sums[4 * j + 3],
                )
            )
        wait_on_dependent_grids()
        launch_dependent_grids()
    cluster_sync()
    if warp != LOADER:
        var row = rows.row + warp * 8 * D.MATRICES
        comptime for all in [1, 2, 3, 4, MAX_SPLITS]:
            if Int(splits) == all:
                store_share[D, N, all](
                    rows.output,
                    ring.base,
                    rank,
                    row,
                    of_tile.first,
                    of_tile.end,
                )
    # The other blocks may still read this one's sums.
    cluster_arrive_relaxed()
    cluster_wait()


@always_inline
def own_quads(
    base: SharedTile,
) -> Pointer[Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]:
    """Where this thread's first quad of sums lies."""
    return base.unsafe_bitcast[Float32]().unsafe_offset(Int(thread_idx.x) * 4)


def launch_dense_split[
    P: DenseProducts, N: Int, STAGES: Int, BLOCKS: Int
](
    products: P,
    x: Elements[BF16],
    weights: StaticTuple[Elements[BF16], P.TENSORS],
    tokens: Int,
    depth: Int,
    splits: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `dense_split` with clusters of `splits` blocks: 1, 2, 3, 4 or 8, at most one for every `TILE_K` of depth.
    """
    comptime Ring = DenseRing[N, STAGES, 1]
    comptime assert Ring.BYTES >= N // 8 * QUAD_BYTES
    var first = create_tma_tile[
        P.Output.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE
    ](
        ctx,
        TileTensor(
            weights[0], row_major(Coord(products.weight_rows(0), depth))
        ),
    )

    def weight_map(tensor: Int, out map: type_of(first)) raises {imm}:
        map = create_tma_tile[P.Output.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
            ctx,
            TileTensor(
                weights[tensor],
                row_major(Coord(products.weight_rows(tensor), depth)),
            ),
        )

    var x_tma = create_tma_tile[Ring.TOKEN_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(tokens, depth)))
    )
    var token_tiles = TokenTiles[N, 1](tokens)
    token_tiles.fit_copies(x_tma, x, depth, ctx)
    comptime W = type_of(first)
    comptime X = type_of(x_tma)

    def enqueue[
        Second: DevicePassable, Third: DevicePassable
    ](second: Second, third: Third) raises {imm}:
        comptime kernel = dense_split[
            P,
            N,
            STAGES,
            BLOCKS,
            W.tile_shape,
            W.desc_shape,
            Second,
            Third,
            X.tile_shape,
            X.desc_shape,
        ]
        ctx.enqueue_function[kernel](
            products,
            first,
            second,
            third,
            x_tma,
            Int32(tokens),
            Int32(depth),
            Int32(splits),
            grid_dim=products.row_tiles() * token_tiles.count * splits,
            block_dim=THREADS,
            cluster_dim=Dim(splits),
            shared_mem_bytes=Ring.BYTES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(Ring.BYTES)
            ),
        )

    comptime if P.TENSORS == 1:
        enqueue(NoMap(), NoMap())
    elif P.TENSORS == 2:
        enqueue(weight_map(1), NoMap())
    else:
        enqueue(weight_map(1), weight_map(2))
