"""Rows of queries on NVIDIA's tensor cores, and their softmax as keys come.

A row of scores is softmaxed with the largest score so far: `m' = max(m, s)`, `l' = l 2^(m - m') + Σ 2^(s - m')`, and the
sums of values likewise (Milakov and Gimelshein 2018).
"""

from max.gpu import WARP_SIZE, barrier, lane_id
from max.gpu.primitives import warp
from std.math import exp2, rsqrt
from std.memory import bitcast
from std.utils.numerics import neg_inf

from .attend_gpu import Queries
from .few_tokens_gpu import FewTokens
from .key_tiles_gpu import (
    HEAD_DIM,
    SharedTile,
    chunk_offset,
    load_matrices,
)
from .qkv_gpu import read
from .stream_gpu import TileSums, multiply_add

comptime BFloatQueries = Queries[DType.bfloat16]


@fieldwise_init
struct Row(ImplicitlyCopyable):
    """One query: a head of a token."""

    var token: Int
    """In the ragged batch."""
    var head: Int
    var first: Int
    """The first key that it sees."""
    var position: Int
    """The last, which is its own."""
    var exists: Bool

    @always_inline
    def sees(self, position: Int) -> Bool:
        return position >= self.first and position <= self.position


@always_inline
def row_of(
    queries: BFloatQueries, request: Int, key_head: Int, index: Int
) -> Row:
    """The block's row `index`; one behind the last sees no key."""
    var group = queries.heads // queries.key_heads
    var begin = Int(queries.row_offsets[unsafe_offset=request])
    var tokens = Int(queries.row_offsets[unsafe_offset=request + 1]) - begin
    var token = Int(UInt32(index) // UInt32(group))
    var position = Int(queries.cache_lengths[unsafe_offset=request]) + token
    var first = 0
    if queries.window > 0:
        first = max(position - queries.window + 1, 0)
    if token >= tokens:
        return Row(0, 0, 1, 0, False)
    return Row(
        begin + token,
        key_head * group + index - token * group,
        first,
        position,
        True,
    )


struct RowPair(Movable):
    """A lane's two rows, their queries as left operands of `mma`, and their softmax so far.
    """

    var low: Row
    var high: Row
    var q: Array[SIMD[DType.uint32, 4], HEAD_DIM // 16]
    var sums: Array[TileSums, HEAD_DIM // 8]
    """Weighted values: elements 0, 1 of the low row, 2, 3 of the high one, of columns `8 n + 2 (lane % 4)` and the next."""
    var largest: SIMD[DType.float32, 2]
    """The largest score of each row so far, times log2 e."""
    var total: SIMD[DType.float32, 2]
    """The lane's part of the sum of weights."""

    @always_inline
    def __init__(out self, low: Row, high: Row):
        """Rows without queries as yet."""
        self.low = low
        self.high = high
        self.q = Array[SIMD[DType.uint32, 4], HEAD_DIM // 16](fill=0)
        self.sums = Array[TileSums, HEAD_DIM // 8](fill=0)
        self.largest = neg_inf[DType.float32]()
        self.total = 0

    @always_inline
    def prepare[
        weight_dtype: DType, //, HALF: Int
    ](mut self, few: FewTokens[weight_dtype]):
        """Norms and rotates the queries; column `i` of a head pairs with `i + HALF`.

        A lane has the columns `8 n + 2 (lane % 4)` and the next, partners among them.
        """
        comptime BLOCKS = HEAD_DIM // 8
        comptime PAIR = HALF // 8
        comptime Pair = SIMD[DType.float32, 2]
        var column = Int(lane_id()) % 4 * 2
        # All reads before the first use, so that memory answers them together.
        var values = Array[Pair, 2 * BLOCKS](fill=0)
        var cosines = Array[Pair, 2 * PAIR](fill=0)
        var sines = Array[Pair, 2 * PAIR](fill=0)
        var scales = Array[Pair, BLOCKS](fill=0)
        comptime for half in range(2):
            var row = self.low if half == 0 else self.high
            if row.exists:
                var source = few.queries.q.unsafe_offset(
                    (row.token * few.queries.heads + row.head) * HEAD_DIM
                    + column
                )
                comptime for n in range(BLOCKS):
                    values[half * BLOCKS + n] = read[2](source, 8 * n)
            # Rows that do not exist read the first token's.
            var angles = few.form.angles.unsafe_offset(
                row.token * 2 * HALF + column
            )
            comptime for n in range(PAIR):
                cosines[half * PAIR + n] = read[2](angles, 8 * n)
                sines[half * PAIR + n] = read[2](angles, HALF + 8 * n)
        comptime for n in range(BLOCKS):
            scales[n] = few.form.offset + read[2](
                few.form.q_weight, 8 * n + column
            )
        comptime for half in range(2):
            comptime at = half * BLOCKS
            var squares = Pair(0)
            comptime for n in range(BLOCKS):
                squares += values[at + n] * values[at + n]
            var sum = squares[0] + squares[1]
            comptime for distance in [1, 2]:
                sum += warp.shuffle_xor(sum, UInt32(distance))
            var scale = rsqrt(sum / HEAD_DIM + few.form.eps)
            comptime for n in range(BLOCKS):
                values[at + n] *= scale * scales[n]
            comptime for n in range(PAIR):
                var cosine = cosines[half * PAIR + n]
                var sine = sines[half * PAIR + n]
                var first = values[at + n]
                var second = values[at + n + PAIR]
                values[at + n] = first * cosine - second * sine
                values[at + n + PAIR] = second * cosine + first * sine
            comptime for k in range(HEAD_DIM // 16):
                comptime for part in range(2):
                    self.q[k][half + 2 * part] = packed(
                        values[at + 2 * k + part]
                    )

    @always_inline
    def attend[
        COUNT: Int
    ](
        mut self,
        keys: SharedTile,
        values: SharedTile,
        first: Int,
        position: Int,
        scale: Float32,
    ):
        """Takes `COUNT` keys of a tile, from its row `first` on; that row's key is at `position`.
        """
        var lane = Int(lane_id())
        var scores = Array[TileSums, COUNT // 8](fill=0)
        comptime for n in range(COUNT // 8):
            # Matrices of eight keys: four chunks of 8 columns behind one another.
            var key = first + 8 * n + lane % 8
            comptime for k in range(0, HEAD_DIM // 16, 2):
                var b = load_matrices[False](
                    keys.unsafe_offset(chunk_offset(key, 2 * k + lane // 8))
                )
                scores[n] = multiply_add_words(self.q[k], b[0], b[1], scores[n])
                scores[n] = multiply_add_words(
                    self.q[k + 1], b[2], b[3], scores[n]
                )
        var now = self.largest
        comptime for n in range(COUNT // 8):
            comptime for i in range(2):
                var at = position + 8 * n + lane % 4 * 2 + i
                scores[n][i] = (
                    scores[n][i]
                    * scale if self.low.sees(at) else neg_inf[DType.float32]()
                )
                scores[n][2 + i] = (
                    scores[n][2 + i]
                    * scale if self.high.sees(at) else neg_inf[DType.float32]()
                )
                now[0] = max(now[0], scores[n][i])
                now[1] = max(now[1], scores[n][2 + i])
        var base = self.rebase(of_quad[largest=True](now))
        comptime for n in range(COUNT // 8):
            scores[n] = exp2(scores[n] - both_rows(base))
            self.total[0] += scores[n][0] + scores[n][1]
            self.total[1] += scores[n][2] + scores[n][3]
        comptime for k in range(COUNT // 16):
            var weights = SIMD[DType.uint32, 4](
                packed(scores[2 * k].slice[2]()),
                packed(scores[2 * k].slice[2, offset=2]()),
                packed(scores[2 * k + 1].slice[2]()),
                packed(scores[2 * k + 1].slice[2, offset=2]()),
            )
            var key = first + 16 * k + lane % 16
            comptime for n in range(0, HEAD_DIM // 8, 2):
                var b = load_matrices[True](
                    values.unsafe_offset(chunk_offset(key, n + lane // 16))
                )
                self.sums[n] = multiply_add_words(
                    weights, b[0], b[1], self.sums[n]
                )
                self.sums[n + 1] = multiply_add_words(
                    weights, b[2], b[3], self.sums[n + 1]
                )

    @always_inline
    def rebase(
        mut self, largest: SIMD[DType.float32, 2]
    ) -> SIMD[DType.float32, 2]:
        """Brings what was added up so far to larger scores; returns what is now to be subtracted from scores.
        """
        # A row that has seen no key yet: nothing to subtract.
        var base = largest.eq(neg_inf[DType.float32]()).select(
            SIMD[DType.float32, 2](0), largest
        )
        var shrink = exp2(self.largest - base)
        self.largest = largest
        self.total *= shrink
        comptime for n in range(HEAD_DIM // 8):
            self.sums[n] *= both_rows(shrink)
        return base


@always_inline
def both_rows(values: SIMD[DType.float32, 2]) -> TileSums:
    """A value of each row beside a lane's sums of both."""
    return TileSums(values[0], values[0], values[1], values[1])


@always_inline
def multiply_add_words(
    a: SIMD[DType.uint32, 4], b0: UInt32, b1: UInt32, sums: TileSums
) -> TileSums:
    """Adds the product of a 16 x 16 matrix and a 16 x 8 one; `a` in the order of `mma`.
    """
    return multiply_add(
        SIMD[DType.uint32, 2](a[0], a[2]),
        SIMD[DType.uint32, 2](a[1], a[3]),
        SIMD[DType.uint32, 2](b0, b1),
        sums,
    )


@always_inline
def packed(values: SIMD[DType.float32, 2]) -> UInt32:
    return bitcast[DType.uint32, 1](values.cast[DType.bfloat16]())


@always_inline
def of_quad[
    *, largest: Bool
](values: SIMD[DType.float32, 2]) -> SIMD[DType.float32, 2]:
    """The largest value, or the sum, of the four lanes that share rows."""
    var all = values
    comptime for distance in [1, 2]:
        comptime for i in range(2):
            var other = warp.shuffle_xor(all[i], UInt32(distance))
            comptime if largest:
                all[i] = max(all[i], other)
            else:
                all[i] += other
    return all


comptime GROUP_FLOATS = (4 * (HEAD_DIM // 8) + 4) * WARP_SIZE
"""What a warp hands to the one that joins its sums."""


@always_inline
def join_groups[
    ROW_TILES: Int, GROUPS: Int
](mut rows: RowPair, shared: SharedTile, row_tile: Int, group: Int):
    """The warps that took other keys of the same rows hand their sums to the first of them, which joins them in order.

    All threads of the block must be done with the tiles.
    """
    comptime if GROUPS == 1:
        return
    comptime TOTALS = 4 * (HEAD_DIM // 8) * WARP_SIZE
    var floats = shared.unsafe_bitcast[Float32]()
    if group > 0:
        var to = floats.unsafe_offset(
            ((group - 1) * ROW_TILES + row_tile) * GROUP_FLOATS
            + Int(lane_id()) * 4
        )
        comptime for n in range(HEAD_DIM // 8):
            to.unsafe_offset(n * 4 * WARP_SIZE).unsafe_store[alignment=16](
                rows.sums[n]
            )
        to.unsafe_offset(TOTALS).unsafe_store[alignment=16](
            rows.largest.join(rows.total)
        )
    barrier()
    if group > 0:
        return
    comptime for other in range(GROUPS - 1):
        var source = floats.unsafe_offset(
            (other * ROW_TILES + row_tile) * GROUP_FLOATS + Int(lane_id()) * 4
        )
        var softmax = source.unsafe_offset(TOTALS).unsafe_load[
            width=4, alignment=16
        ]()
        var largest = softmax.slice[2]()
        var weight = exp2(largest - rows.rebase(max(rows.largest, largest)))
        rows.total += softmax.slice[2, offset=2]() * weight
        comptime for n in range(HEAD_DIM // 8):
            rows.sums[n] += source.unsafe_offset(n * 4 * WARP_SIZE).unsafe_load[
                width=4, alignment=16
            ]() * both_rows(weight)
