"""Stores of a warp group's sums. In bfloat16 they are brought in order in shared memory, so that whole lines go to memory;
in float32 a warp's stores fill sectors of 32 bytes as they are."""

from max.gpu import lane_id, thread_idx
from std.math import ceildiv
from std.memory import bitcast
from std.sys._assembly import inlined_assembly
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import DenseOutput, LinearOutput, Quad
from .dense_ring_gpu import DenseRing, SharedTile, Sums
from .operands import Elements

comptime STAGED_TOKENS = 64
"""Tokens whose results a warp group brings in order at a time."""


@fieldwise_init
struct TokenRange(ImplicitlyCopyable):
    """A tile's tokens `first` ... go to the rows of the same numbers, those from `end` on nowhere.
    """

    var first: Int
    var end: Int

    @always_inline
    def row(self, token: Int) -> Int:
        """Row of the tile's `token`; negative where there is none."""
        return self.first + token if self.first + token < self.end else -1

    @always_inline
    def behind(self, tokens: Int) -> Self:
        """Those of the tile's tokens from `tokens` on."""
        return Self(self.first + tokens, self.end)


comptime STAGING_BYTES = 2 * STAGED_TOKENS * 128
"""Shared memory for what both warp groups bring in order."""

comptime PIECES = 8
"""Pieces of 16 bytes of a token's results of 64 weight rows."""


@always_inline
def staging_of(base: SharedTile, begin: Int, group: Int) -> SharedTile:
    """A warp group's part of that memory, which begins `begin` bytes behind `base`.
    """
    return base.unsafe_offset(begin // 2 + group * STAGED_TOKENS * 64)


@always_inline
def store_tile[
    dtype: DType, //, N: Int
](
    output: LinearOutput[dtype],
    rows: TokenRange,
    sums: Sums[N],
    staging: SharedTile,
    group: Int,
    row: Int,
):
    """A warp group stores its 64 weight rows' results.

    Args:
        output: The product.
        rows: Where the tile's tokens go.
        sums: The thread's sums.
        staging: The group's room for `STAGED_TOKENS` tokens.
        group: Index of the warp group, 0 or 1.
        row: First result of the group.
    """
    comptime if dtype == DType.bfloat16:
        store_lines[N](
            LinearOutput(
                rebind[Elements[DType.bfloat16]](output.y), output.out_features
            ),
            rows,
            sums,
            staging,
            group,
            row,
        )
    else:
        var of_warp = row + Int(thread_idx.x) % 128 // 32 * 16
        comptime for j in range(N // 8):
            output.store(
                Quad(
                    sums[4 * j],
                    sums[4 * j + 1],
                    sums[4 * j + 2],
                    sums[4 * j + 3],
                ),
                of_warp,
                rows.first + 8 * j,
                rows.end,
            )


@always_inline
def store_lines[
    N: Int
](
    output: LinearOutput[DType.bfloat16],
    rows: TokenRange,
    sums: Sums[N],
    staging: SharedTile,
    group: Int,
    row: Int,
):
    """`store_tile` in bfloat16, whole rows of results at a time."""
    var thread = Int(thread_idx.x) % 128
    var lane = Int(lane_id())
    var index = lane // 8
    var from_token = index // 2 * 8 + lane % 8
    var from_piece = thread // 32 * 2 + index % 2
    comptime for begin in range(0, N, STAGED_TOKENS):
        comptime COUNT = min(STAGED_TOKENS, N - begin)
        comptime PASSES = ceildiv(COUNT * PIECES, 128)
        group_barrier(group)
        # Looked up between the barriers: behind them the next tile's rows may come.
        var to_rows = StaticTuple[Int32, PASSES](fill=-1)
        comptime for i in range(PASSES):
            var t = (thread + i * 128) // PIECES
            # Behind `N` begins what another group stores.
            comptime if (i + 1) * 128 <= COUNT * PIECES:
                to_rows[i] = Int32(rows.row(begin + t))
            else:
                if t < COUNT:
                    to_rows[i] = Int32(rows.row(begin + t))
        comptime for j in range(0, COUNT // 8, 2):
            var words = StaticTuple[UInt32, 4](fill=0)
            comptime for m in range(4):
                comptime octet = j + m // 2
                comptime if octet < COUNT // 8:
                    comptime s = 4 * (begin // 8 + octet)
                    words[m] = bitcast[DType.uint32, 1](
                        output.matrix[m % 2](
                            Quad(sums[s], sums[s + 1], sums[s + 2], sums[s + 3])
                        )
                    )
            store_matrices(
                staging.unsafe_offset(
                    piece_offset(from_token + j * 8, from_piece)
                ),
                words,
            )
        group_barrier(group)
        comptime for i in range(PASSES):
            var place = thread + i * 128
            var t = place // PIECES
            var piece = place % PIECES
            var values = staging.unsafe_offset(
                piece_offset(t, piece)
            ).unsafe_load[width=8, alignment=16]()
            var to = row + piece * 8
            if to_rows[i] >= 0 and to < output.features():
                output.y.unsafe_offset(
                    Int(to_rows[i]) * output.features() + to
                ).unsafe_store[alignment=16](values)


@always_inline
def multiply_tile[
    D: DenseOutput,
    STAGES: Int,
    SHARERS: Int,
    MAX_N: Int,
    //,
    N: Int,
](
    output: D,
    rows: TokenRange,
    mut ring: DenseRing[MAX_N, STAGES, SHARERS],
    steps: Int,
    staging: SharedTile,
    group: Int,
    row: Int,
):
    """A warp group's half of a tile of `N` tokens, from the ring to the results.

    Of one weight tensor a group takes 64 rows with all tokens; of two it takes 64 rows of both with half of the tokens,
    so that a lane holds both sums of an activation.

    Args:
        output: The product.
        rows: Where the tile's tokens go.
        ring: The ring, whose loader brings the tile next.
        steps: Stages of the tile.
        staging: See `store_tile`.
        group: Index of the warp group, 0 or 1.
        row: First result of the tile.
    """
    comptime if D.TENSORS == 1:
        var sums = ring.multiply[N](group, steps)
        store_tile[N](
            output.plain(), rows, sums, staging, group, row + group * 64
        )
    else:
        comptime HALF = N // 2
        var first, second = ring.multiply_both[HALF](group, steps)
        var results = output.activated(first, second)
        store_tile[HALF](
            output.plain(),
            rows.behind(group * HALF),
            results,
            staging,
            group,
            row,
        )


@always_inline
def piece_offset(token: Int, piece: Int) -> Int:
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
