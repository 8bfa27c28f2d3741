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
from max.gpu.primitives.cluster import cluster_sync
from std.math import ceildiv
from std.memory import bitcast
from std.sys._assembly import inlined_assembly
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import DenseOutput, Quad
from .dense_ring_gpu import BF16, DenseRing, LOADER, SWIZZLE, Sums, THREADS
from .grouped_ring_gpu import SharedTile
from .grouped_tiles_gpu import TILE_K, TILE_M
from .operands import Elements, elements

comptime SHARERS = 2
"""Blocks of a cluster: the same tokens, neighbouring tiles of weight rows."""

comptime RASTER = 8
"""Tiles of tokens that are taken with one tile of weight rows before the next: what is in flight stays in the cache."""

comptime STAGED_TOKENS = 64
"""Tokens whose results a warp group brings in order in shared memory at a time."""


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


@always_inline
def store_tile[
    D: DenseOutput, N: Int
](
    output: D,
    sums: Sums[N],
    staging: SharedTile,
    group: Int,
    row: Int,
    token: Int,
    tokens: Int,
):
    """A warp group stores its 64 weight rows' results, whole rows of them at a time.

    Args:
        output: The product.
        sums: The thread's sums.
        staging: The group's room for `STAGED_TOKENS` tokens.
        group: Index of the warp group, 0 or 1.
        row: First result of the group.
        token: First token of the tile.
        tokens: Number of all tokens.
    """
    comptime PIECES = 4 * D.MATRICES
    comptime EACH = 4 // D.MATRICES
    var thread = Int(thread_idx.x) % 128
    var lane = Int(lane_id())
    var index = lane // 8
    var from_token = index // D.MATRICES * 8 + lane % 8
    var from_piece = thread // 32 * D.MATRICES + index % D.MATRICES
    comptime for begin in range(0, N, STAGED_TOKENS):
        group_barrier(group)
        comptime for j in range(0, STAGED_TOKENS // 8, EACH):
            var words = StaticTuple[UInt32, 4]()
            comptime for m in range(4):
                comptime s = 4 * (begin // 8 + j + m // D.MATRICES)
                words[m] = bitcast[DType.uint32, 1](
                    output.matrix[m % D.MATRICES](
                        Quad(sums[s], sums[s + 1], sums[s + 2], sums[s + 3])
                    )
                )
            store_matrices(
                staging.unsafe_offset(
                    piece_offset[PIECES](from_token + j * 8, from_piece)
                ),
                words,
            )
        group_barrier(group)
        comptime for i in range(STAGED_TOKENS * PIECES // 128):
            var place = thread + i * 128
            var t = place // PIECES
            var piece = place % PIECES
            var values = staging.unsafe_offset(
                piece_offset[PIECES](t, piece)
            ).unsafe_load[width=8, alignment=16]()
            var to_token = token + begin + t
            var to = row + piece * 8
            if to_token < tokens and to < output.features():
                output.results().unsafe_offset(
                    to_token * output.features() + to
                ).unsafe_store[alignment=16](values)


@always_inline
def piece_offset[PIECES: Int](token: Int, piece: Int) -> Int:
    """Where a piece of 16 bytes is staged: eight tokens' same pieces, and eight neighbouring pieces, hit all banks.
    """
    return (token * PIECES + (piece ^ (token * PIECES // 8 % PIECES))) * 8


@always_inline
def group_barrier(group: Int):
    """A barrier of one warp group."""
    inlined_assembly["bar.sync $0, 128;", NoneType, constraints="r,~{memory}"](
        Int32(group + 1)
    )


@always_inline
def store_matrices(to: SharedTile, words: StaticTuple[UInt32, 4]):
    """A warp stores four 8 x 8 matrices by columns; lane `8 i + c` names the place of column `c` of matrix `i`.
    """
    inlined_assembly[
        (
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3,"
            " $4};"
        ),
        NoneType,
        constraints="r,r,r,r,r,~{memory}",
    ](Int32(Int(to)), words[0], words[1], words[2], words[3])


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
def dense_wgmma[
    D: DenseOutput,
    N: Int,
    STAGES: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    results: Pointer[BFloat16, MutAnyOrigin],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    tokens: Int32,
    features: Int32,
    depth: Int32,
    limit: Float32,
):
    """All tiles of a dense product, `TILE_M / TENSORS` rows of every weight tensor and `N` tokens each.
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
    var token_tiles = ceildiv(Int(tokens), N)
    var warp = Int(thread_idx.x) // 32
    var tiles = row_groups * token_tiles
    var first_tile = Int(block_idx.x) // SHARERS
    var clusters = Int(grid_dim.x) // SHARERS
    if warp == LOADER:
        for tile in range(first_tile, tiles, clusters):
            var place = DenseTile.of(tile, row_groups, token_tiles)
            var row = (place.row_group * SHARERS + rank) * ROWS
            for step in range(steps):
                ring.wait_empty()
                ring.load_weights[D.BOX_ROWS, D.TENSORS](
                    first, second, row, step * TILE_K
                )
                ring.load_tokens(x, rank, place.token_tile * N, step * TILE_K)
                ring.step()
        # The block must stay as long as another one may signal its barriers.
        comptime for _ in range(STAGES):
            ring.wait_empty()
            ring.step()
        return
    var group = warp // 4
    var staging = ring.base.unsafe_offset(
        ring.BYTES // 2 + group * STAGED_TOKENS * D.MATRICES * 32
    )
    for tile in range(first_tile, tiles, clusters):
        var place = DenseTile.of(tile, row_groups, token_tiles)
        var row = (place.row_group * SHARERS + rank) * ROWS
        var sums = ring.multiply(group, steps)
        store_tile(
            output,
            sums,
            staging,
            group,
            row + group * (ROWS // 2),
            place.token_tile * N,
            Int(tokens),
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
    comptime BYTES = Ring.BYTES + 2 * STAGED_TOKENS * D.MATRICES * 64
    var first_tma = create_tma_tile[D.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(first, row_major(Coord(output.features(), depth)))
    )
    var second_tma = create_tma_tile[D.BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(second, row_major(Coord(output.features(), depth)))
    )
    var x_tma = create_tma_tile[Ring.TOKEN_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(tokens, depth)))
    )
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
