"""The ring of shared-memory stages between the warps that load and the warps that multiply."""

from layout.tma_async import SharedMemBarrier
from max.gpu import lane_id, thread_idx
from max.gpu.memory import external_memory, fence_mbarrier_init
from std.memory import unsafe_stack_allocation
from std.sys._assembly import inlined_assembly

from .grouped_tiles_gpu import TILE_K, TILE_M

comptime LOADERS = 128
"""Threads that load."""

comptime MULTIPLIER_WARPS = 8
"""Warps that multiply: two groups of 64 weight rows."""

comptime WEIGHT_BYTES = TILE_M * TILE_K * 2

comptime SharedTile = Pointer[
    BFloat16, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]

comptime Barriers = Pointer[
    SharedMemBarrier, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]


struct Ring[MAX_N: Int, STAGES: Int](ImplicitlyCopyable):
    """One thread's place in the ring. A stage holds `[TILE_M, TILE_K]` of weights and `[MAX_N, TILE_K]` of tokens, rows
    of 128 bytes whose 16-byte pieces are swizzled as TMA does it.
    """

    comptime BYTES = Self.STAGES * (TILE_M + Self.MAX_N) * TILE_K * 2

    var base: SharedTile
    var full: Barriers
    var empty: Barriers
    var stage: Int
    var phase: UInt32

    @always_inline
    def __init__(out self):
        """Every thread of the block must call it and then wait at a barrier."""
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
                # Each loader arrives once with its tokens, the first once more with the weights.
                self.full[unsafe_offset=i].init(Int32(LOADERS + 1))
                self.empty[unsafe_offset=i].init(Int32(MULTIPLIER_WARPS))
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
            (Self.STAGES * TILE_M + self.stage * Self.MAX_N) * TILE_K
        )

    @always_inline
    def wait_full(self):
        self.full[unsafe_offset=self.stage].wait(self.phase)

    @always_inline
    def wait_empty(self):
        self.empty[unsafe_offset=self.stage].wait(self.phase ^ 1)

    @always_inline
    def release(self, stage: Int):
        """A multiplying warp is done with a stage."""
        if lane_id() == 0:
            _ = self.empty[unsafe_offset=stage].arrive()

    @always_inline
    def arrive_with_copies(self):
        """The stage's full barrier counts this thread when its copies so far have landed.
        """
        inlined_assembly[
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
            NoneType,
            constraints="r,~{memory}",
        ](Int32(Int(self.full.unsafe_offset(self.stage))))


@always_inline
def copy_piece(to: SharedTile, source: Int, bytes: Int32):
    """Starts a copy of 16 bytes from global memory, of which those after `bytes` become zero.
    """
    inlined_assembly[
        "cp.async.cg.shared.global [$0], [$1], 16, $2;",
        NoneType,
        constraints="r,l,r,~{memory}",
    ](Int32(Int(to)), Int64(source), bytes)
