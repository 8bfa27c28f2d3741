"""Two rings of shared-memory stages for a grouped product: one of weights, which come from memory, and a shorter one of
tokens, which several tiles share in the second-level cache.

Weights on their way cover the memory's latency, so that most of the shared memory is theirs where tokens leave room.
"""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile
from max.gpu import lane_id, thread_idx
from max.gpu.compute.mma import (
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.memory import CacheEviction, external_memory, fence_mbarrier_init
from std.memory import unsafe_stack_allocation

from .dense_ring_gpu import (
    BF16,
    Barriers,
    MULTIPLIERS,
    SharedTile,
    Sums,
    TileRing,
    descriptor,
)
from layout.tma_async import SharedMemBarrier
from .grouped_tiles_gpu import TILE_K, TILE_M

comptime WEIGHTS_LOADER = MULTIPLIERS // 32
"""Index of the warp that loads weights."""

comptime TOKENS_LOADER = WEIGHTS_LOADER + 1
"""Index of the warp that loads tokens."""

comptime GROUPED_THREADS = MULTIPLIERS + 64


struct StageCursor[STAGES: Int](ImplicitlyCopyable):
    """One thread's place among stages, with the barriers that say which are full and which are empty.
    """

    var full: Barriers
    var empty: Barriers
    var stage: Int
    var phase: UInt32

    @always_inline
    def __init__(out self, users: Int):
        """A stage is empty when `users` warps are done with it. Every thread of the block must call it and then wait at
        a barrier of the block or the cluster.
        """
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
                self.empty[unsafe_offset=i].init(Int32(users))
            fence_mbarrier_init()

    @always_inline
    def step(mut self):
        self.stage += 1
        if self.stage == Self.STAGES:
            self.stage = 0
            self.phase ^= 1

    @always_inline
    def wait_full(self):
        self.full[unsafe_offset=self.stage].wait(self.phase)

    @always_inline
    def wait_empty(self):
        self.empty[unsafe_offset=self.stage].wait(self.phase ^ 1)

    @always_inline
    def expect(self, rows: Int):
        """The calling thread announces so many rows for the stage."""
        self.full[unsafe_offset=self.stage].expect_bytes(
            Int32(rows * TILE_K * 2)
        )


struct GroupedRing[N: Int, WEIGHT_STAGES: Int, TOKEN_STAGES: Int, SHARERS: Int](
    ImplicitlyCopyable, TileRing
):
    """One thread's place in both rings. A stage holds `[TILE_M, TILE_K]` of weights or `[N, TILE_K]` of tokens, swizzled.

    The `SHARERS` blocks of a cluster each bring a part of the tokens to all of them, so that a stage of tokens is free
    when every one of them is done with it; weights are a block's own.
    """

    comptime BYTES = (
        Self.WEIGHT_STAGES * TILE_M + Self.TOKEN_STAGES * Self.N
    ) * TILE_K * 2

    var base: SharedTile
    var weights: StageCursor[Self.WEIGHT_STAGES]
    var tokens: StageCursor[Self.TOKEN_STAGES]

    @always_inline
    def __init__(out self):
        """Every thread of the block must call it and then wait at a barrier of the block or the cluster.
        """
        self.base = external_memory[
            BFloat16, address_space=AddressSpace.SHARED, alignment=1024
        ]()
        comptime WARPS = MULTIPLIERS // 32
        self.weights = StageCursor[Self.WEIGHT_STAGES](WARPS)
        self.tokens = StageCursor[Self.TOKEN_STAGES](WARPS * Self.SHARERS)

    @always_inline
    def weight_tile(self) -> SharedTile:
        return self.base.unsafe_offset(self.weights.stage * TILE_M * TILE_K)

    @always_inline
    def token_tile(self) -> SharedTile:
        return self.base.unsafe_offset(
            (Self.WEIGHT_STAGES * TILE_M + self.tokens.stage * Self.N) * TILE_K
        )

    @always_inline
    def load_weights[
        TENSORS: Int,
        EVICTION: CacheEviction,
        *,
        shape: Coord,
        desc: Coord,
    ](
        mut self,
        first: TMATensorTile[BF16, shape, desc],
        second: TMATensorTile[BF16, shape, desc],
        row: Int,
        column: Int,
    ):
        """The calling thread brings the next stage of weights: an equal part of each tensor, one behind the other.

        Args:
            first: Weights `[M, K]`.
            second: As `first`; the other tensor if `TENSORS` is 2.
            row: First row in each tensor; rows behind the last become zero.
            column: First column, likewise.
        """
        comptime ROWS = TILE_M // TENSORS
        self.weights.wait_empty()
        self.weights.expect(TILE_M)
        comptime for i in range(TENSORS):
            var to = TileTensor(
                self.weight_tile().unsafe_offset(i * ROWS * TILE_K),
                row_major[ROWS, TILE_K](),
            )
            comptime if i == 0:
                first.async_copy[eviction_policy=EVICTION](
                    to,
                    self.weights.full[unsafe_offset=self.weights.stage],
                    (column, row),
                )
            else:
                second.async_copy[eviction_policy=EVICTION](
                    to,
                    self.weights.full[unsafe_offset=self.weights.stage],
                    (column, row),
                )
        self.weights.step()

    @always_inline
    def load_tokens[
        BOX: Int, shape: Coord, desc: Coord
    ](
        mut self,
        x: TMATensorTile[BF16, shape, desc],
        rank: Int,
        boxes: Int,
        token: Int,
        column: Int,
    ):
        """The calling thread brings its block's part of the next stage of tokens to every block of the cluster.

        Args:
            x: Tokens `[T, K]`.
            rank: The block's rank in the cluster.
            boxes: Copies of `BOX` tokens each that make the stage; the blocks take turns.
            token: First token; tokens behind the last become zero.
            column: First column, likewise.
        """
        self.tokens.wait_empty()
        self.tokens.expect(boxes * BOX)
        for box in range(rank, boxes, Self.SHARERS):
            var to = TileTensor(
                self.token_tile().unsafe_offset(box * BOX * TILE_K),
                row_major[BOX, TILE_K](),
            )
            var at = (column, token + box * BOX)
            comptime if Self.SHARERS == 1:
                x.async_copy(
                    to, self.tokens.full[unsafe_offset=self.tokens.stage], at
                )
            else:
                x.async_multicast_load(
                    to,
                    self.tokens.full[unsafe_offset=self.tokens.stage],
                    at,
                    UInt16((1 << Self.SHARERS) - 1),
                )
        self.tokens.step()

    @always_inline
    def await_peers(mut self):
        """Waits until no other block will signal this one's barriers any more.
        """
        comptime if Self.SHARERS > 1:
            comptime for _ in range(Self.TOKEN_STAGES):
                self.tokens.wait_empty()
                self.tokens.step()

    @always_inline
    def release(self, weight_stage: Int, token_stage: Int):
        """A multiplying warp is done with a stage of each ring."""
        if lane_id() == 0:
            _ = self.weights.empty[unsafe_offset=weight_stage].arrive()
        comptime if Self.SHARERS == 1:
            if lane_id() == 0:
                _ = self.tokens.empty[unsafe_offset=token_stage].arrive()
        else:
            if Int(lane_id()) < Self.SHARERS:
                self.tokens.empty[unsafe_offset=token_stage].arrive_cluster(
                    UInt32(lane_id())
                )

    @always_inline
    def next(mut self):
        """Goes to the next stage of each ring."""
        self.weights.step()
        self.tokens.step()

    @always_inline
    def multiply[
        COLUMNS: Int
    ](mut self, group: Int, steps: Int) -> Sums[COLUMNS]:
        var sums = Sums[COLUMNS](fill=0)
        var weight_stage = 0
        var token_stage = 0
        for step in range(steps):
            self.weights.wait_full()
            self.tokens.wait_full()
            wgmma_fence_aligned()
            comptime for i in range(TILE_K // 16):
                sums = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(
                        self.weight_tile().unsafe_offset(
                            group * 64 * TILE_K + i * 16
                        )
                    ),
                    descriptor(self.token_tile().unsafe_offset(i * 16)),
                    sums,
                )
            wgmma_commit_group_sync()
            wgmma_wait_group_sync[1]()
            if step > 0:
                self.release(weight_stage, token_stage)
            weight_stage = self.weights.stage
            token_stage = self.tokens.stage
            self.next()
        wgmma_wait_group_sync()
        self.release(weight_stage, token_stage)
        return sums

    @always_inline
    def multiply_both[
        COLUMNS: Int
    ](mut self, group: Int, steps: Int) -> Tuple[Sums[COLUMNS], Sums[COLUMNS]]:
        var upper = Sums[COLUMNS](fill=0)
        var lower = Sums[COLUMNS](fill=0)
        var weight_stage = 0
        var token_stage = 0
        for step in range(steps):
            self.weights.wait_full()
            self.tokens.wait_full()
            wgmma_fence_aligned()
            comptime for i in range(TILE_K // 16):
                var tokens = descriptor(
                    self.token_tile().unsafe_offset(
                        group * COLUMNS * TILE_K + i * 16
                    )
                )
                upper = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(self.weight_tile().unsafe_offset(i * 16)),
                    tokens,
                    upper,
                )
                lower = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](
                    descriptor(
                        self.weight_tile().unsafe_offset(64 * TILE_K + i * 16)
                    ),
                    tokens,
                    lower,
                )
            wgmma_commit_group_sync()
            wgmma_wait_group_sync[1]()
            if step > 0:
                self.release(weight_stage, token_stage)
            weight_stage = self.weights.stage
            token_stage = self.tokens.stage
            self.next()
        wgmma_wait_group_sync()
        self.release(weight_stage, token_stage)
        return (upper, lower)
