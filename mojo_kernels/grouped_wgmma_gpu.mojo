"""The grouped product on Hopper's tensor cores: persistent blocks, one warp loads, two warp groups multiply.

Weights are the left operand of WGMMA and tokens the right one, so that an expert with few tokens costs few columns. The
blocks of a cluster take neighbouring weight rows of one expert and share its tokens, which each brings in part to all.
"""

from layout import Coord
from layout.tma_async import TMATensorTile
from max.gpu import barrier, block_idx, grid_dim, lane_id, thread_idx
from max.gpu.primitives.cluster import cluster_sync
from max.gpu.primitives.grid_controls import (
    launch_dependent_grids,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_ring_gpu import BF16, DenseRing, LOADER, Sums
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk

comptime LANES = 32


trait Grouped(ImplicitlyCopyable):
    """What distinguishes one grouped product from another."""

    comptime BOX_ROWS: Int
    """Weight rows that one TMA copy brings."""

    comptime TENSORS: Int
    """Number of weight tensors, whose copies alternate."""

    comptime BOX_TOKENS: Int
    """Tokens that one TMA copy brings: 1 where they do not lie behind one another."""

    def source_row(self, slot: Int) -> Int:
        """Row of an assignment's token in the matrix of the tokens."""
        ...

    def store[
        N: Int
    ](self, sums: Sums[N], warp: Int, row: Int, slot: Int, tokens: Int):
        """Stores the sums of 16 weight rows a warp.

        Args:
            sums: Of columns 8 j + 2 (lane % 4) + i, rows lane / 4 (+ 8): element 4 j + i (+ 2).
            warp: 0 to 7: its sums are those of the tile's rows 16 warp ...
            row: First row of the tile in each of the expert's tensors.
            slot: Assignment of column 0.
            tokens: Columns to store.
        """
        ...


@always_inline
def widths[MAX_N: Int]() -> List[Int]:
    """Numbers of columns for which the product is compiled."""
    comptime if MAX_N <= 64:
        return [16, 32, 64]
    elif MAX_N <= 128:
        return [32, 64, 96, 128]
    else:
        return [32, 64, 128, 160, 192, 208, 224, 240, 256]


@always_inline
def load_tiles[
    G: Grouped,
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    grouped: G,
    mut walk: TileWalk[MAX_N],
    mut ring: DenseRing[MAX_N, STAGES, SHARERS],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    expert_rows: Int,
    row_tile_begin: Int,
    depth: Int,
):
    """The loading warp's part: this block's weights, and its share of the cluster's tokens.
    """
    comptime PASSES = ceildiv(MAX_N // G.BOX_TOKENS, SHARERS * LANES)
    comptime TENSOR_ROWS = TILE_M // G.TENSORS
    var rank = Int(block_idx.x) % SHARERS
    var tile = Int(block_idx.x) // SHARERS
    while walk.find(tile):
        tile += Int(grid_dim.x) // SHARERS
        var boxes = ceildiv(walk.tokens, G.BOX_TOKENS)
        var sources = StaticTuple[Int32, PASSES](fill=-1)
        comptime for i in range(PASSES):
            var box = (i * LANES + Int(lane_id())) * SHARERS + rank
            if box < boxes:
                sources[i] = Int32(
                    grouped.source_row(walk.slot + box * G.BOX_TOKENS)
                )
        var weight_row = (
            walk.expert * expert_rows
            + (row_tile_begin + walk.row_tile * SHARERS + rank) * TENSOR_ROWS
        )
        for k in range(0, depth, TILE_K):
            ring.wait_empty()
            ring.expect(boxes * G.BOX_TOKENS)
            ring.load_weights[G.BOX_ROWS, G.TENSORS](
                first, second, weight_row, k
            )
            comptime for i in range(PASSES):
                if sources[i] >= 0:
                    ring.load_box[G.BOX_TOKENS](
                        x,
                        (i * LANES + Int(lane_id())) * SHARERS + rank,
                        Int(sources[i]),
                        k,
                    )
            ring.step()
    comptime if SHARERS > 1:
        # The block must stay as long as another one may signal its barriers.
        comptime for _ in range(STAGES):
            ring.wait_empty()
            ring.step()


@always_inline
def run_tiles[
    G: Grouped,
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    grouped: G,
    var walk: TileWalk[MAX_N],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    expert_rows: Int,
    row_tile_begin: Int,
    depth: Int,
):
    """All tiles of a grouped product; called by every thread of every block.

    Args:
        grouped: The product.
        walk: The tiles, of `SHARERS * TILE_M` weight rows.
        first: Weights `[E * expert_rows, depth]`, by boxes of `G.BOX_ROWS` rows.
        second: As `first`: the other tensor if `G.TENSORS` is 2.
        x: Tokens, `[.., depth]`, by boxes of `G.BOX_TOKENS`.
        expert_rows: Weight rows of an expert in each tensor.
        row_tile_begin: The first tile of `TILE_M` weight rows of every expert.
        depth: Length of the dot products, a multiple of 8.
    """
    var ring = DenseRing[MAX_N, STAGES, SHARERS]()
    comptime if SHARERS == 1:
        barrier()
    else:
        cluster_sync()
    wait_on_dependent_grids()
    launch_dependent_grids()
    var warp = Int(thread_idx.x) // LANES
    if warp == LOADER:
        load_tiles(
            grouped,
            walk,
            ring,
            first,
            second,
            x,
            expert_rows,
            row_tile_begin,
            depth,
        )
        return
    comptime TENSOR_ROWS = TILE_M // G.TENSORS
    var rank = Int(block_idx.x) % SHARERS
    var tile = Int(block_idx.x) // SHARERS
    while walk.find(tile):
        tile += Int(grid_dim.x) // SHARERS
        comptime for v in range(len(widths[MAX_N]())):
            comptime N = widths[MAX_N]()[v]
            comptime LESS = widths[MAX_N]()[v - 1] if v > 0 else 0
            if walk.tokens > LESS and walk.tokens <= N:
                grouped.store[N](
                    ring.multiply[N](warp // 4, ceildiv(depth, TILE_K)),
                    warp,
                    (row_tile_begin + walk.row_tile * SHARERS + rank)
                    * TENSOR_ROWS,
                    walk.slot,
                    walk.tokens,
                )
