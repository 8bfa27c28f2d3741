"""The warps of a grouped product that bring its weights and tokens into the ring.

The weights do not depend on the preceding kernel: the first of them are on their way before it ends.
"""

from layout import Coord
from layout.tma_async import TMATensorTile
from max.gpu import lane_id
from max.gpu.memory import CacheEviction
from max.gpu.primitives.cluster import elect_one_sync
from max.gpu.primitives.grid_controls import wait_on_dependent_grids
from max.gpu.sync import syncwarp
from std.math import ceildiv
from std.sys._assembly import inlined_assembly

from .dense_maps_gpu import BF16, WeightMaps
from .dense_ring_gpu import DenseRing
from .grouped_tiles_gpu import SharedOffsets, TILE_K, TILE_M, TileWalk
from .grouped_tokens_gpu import GroupedTokens

comptime EVICTION = CacheEviction.EVICT_FIRST
"""An expert's weights are read once, or a few times soon after one another."""


@fieldwise_init
struct BlockTiles[MAX_N: Int, SHARERS: Int](ImplicitlyCopyable):
    """The tiles of one block: every cluster takes each `clusters`-th."""

    var walk: TileWalk[Self.MAX_N]
    var tile: Int
    """Index of the next tile among all."""
    var clusters: Int
    var rank: Int
    """Index of the block in its cluster."""

    @always_inline
    def find(mut self) -> Bool:
        """Goes to the next tile; false behind the last."""
        var found = self.walk.find(self.tile)
        self.tile += self.clusters
        return found

    @always_inline
    def row(self, rows: Int) -> Int:
        """The block's first row of the expert's, of which a tile has `rows`."""
        return (self.walk.row_tile * Self.SHARERS + self.rank) * rows


@fieldwise_init
struct GroupedWeights[BOX_ROWS: Int, TENSORS: Int, shape: Coord, desc: Coord](
    ImplicitlyCopyable
):
    """The weights of the experts, one behind the other; a copy brings `BOX_ROWS` rows.
    """

    var maps: WeightMaps[Self.TENSORS, Self.shape, Self.desc]
    var expert_rows: Int
    """Rows of an expert in each tensor."""
    var row_begin: Int
    """The first of them to multiply."""

    @always_inline
    def load(
        self, ring: DenseRing[...], tiles: BlockTiles[...], step: Int, rows: Int
    ):
        """The calling thread announces a stage with `rows` rows of tokens and starts the copies of its weights.
        """
        ring.announce(rows)
        ring.load_tile[Self.BOX_ROWS, Self.TENSORS, EVICTION](
            self.maps,
            0,
            tiles.row(TILE_M // Self.TENSORS)
            + tiles.walk.expert * self.expert_rows
            + self.row_begin,
            step * TILE_K,
        )


@always_inline
def token_rows[T: GroupedTokens](tiles: BlockTiles[...]) -> Int:
    """Rows of tokens that come for every stage of a tile."""
    return ceildiv(tiles.walk.tokens, T.BOX) * T.BOX


@always_inline
def load_both[
    T: GroupedTokens, x_shape: Coord, x_desc: Coord, //
](
    mut ring: DenseRing[...],
    weights: GroupedWeights[...],
    x: TMATensorTile[BF16, x_shape, x_desc],
    tokens: T,
    tiles: BlockTiles[...],
    steps: Int,
):
    """One thread brings all that a block brings."""
    var ahead = 0
    var first = tiles
    if first.find():
        ahead = min(ring.STAGES, steps)
        var first_ring = ring
        for step in range(ahead):
            weights.load(first_ring, first, step, token_rows[T](first))
            first_ring.step()
    wait_on_dependent_grids()
    var left = tiles
    while left.find():
        for step in range(steps):
            if ahead > 0:
                ahead -= 1
            else:
                ring.wait_empty()
                weights.load(ring, left, step, token_rows[T](left))
            for box in range(
                left.rank, ceildiv(left.walk.tokens, T.BOX), ring.SHARERS
            ):
                ring.load_box[T.BOX](
                    x,
                    box,
                    tokens.row(left.walk.slot) + box * T.BOX,
                    step * TILE_K,
                )
            ring.step()
    finish(ring)


@always_inline
def load_weights(
    mut ring: DenseRing[...],
    weights: GroupedWeights[...],
    tiles: BlockTiles[...],
    steps: Int,
):
    """One thread brings the weights, where other warps bring the tokens: a row each.
    """
    var left = tiles
    while left.find():
        for step in range(steps):
            ring.wait_empty()
            weights.load(ring, left, step, left.walk.tokens)
            ring.step()
    finish(ring)


@always_inline
def feed_tokens[
    T: GroupedTokens, x_shape: Coord, x_desc: Coord, //
](
    mut ring: DenseRing[...],
    x: TMATensorTile[BF16, x_shape, x_desc],
    tokens: T,
    tiles: BlockTiles[...],
    feeder: Int,
    rows: SharedOffsets,
    steps: Int,
):
    """A warp brings its share of the block's share of the tokens.

    A stage may get tokens before its bytes are announced: until then its barrier misses an arrival.

    Args:
        ring: The ring.
        x: The tokens.
        tokens: Where to find them.
        tiles: The block's tiles.
        feeder: Index of the warp among those that bring tokens.
        rows: The warp's room for the rows of `MAX_N` tokens.
        steps: Stages of a tile.
    """
    comptime STRIDE = ring.SHARERS * T.FEEDERS
    wait_on_dependent_grids()
    var left = tiles
    var first = left.rank + ring.SHARERS * feeder
    while left.find():
        var count = max(ceildiv(left.walk.tokens - first, STRIDE), 0)
        # One lane may still look at the rows of the tile before.
        syncwarp()
        for i in range(Int(lane_id()), count, 32):
            rows[unsafe_offset=i] = Int32(
                tokens.row(left.walk.slot + first + i * STRIDE)
            )
        syncwarp()
        # With a lane that is elected the compiler knows that no other one copies.
        if elect_one_sync():
            for step in range(steps):
                ring.wait_empty()
                var to = Int32(Int(ring.tokens().unsafe_offset(first * TILE_K)))
                var full = Int32(Int(ring.full.unsafe_offset(ring.stage)))
                var column = Int32(step * TILE_K)
                var i = 0
                # One after the other without a look at how many are left: 8, then fewer.
                comptime for together in [8, 2, 1]:
                    while i + together <= count:
                        var some = rows.unsafe_offset(i).unsafe_load[
                            width=together, alignment=4 * together
                        ]()
                        comptime for j in range(together):
                            copy_row[ring.SHARERS](
                                x,
                                to + Int32(j * STRIDE * 128),
                                full,
                                some[j],
                                column,
                            )
                        i += together
                        to += Int32(together * STRIDE * 128)
                ring.step()


@always_inline
def copy_row[
    x_shape: Coord, x_desc: Coord, //, SHARERS: Int
](
    x: TMATensorTile[BF16, x_shape, x_desc],
    to: Int32,
    full: Int32,
    row: Int32,
    column: Int32,
):
    """Starts the copy of `TILE_K` columns of a row to every block of the cluster.

    Args:
        x: The rows, one a copy.
        to: Shared address of the place.
        full: Shared address of the barrier that is told.
        row: The row.
        column: Its first column.
    """
    comptime COPY = (
        "cp.async.bulk.tensor.2d.shared::cluster.global"
        ".mbarrier::complete_tx::bytes"
    )
    var map = Pointer(to=x.descriptor)
    comptime if SHARERS == 1:
        inlined_assembly[
            COPY + " [$0], [$1, {$2, $3}], [$4];",
            NoneType,
            constraints="r,l,r,r,r,~{memory}",
        ](to, map, column, row, full)
    else:
        inlined_assembly[
            COPY + ".multicast::cluster [$0], [$1, {$2, $3}], [$4], $5;",
            NoneType,
            constraints="r,l,r,r,r,h,~{memory}",
        ](to, map, column, row, full, UInt16((1 << SHARERS) - 1))


@always_inline
def finish(mut ring: DenseRing[...]):
    """The block must stay as long as another one may signal its barriers."""
    comptime if ring.SHARERS > 1:
        comptime for _ in range(ring.STAGES):
            ring.wait_empty()
            ring.step()
