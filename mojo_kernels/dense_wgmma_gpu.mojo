"""Dense products of many tokens: persistent blocks in pairs that share the tokens of their tiles."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    grid_dim,
    lane_id,
    thread_idx,
)
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.memory import CacheEviction
from max.gpu.primitives.cluster import cluster_sync
from std.builtin.device_passable import DevicePassable
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_maps_gpu import NoMap, WeightMaps
from .dense_products_gpu import DenseProducts
from .dense_ring_gpu import BF16, DenseRing, LOADER, SWIZZLE, THREADS
from .dense_store_gpu import STAGING_BYTES, multiply_tile, staging_of
from .dense_tokens_gpu import TokenTiles
from .grouped_tiles_gpu import TILE_K, TILE_M
from .operands import Elements

comptime SHARERS = 2
"""Blocks of a cluster: the same tokens, neighbouring tiles of weight rows."""

comptime RASTER = 8
"""Tiles of tokens that are taken with one tile of weight rows before the next: what is in flight stays in the cache."""


@fieldwise_init
struct DenseTile(ImplicitlyCopyable):
    """A tile's place."""

    var row_group: Int
    """Index of the cluster's `SHARERS` tiles of weight rows."""
    var token_tile: Int

    @always_inline
    @staticmethod
    def of(tile: Int, row_groups: Int, token_tiles: Int) -> DenseTile:
        var panel = tile // (RASTER * row_groups)
        var begin = panel * RASTER
        var width = min(RASTER, token_tiles - begin)
        var local = tile - begin * row_groups
        var row_group = local // width
        return DenseTile(row_group, begin + local - row_group * width)


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(third, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
@__name(t"step3p5_dense_{P.NAME}_{P.Output.dtype}_{N}_{STAGES}")
def dense_wgmma[
    P: DenseProducts,
    N: Int,
    STAGES: Int,
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
):
    """All tiles of dense products, `TILE_M / TENSORS` rows of every weight tensor of one of them and up to `N` tokens
    each. `second` and `third` are maps or `NoMap`s.
    """
    var ring = DenseRing[N, STAGES, SHARERS]()
    var rank = Int(block_idx.x) % SHARERS
    comptime if SHARERS == 1:
        barrier()
    else:
        cluster_sync()
    var steps = ceildiv(Int(depth), TILE_K)
    var row_groups = ceildiv(products.row_tiles(), SHARERS)
    var token_tiles = TokenTiles[N, SHARERS](Int(tokens))
    var warp = Int(thread_idx.x) // 32
    var tiles = row_groups * token_tiles.count
    var first_tile = Int(block_idx.x) // SHARERS
    var clusters = Int(grid_dim.x) // SHARERS
    if warp == LOADER:
        if lane_id() != 0:
            return
        var maps = WeightMaps[P.TENSORS](first, second, third)
        for tile in range(first_tile, tiles, clusters):
            var place = DenseTile.of(tile, row_groups, token_tiles.count)
            var rows = products.row_tile(place.row_group * SHARERS + rank)
            var token = token_tiles.range(place.token_tile).first
            for step in range(steps):
                ring.wait_empty()
                ring.expect(token_tiles.each())
                ring.load_tile[P.Output.TENSORS, CacheEviction.EVICT_NORMAL](
                    maps, rows.tensor, rows.row, step * TILE_K
                )
                ring.load_tokens(
                    x, rank, token_tiles.share, token, step * TILE_K
                )
                ring.step()
        # The block must stay as long as another one may signal its barriers.
        comptime for _ in range(STAGES):
            ring.wait_empty()
            ring.step()
        return
    var group = warp // 4
    var staging = staging_of(ring.base, ring.BYTES, group)
    for tile in range(first_tile, tiles, clusters):
        var place = DenseTile.of(tile, row_groups, token_tiles.count)
        var rows = products.row_tile(place.row_group * SHARERS + rank)
        multiply_tile[N](
            rows.output,
            token_tiles.range(place.token_tile),
            ring,
            steps,
            staging,
            group,
            rows.row,
        )


def launch_dense_wgmma[
    P: DenseProducts, N: Int, STAGES: Int
](
    products: P,
    x: Elements[BF16],
    weights: StaticTuple[Elements[BF16], P.TENSORS],
    tokens: Int,
    depth: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `dense_wgmma` on all multiprocessors."""
    comptime Ring = DenseRing[N, STAGES, SHARERS]
    comptime BYTES = Ring.BYTES + STAGING_BYTES
    comptime ROWS = TILE_M // P.Output.TENSORS
    var first = create_tma_tile[ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx,
        TileTensor(
            weights[0], row_major(Coord(products.weight_rows(0), depth))
        ),
    )

    def weight_map(tensor: Int, out map: type_of(first)) raises {imm}:
        map = create_tma_tile[ROWS, TILE_K, swizzle_mode=SWIZZLE](
            ctx,
            TileTensor(
                weights[tensor],
                row_major(Coord(products.weight_rows(tensor), depth)),
            ),
        )

    var x_tma = create_tma_tile[Ring.TOKEN_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(tokens, depth)))
    )
    TokenTiles[N, SHARERS](tokens).fit_copies(x_tma, x, depth, ctx)
    comptime W = type_of(first)
    comptime X = type_of(x_tma)

    def enqueue[
        Second: DevicePassable, Third: DevicePassable
    ](second: Second, third: Third) raises {imm}:
        comptime kernel = dense_wgmma[
            P,
            N,
            STAGES,
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
            grid_dim=ctx.default_device_info.sm_count // SHARERS * SHARERS,
            block_dim=THREADS,
            cluster_dim=Dim(SHARERS),
            shared_mem_bytes=BYTES,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(BYTES)
            ),
        )

    comptime if P.TENSORS == 1:
        enqueue(NoMap(), NoMap())
    elif P.TENSORS == 2:
        enqueue(weight_map(1), NoMap())
    else:
        enqueue(weight_map(1), weight_map(2))
