"""The ring of shared-memory stages of a dense product: one warp brings both operands by TMA, two warp groups multiply.
"""

from layout import Coord, TileTensor, row_major
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu import lane_id, thread_idx
from max.gpu.compute.mma import (
    WGMMADescriptor,
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.host.nvidia.tma import TensorMapSwizzle
from max.gpu.memory import (
    CacheEviction,
    external_memory,
    fence_mbarrier_init,
)
from std.memory import unsafe_stack_allocation
from std.utils.static_tuple import StaticTuple

from .dense_maps_gpu import BF16, WeightMaps
from .grouped_tiles_gpu import TILE_K, TILE_M

comptime SWIZZLE = TensorMapSwizzle.SWIZZLE_128B

comptime SharedTile = Pointer[
    BFloat16, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]

comptime Barriers = Pointer[
    SharedMemBarrier, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]

comptime MULTIPLIERS = 256
"""Threads that multiply: two groups of 64 weight rows. The warp behind them loads."""

comptime LOADER = MULTIPLIERS // 32
"""Index of the warp that loads."""

comptime THREADS = MULTIPLIERS + 32

comptime Sums[N: Int] = StaticTuple[Float32, N // 2]
"""A thread's part of 64 x `N` sums: element 4 j + i (+ 2) is that of column 8 j + 2 (lane % 4) + i, row lane / 4 (+ 8)
of the warp's 16."""


struct DenseRing[N: Int, STAGES: Int, SHARERS: Int](ImplicitlyCopyable):
    """One thread's place in the ring. A stage holds `[TILE_M, TILE_K]` of weights and `[N, TILE_K]` of tokens, swizzled.

    The `SHARERS` blocks of a cluster each bring an equal part of the tokens to all of them, so that a stage is free
    when every one of them is done with it.
    """

    comptime BYTES = Self.STAGES * (TILE_M + Self.N) * TILE_K * 2
    comptime TOKEN_ROWS = Self.N // Self.SHARERS
    """Most rows of tokens that one block brings."""

    var base: SharedTile
    var full: Barriers
    var empty: Barriers
    var stage: Int
    var phase: UInt32

    @always_inline
    def __init__(out self):
        """Every thread of the block must call it and then wait at a barrier of the block or the cluster.
        """
        self.base = external_memory[
            BFloat16, address_space=AddressSpace.SHARED, alignment=1024
        ]()
        self.full = unsafe_stack_allocation[
            Self.STAGES,
            SharedMemBarrier,
            alignment=8,
            address_space=AddressSpace.SHARED,
        ]()
        self.empty = unsafe_stack_allocation[
            Self.STAGES,
            SharedMemBarrier,
            alignment=8,
            address_space=AddressSpace.SHARED,
        ]()
        self.stage = 0
        self.phase = 0
        if thread_idx.x == 0:
            comptime for i in range(Self.STAGES):
                self.full[unsafe_offset=i].init(1)
                self.empty[unsafe_offset=i].init(
                    Int32(Self.SHARERS * MULTIPLIERS // 32)
                )
            fence_mbarrier_init()

    @always_inline
    def step(mut self):
        self.stage += 1
        if self.stage == Self.STAGES:
            self.stage = 0
            self.phase ^= 1

    @always_inline
    def weights(self) -> SharedTile:
        return self.base.unsafe_offset(self.stage * TILE_M * TILE_K)

    @always_inline
    def tokens(self) -> SharedTile:
        return self.base.unsafe_offset(
            (Self.STAGES * TILE_M + self.stage * Self.N) * TILE_K
        )

    @always_inline
    def wait_full(self):
        self.full[unsafe_offset=self.stage].wait(self.phase)

    @always_inline
    def wait_empty(self):
        self.empty[unsafe_offset=self.stage].wait(self.phase ^ 1)

    @always_inline
    def release(self, stage: Int):
        """A multiplying warp is done with a stage, in every block that wrote it.
        """
        comptime if Self.SHARERS == 1:
            if lane_id() == 0:
                _ = self.empty[unsafe_offset=stage].arrive()
        else:
            if Int(lane_id()) < Self.SHARERS:
                self.empty[unsafe_offset=stage].arrive_cluster(
                    UInt32(lane_id())
                )

    @always_inline
    def expect(self, token_rows: Int):
        """The loading warp announces a stage's weights and `token_rows` rows of tokens.
        """
        if lane_id() == 0:
            self.full[unsafe_offset=self.stage].expect_bytes(
                Int32((TILE_M + token_rows) * TILE_K * 2)
            )

    @always_inline
    def load_weights[
        BOX_ROWS: Int,
        TENSORS: Int,
        *,
        ALL: Int,
        shape: Coord,
        desc: Coord,
    ](
        self,
        maps: WeightMaps[ALL, shape, desc],
        tensor: Int,
        row: Int,
        column: Int,
    ):
        """The loading warp starts the copies of weight rows: `BOX_ROWS` of the first of `TENSORS` tensors, of the
        second, ...

        Args:
            maps: Of all weight tensors `[M, K]`.
            tensor: Index of the first tensor.
            row: First row in each tensor; rows behind the last become zero.
            column: First column, likewise.
        """
        var lane = Int(lane_id())
        if lane < TILE_M // BOX_ROWS:
            maps.copy[CacheEviction.EVICT_NORMAL](
                tensor + lane % TENSORS,
                TileTensor(
                    self.weights().unsafe_offset(lane * BOX_ROWS * TILE_K),
                    row_major[BOX_ROWS, TILE_K](),
                ),
                self.full[unsafe_offset=self.stage],
                (column, row + lane // TENSORS * BOX_ROWS),
            )

    @always_inline
    def load_tile[
        TENSORS: Int,
        EVICTION: CacheEviction,
        *,
        ALL: Int,
        shape: Coord,
        desc: Coord,
    ](
        self,
        maps: WeightMaps[ALL, shape, desc],
        tensor: Int,
        row: Int,
        column: Int,
    ):
        """The calling thread starts the copies of a stage's weights: an equal part of each of `TENSORS` tensors, one
        behind the other.

        One thread starts them, since several lanes' copies run one after the other at a cost of their own.

        Args:
            maps: Of all weight tensors `[M, K]`.
            tensor: Index of the first tensor.
            row: First row in each tensor; rows behind the last become zero.
            column: First column, likewise.
        """
        comptime ROWS = TILE_M // TENSORS
        comptime for i in range(TENSORS):
            maps.copy[EVICTION](
                tensor + i,
                TileTensor(
                    self.weights().unsafe_offset(i * ROWS * TILE_K),
                    row_major[ROWS, TILE_K](),
                ),
                self.full[unsafe_offset=self.stage],
                (column, row),
            )

    @always_inline
    def load_tokens[
        shape: Coord, desc: Coord
    ](
        self,
        x: TMATensorTile[BF16, shape, desc],
        rank: Int,
        rows: Int,
        token: Int,
        column: Int,
    ):
        """The loading warp starts the copy of this block's part of the tokens.

        Args:
            x: Tokens `[T, K]`, whose descriptor brings `rows` of them.
            rank: Which part.
            rows: Tokens that each block brings; a multiple of 8, after which the swizzle begins anew, where several do.
            token: First token of the tile; tokens behind the last become zero.
            column: First column, likewise.
        """
        if lane_id() != 0:
            return
        var to = TileTensor(
            self.tokens().unsafe_offset(rank * rows * TILE_K),
            row_major[Self.TOKEN_ROWS, TILE_K](),
        )
        var at = (column, token + rank * rows)
        comptime if Self.SHARERS == 1:
            x.async_copy(to, self.full[unsafe_offset=self.stage], at)
        else:
            x.async_multicast_load(
                to,
                self.full[unsafe_offset=self.stage],
                at,
                UInt16((1 << Self.SHARERS) - 1),
            )

    @always_inline
    def load_box[
        TOKENS: Int, shape: Coord, desc: Coord
    ](
        self,
        x: TMATensorTile[BF16, shape, desc],
        box: Int,
        token: Int,
        column: Int,
    ):
        """The calling thread starts the copy of a box of `TOKENS` tokens to every block of the cluster.

        Args:
            x: Tokens `[T, K]`.
            box: Index of the box among the stage's.
            token: First token of the box; tokens behind the last become zero.
            column: First column, likewise.
        """
        var to = TileTensor(
            self.tokens().unsafe_offset(box * TOKENS * TILE_K),
            row_major[TOKENS, TILE_K](),
        )
        comptime if Self.SHARERS == 1:
            x.async_copy(
                to, self.full[unsafe_offset=self.stage], (column, token)
            )
        else:
            x.async_multicast_load(
                to,
                self.full[unsafe_offset=self.stage],
                (column, token),
                UInt16((1 << Self.SHARERS) - 1),
            )

    @always_inline
    def multiply[
        COLUMNS: Int
    ](mut self, group: Int, steps: Int) -> Sums[COLUMNS]:
        """The product of 64 weight rows and the first `COLUMNS` tokens over the next `steps` stages, at least one.

        One group of WGMMAs stays in flight, so that a stage is released a step late.
        """
        var sums = Sums[COLUMNS](fill=0)
        var last = self.stage
        for step in range(steps):
            self.wait_full()
            wgmma_fence_aligned()
            comptime for i in range(TILE_K // 16):
                sums = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(
                        self.weights().unsafe_offset(
                            group * 64 * TILE_K + i * 16
                        )
                    ),
                    descriptor(self.tokens().unsafe_offset(i * 16)),
                    sums,
                )
            wgmma_commit_group_sync()
            wgmma_wait_group_sync[1]()
            if step > 0:
                self.release(last)
            last = self.stage
            self.step()
        wgmma_wait_group_sync()
        self.release(last)
        return sums

    @always_inline
    def multiply_both[
        COLUMNS: Int
    ](mut self, group: Int, steps: Int) -> Tuple[Sums[COLUMNS], Sums[COLUMNS]]:
        """The products of the first and of the second 64 weight rows with the group's own `COLUMNS` tokens.

        As `multiply` otherwise. `COLUMNS` is a multiple of 8, the rows after which the swizzle begins anew.
        """
        var upper = Sums[COLUMNS](fill=0)
        var lower = Sums[COLUMNS](fill=0)
        var last = self.stage
        for step in range(steps):
            self.wait_full()
            wgmma_fence_aligned()
            comptime for i in range(TILE_K // 16):
                var tokens = descriptor(
                    self.tokens().unsafe_offset(
                        group * COLUMNS * TILE_K + i * 16
                    )
                )
                upper = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(self.weights().unsafe_offset(i * 16)),
                    tokens,
                    upper,
                )
                lower = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(
                        self.weights().unsafe_offset(64 * TILE_K + i * 16)
                    ),
                    tokens,
                    lower,
                )
            wgmma_commit_group_sync()
            wgmma_wait_group_sync[1]()
            if step > 0:
                self.release(last)
            last = self.stage
            self.step()
        wgmma_wait_group_sync()
        self.release(last)
        return (upper, lower)


@always_inline
def descriptor(tile: SharedTile) -> WGMMADescriptor[BF16]:
    """Of swizzled rows of `TILE_K` columns: 8 rows are 64 units of 16 bytes, and a step along k is 32 bytes into a row.
    """
    return WGMMADescriptor.create[64, 1, SWIZZLE](tile)
