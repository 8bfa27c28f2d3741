"""Stores of a warp group's results by copies from shared memory, which go on while it multiplies the next tile."""

from layout import Coord
from layout.tma_async import TMATensorTile
from max.gpu import thread_idx
from max.gpu.primitives.cluster import elect_one_sync
from std.sys._assembly import inlined_assembly

from .dense_maps_gpu import BF16
from .dense_output_gpu import DenseOutput
from .dense_ring_gpu import SharedTile, Sums
from .dense_store_gpu import (
    STAGED_TOKENS,
    STAGING_BYTES,
    TileStore,
    TokenRange,
    group_barrier,
    piece_offset,
    stage_tokens,
)
from .operands import Elements

comptime STORED_TOKENS = 16
"""Tokens whose results one copy stores."""


@fieldwise_init
struct CopyStore[shape: Coord, desc: Coord](ImplicitlyCopyable, TileStore):
    """By copies of `STORED_TOKENS` tokens, and by its threads where an expert has fewer left: behind them lies what
    other blocks store.

    Pieces lie in shared memory as the map's swizzle has them, of 128 bytes a token or of 64.
    """

    var map: Pointer[
        TMATensorTile[BF16, Self.shape, Self.desc], ImmUntrackedOrigin
    ]
    """Of the results `[assignments, features]`, where it lies among the kernel's parameters."""
    var staging: SharedTile
    """The group's first room for `STAGED_TOKENS` tokens; the second lies behind both groups' first."""

    @always_inline
    def store[
        D: DenseOutput, //, N: Int
    ](self, output: D, rows: TokenRange, sums: Sums[N], group: Int, row: Int):
        comptime PIECES = 4 * D.MATRICES
        var results = rebind[Elements[DType.bfloat16]](output.results())
        var thread = Int(thread_idx.x) % 128
        var copies = thread < 32
        comptime for begin in range(0, N, STAGED_TOKENS):
            comptime PASS = begin // STAGED_TOKENS
            comptime COUNT = min(STAGED_TOKENS, N - begin)
            var staging = self.staging.unsafe_offset(
                PASS % 2 * STAGING_BYTES // 2
            )
            # The first waits for the last tile's copies, so that the second need not wait.
            comptime if PASS != 1:
                if copies and elect_one_sync():
                    await_reads[1 if PASS > 1 else 0]()
            group_barrier(group)
            stage_tokens[N, begin, COUNT](output, sums, staging)
            show_copies()
            group_barrier(group)
            var count = min(max(rows.end - rows.first - begin, 0), COUNT)
            var copied = count // STORED_TOKENS * STORED_TOKENS
            if copies and elect_one_sync():
                for t in range(0, copied, STORED_TOKENS):
                    start_store(
                        Pointer(to=self.map[].descriptor),
                        staging.unsafe_offset(t * PIECES * 8),
                        row,
                        rows.first + begin + t,
                    )
                commit_stores()
            var t = copied + thread // PIECES
            var to = row + thread % PIECES * 8
            if t < count and to < output.features():
                results.unsafe_offset(
                    (rows.first + begin + t) * output.features() + to
                ).unsafe_store[alignment=16](
                    staging.unsafe_offset(
                        piece_offset[PIECES](t, thread % PIECES)
                    ).unsafe_load[width=8, alignment=16]()
                )

    @always_inline
    def finish(self):
        """What the group has stored is there when it ends."""
        if Int(thread_idx.x) % 128 < 32 and elect_one_sync():
            await_stores()


@always_inline
def show_copies():
    """What the thread has written to shared memory is there for copies that start behind a barrier.
    """
    inlined_assembly[
        "fence.proxy.async.shared::cta;", NoneType, constraints="~{memory}"
    ]()


@always_inline
def start_store(map: Pointer[...], source: SharedTile, column: Int, row: Int):
    """The calling thread starts a copy to memory; columns and rows behind the last are left out.
    """
    inlined_assembly[
        (
            "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [$0, {$1,"
            " $2}], [$3];"
        ),
        NoneType,
        constraints="l,r,r,r,~{memory}",
    ](map, Int32(column), Int32(row), Int32(Int(source)))


@always_inline
def commit_stores():
    """The copies that the calling thread has started since the last call are a group.
    """
    inlined_assembly[
        "cp.async.bulk.commit_group;", NoneType, constraints="~{memory}"
    ]()


@always_inline
def await_reads[PENDING: Int]():
    """Waits until all but the last `PENDING` groups have read shared memory."""
    inlined_assembly[
        "cp.async.bulk.wait_group.read $0;",
        NoneType,
        constraints="n,~{memory}",
    ](Int32(PENDING))


@always_inline
def await_stores():
    """Waits until all groups are in memory."""
    inlined_assembly[
        "cp.async.bulk.wait_group 0;", NoneType, constraints="~{memory}"
    ]()
