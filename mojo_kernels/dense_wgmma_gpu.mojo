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
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import DenseOutput
from .dense_ring_gpu import BF16, DenseRing, LOADER, SWIZZLE, THREADS
from .dense_store_gpu import STAGING_BYTES, multiply_tile, staging_of
from .dense_tokens_gpu import TokenTiles
from .grouped_tiles_gpu import TILE_K, TILE_M
from .operands import Elements, elements

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
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
@__name(t"step3p5_dense_{D.NAME}_{D.dtype}_{N}_{STAGES}")
def dense_wgmma[
    D: DenseOutput,
    N: Int,
    STAGES: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    results: Pointer[Scalar[D.dtype], MutAnyOrigin],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    tokens: Int32,
    features: Int32,
    depth: Int32,
    limit: Float32,
):
    """All tiles of a dense product, `TILE_M / TENSORS` rows of every weight tensor and up to `N` tokens each.
    """
    comptime ROWS = TILE_M // D.TENSORS
    var output = D.of(elements(results), Int(features), limit)
    var ring = DenseRing[N, STAGES, SHARERS]()
    var rank = Int(block_idx.x) % SHARERS
    comptime if SHARERS == 1:
        barrier()
    else:
        cluster_sync()
    var steps = ceildiv(Int(depth), TILE_K)
    var row_groups = ceildiv(output.features(), ROWS * SHARERS)
    var token_tiles = TokenTiles[N, SHARERS](Int(tokens))
    var warp = Int(thread_idx.x) // 32
    var tiles = row_groups * token_tiles.count
    var first_tile = Int(block_idx.x) // SHARERS
    var clusters = Int(grid_dim.x) // SHARERS
    if warp == LOADER:
        if lane_id() != 0:
            return
        for tile in range(first_tile, tiles, clusters):
            var place = DenseTile.of(tile, row_groups, token_tiles.count)
            var row = (place.row_group * SHARERS + rank) * ROWS
            var token = token_tiles.range(place.token_tile).first
            for step in range(steps):
                ring.wait_empty()
                ring.expect(token_tiles.each())
                ring.load_tile[D.TENSORS, CacheEviction.EVICT_NORMAL](
                    first, second, row, step * TILE_K
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
        var row = (place.row_group * SHARERS + rank) * ROWS
        multiply_tile[N](
            output,
            token_tiles.range(place.token_tile),
            ring,
            steps,
            staging,
            group,
            row,
        )


def launch_dense_wgmma[
    D: DenseOutput, N: Int, STAGES: Int
](
    output: D,
    x: Elements[BF16],
    first: Elements[BF16],
    second: Elements[BF16],
    tokens: Int,
    depth: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `dense_wgmma` on all multiprocessors."""
    comptime Ring = DenseRing[N, STAGES, SHARERS]
    comptime BYTES = Ring.BYTES + STAGING_BYTES
    var first_tma = create_tma_tile[
        TILE_M // D.TENSORS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(first, row_major(Coord(output.features(), depth))))
    var second_tma = create_tma_tile[
        TILE_M // D.TENSORS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(second, row_major(Coord(output.features(), depth))))
    var x_tma = create_tma_tile[Ring.TOKEN_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(tokens, depth)))
    )
    TokenTiles[N, SHARERS](tokens).fit_copies(x_tma, x, depth, ctx)
    comptime W = type_of(first_tma)
    comptime X = type_of(x_tma)
    comptime kernel = dense_wgmma[
        D, N, STAGES, W.tile_shape, W.desc_shape, X.tile_shape, X.desc_shape
    ]
    ctx.enqueue_function[kernel](
        output.results(),
        first_tma,
        second_tma,
        x_tma,
        Int32(tokens),
        Int32(output.features()),
        Int32(depth),
        limit,
        grid_dim=ctx.default_device_info.sm_count // SHARERS * SHARERS,
        block_dim=THREADS,
        cluster_dim=Dim(SHARERS),
        shared_mem_bytes=BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(BYTES)
        ),
    )
