"""The grouped product on Hopper's tensor cores: persistent blocks, one warp group loads, two multiply.

Weights are the left operand of WGMMA and tokens the right one, so that an expert with few tokens costs few columns.
"""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile
from max.gpu import barrier, block_idx, grid_dim, lane_id, thread_idx
from max.gpu.compute.mma import (
    WGMMADescriptor,
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.host.nvidia.tma import TensorMapSwizzle
from max.gpu.intrinsics import warpgroup_reg_alloc, warpgroup_reg_dealloc
from max.gpu.memory import fence_async_view_proxy
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .grouped_ring_gpu import (
    LOADERS,
    MULTIPLIER_WARPS,
    Ring,
    WEIGHT_BYTES,
    copy_piece,
)
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .operands import Elements

comptime BF16 = DType.bfloat16

comptime SWIZZLE = TensorMapSwizzle.SWIZZLE_128B

comptime THREADS = LOADERS + MULTIPLIER_WARPS * 32

comptime Sums[N: Int] = StaticTuple[Float32, N // 2]
"""A thread's part of 64 x `N` sums."""

comptime PIECE = 8
"""bfloat16 values in 16 bytes."""

comptime ROWS_A_PASS = LOADERS * PIECE // TILE_K
"""Token rows that the loaders bring in one instruction each."""


trait Grouped(ImplicitlyCopyable):
    """What distinguishes one grouped product from another."""

    comptime BOX_ROWS: Int
    """Weight rows that one TMA copy brings."""

    comptime TENSORS: Int
    """Number of weight tensors, whose copies alternate."""

    def source(self) -> Elements[BF16]:
        """Matrix whose rows are the tokens."""
        ...

    def source_row(self, slot: Int) -> Int:
        """Row of an assignment's token."""
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
    shape: Coord,
    desc: Coord,
](
    grouped: G,
    mut walk: TileWalk[MAX_N],
    mut ring: Ring[MAX_N, STAGES],
    first: TMATensorTile[BF16, shape, desc],
    second: TMATensorTile[BF16, shape, desc],
    expert_rows: Int,
    row_tile_begin: Int,
    depth: Int,
):
    """The loading warps' part: weights by TMA, tokens by 16-byte copies that the threads gather.
    """
    comptime PASSES = MAX_N // ROWS_A_PASS
    comptime BOXES = TILE_M // G.BOX_ROWS
    comptime TENSOR_ROWS = TILE_M // G.TENSORS
    var thread = Int(thread_idx.x)
    var piece = thread % (TILE_K // PIECE)
    var row = thread // (TILE_K // PIECE)
    var tile = Int(block_idx.x)
    while walk.find(tile):
        tile += Int(grid_dim.x)
        var sources = StaticTuple[Int32, PASSES]()
        comptime for i in range(PASSES):
            var r = row + i * ROWS_A_PASS
            sources[i] = -1
            if r < walk.tokens:
                sources[i] = Int32(grouped.source_row(walk.slot + r))
        var weight_row = (
            walk.expert * expert_rows
            + (row_tile_begin + walk.row_tile) * TENSOR_ROWS
        )
        for k in range(0, depth, TILE_K):
            ring.wait_empty()
            if thread < 32:
                if thread == 0:
                    ring.full[unsafe_offset=ring.stage].expect_bytes(
                        Int32(WEIGHT_BYTES)
                    )
                if thread < BOXES:
                    var box_row = weight_row + thread // G.TENSORS * G.BOX_ROWS
                    var to = TileTensor(
                        ring.weights().unsafe_offset(
                            thread * G.BOX_ROWS * TILE_K
                        ),
                        row_major[G.BOX_ROWS, TILE_K](),
                    )
                    if thread % G.TENSORS == 0:
                        first.async_copy(
                            to,
                            ring.full[unsafe_offset=ring.stage],
                            (k, box_row),
                        )
                    else:
                        second.async_copy(
                            to,
                            ring.full[unsafe_offset=ring.stage],
                            (k, box_row),
                        )
            var column = k + piece * PIECE
            var bytes = Int32(16) if column < depth else Int32(0)
            var to = ring.tokens().unsafe_offset(
                row * TILE_K + (piece ^ (row % 8)) * PIECE
            )
            comptime for i in range(PASSES):
                if sources[i] >= 0:
                    copy_piece(
                        to.unsafe_offset(i * ROWS_A_PASS * TILE_K),
                        Int(
                            grouped.source().unsafe_offset(
                                Int(sources[i]) * depth
                                + min(column, depth - PIECE)
                            )
                        ),
                        bytes,
                    )
            ring.arrive_with_copies()
            ring.step()


@always_inline
def multiply_tile[
    N: Int, MAX_N: Int, STAGES: Int
](mut ring: Ring[MAX_N, STAGES], group: Int, steps: Int) -> Sums[N]:
    """The product of 64 weight rows and `N` tokens over the next `steps` stages.
    """
    var sums = Sums[N](fill=0)
    for _ in range(steps):
        ring.wait_full()
        # The gathered tokens were written by ordinary copies, WGMMA reads through the asynchronous proxy.
        fence_async_view_proxy()
        wgmma_fence_aligned()
        comptime for step in range(TILE_K // 16):
            # 8 rows of 128 bytes: 64 units of 16 bytes; a step along k is 32 bytes into the swizzled row.
            var a = WGMMADescriptor.create[64, 1, SWIZZLE](
                ring.weights().unsafe_offset(group * 64 * TILE_K + step * 16)
            )
            var b = WGMMADescriptor.create[64, 1, SWIZZLE](
                ring.tokens().unsafe_offset(step * 16)
            )
            sums = wgmma_async[64, N, 16, a_type=BF16, b_type=BF16](a, b, sums)
        wgmma_commit_group_sync()
        wgmma_wait_group_sync()
        ring.release(ring.stage)
        ring.step()
    return sums


@always_inline
def run_tiles[
    G: Grouped,
    MAX_N: Int,
    STAGES: Int,
    shape: Coord,
    desc: Coord,
](
    grouped: G,
    var walk: TileWalk[MAX_N],
    first: TMATensorTile[BF16, shape, desc],
    second: TMATensorTile[BF16, shape, desc],
    expert_rows: Int,
    row_tile_begin: Int,
    depth: Int,
):
    """All tiles of a grouped product; called by every thread of every block.

    Args:
        grouped: The product.
        walk: The tiles.
        first: Weights `[E * expert_rows, depth]`, by boxes of `G.BOX_ROWS` rows.
        second: As `first`: the other tensor if `G.TENSORS` is 2.
        expert_rows: Weight rows of an expert in each tensor.
        row_tile_begin: The first tile of weight rows of every expert.
        depth: Length of the dot products, a multiple of 8.
    """
    var ring = Ring[MAX_N, STAGES]()
    barrier()
    if Int(thread_idx.x) < LOADERS:
        warpgroup_reg_dealloc[88]()
        load_tiles(
            grouped,
            walk,
            ring,
            first,
            second,
            expert_rows,
            row_tile_begin,
            depth,
        )
        return
    warpgroup_reg_alloc[208]()
    comptime TENSOR_ROWS = TILE_M // G.TENSORS
    var warp = Int(thread_idx.x) // 32 - LOADERS // 32
    var tile = Int(block_idx.x)
    while walk.find(tile):
        tile += Int(grid_dim.x)
        comptime for v in range(len(widths[MAX_N]())):
            comptime N = widths[MAX_N]()[v]
            comptime LESS = widths[MAX_N]()[v - 1] if v > 0 else 0
            if walk.tokens > LESS and walk.tokens <= N:
                var sums = multiply_tile[N](
                    ring, warp // 4, ceildiv(depth, TILE_K)
                )
                grouped.store[N](
                    sums,
                    warp,
                    (row_tile_begin + walk.row_tile) * TENSOR_ROWS,
                    walk.slot,
                    walk.tokens,
                )
