"""Joins what the blocks of a cluster have of a request's attention, on NVIDIA: `Σ_p 2^(m_p - m) o_p / Σ_p 2^(m_p - m) l_p`.

Each block leaves its rows' weighted values `o`, largest score `m` (times log2 e) and sum of weights `l` in its shared
memory; all blocks then join a share of the rows each, which they read from one another.
"""

from max.gpu import lane_id, warp_id
from max.gpu.primitives import warp
from std.math import ceildiv, exp2
from std.utils.static_tuple import StaticTuple

from .attend_rows_gpu import RowPair
from .dense_split_gpu import load_peer, peer_address
from .few_tokens_gpu import FewTokens
from .head_gate_gpu import gate_factor
from .key_tiles_gpu import HEAD_DIM

comptime SharedFloats = Pointer[
    Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]

comptime ROW_FLOATS = HEAD_DIM + 8
"""A row in shared memory: its values, `m` and `l`; with the rest eight rows' same columns lie in other banks."""

comptime MOST_PARTS = 8
"""Blocks of the largest cluster that every Hopper GPU takes."""


@always_inline
def leave_rows(to: SharedFloats, first: Int, rows: RowPair):
    """A warp leaves its 16 rows, from `first` on, for all; `rows.total` is the whole row's.
    """
    comptime for half in range(2):
        var row = to.unsafe_offset(
            (first + 8 * half + Int(lane_id()) // 4) * ROW_FLOATS
        )
        var column = Int(lane_id()) % 4 * 2
        comptime for n in range(HEAD_DIM // 8):
            row.unsafe_offset(8 * n + column).unsafe_store[alignment=8](
                rows.sums[n].slice[2, offset=2 * half]()
            )
        if column == 0:
            row.unsafe_offset(HEAD_DIM).unsafe_store[alignment=8](
                SIMD[DType.float32, 2](rows.largest[half], rows.total[half])
            )


@always_inline
def query_of[
    weight_dtype: DType, //
](few: FewTokens[weight_dtype], first: Int, key_head: Int, row: Int) -> Int:
    """The place of a request's row of one key head among the batch's queries `[T, heads]`; `first` is its first token.
    """
    var group = few.queries.heads // few.queries.key_heads
    var token, head = divmod(UInt32(row), UInt32(group))
    return (
        (first + Int(token)) * few.queries.heads + key_head * group + Int(head)
    )


@always_inline
def own_gate[
    weight_dtype: DType, //, WARPS: Int
](
    few: FewTokens[weight_dtype],
    request: Int,
    key_head: Int,
    part: Int,
    parts: Int,
) -> Float32:
    """The gate of the lane's row: of those that its warp joins, number `lane`.
    """
    var group = few.queries.heads // few.queries.key_heads
    var row = part * WARPS + Int(warp_id()) + Int(lane_id()) * parts * WARPS
    if row >= few.count(request) * group:
        return 0
    var place = query_of(few, few.first_token(request), key_head, row)
    return gate_factor(few.gate[unsafe_offset=place].cast[DType.float32]())


@always_inline
def join_rows[
    weight_dtype: DType, //, PARTS: Int, WARPS: Int
](
    few: FewTokens[weight_dtype],
    rows: SharedFloats,
    gate: Float32,
    request: Int,
    key_head: Int,
    part: Int,
):
    """A block joins its share of a request's rows of one key head and stores them, times the gates of their heads.

    Parameters:
        weight_dtype: Type of the norms' weights.
        PARTS: Blocks that have a part of the keys each.
        WARPS: Of a block.

    Args:
        few: The batch.
        rows: Where each block has left its rows.
        gate: See `own_gate`.
        request: Whose rows.
        key_head: Of which head.
        part: Which block this is.
    """
    var group = few.queries.heads // few.queries.key_heads
    var first_token = few.first_token(request)
    var own = Int32(Int(rows))
    var lane = Int(lane_id())
    var first = part * WARPS + Int(warp_id())
    for i in range(ceildiv(few.count(request) * group - first, PARTS * WARPS)):
        var row = first + i * (PARTS * WARPS)
        var at = own + Int32(row * ROW_FLOATS * 4)
        var softmax = StaticTuple[SIMD[DType.float32, 4], PARTS]()
        var values = StaticTuple[SIMD[DType.float32, 4], PARTS]()
        comptime for p in range(PARTS):
            var place = at
            comptime if PARTS > 1:
                place = peer_address(at, p)
            softmax[p] = load_peer(place + Int32(HEAD_DIM * 4))
            values[p] = load_peer(place + Int32(lane * 16))
        var largest = softmax[0][0]
        comptime for p in range(1, PARTS):
            largest = max(largest, softmax[p][0])
        var whole = Float32(0)
        var sums = SIMD[DType.float32, 4](0)
        comptime for p in range(PARTS):
            var weight = exp2(softmax[p][0] - largest)
            whole += weight * softmax[p][1]
            sums += weight * values[p]
        sums *= warp.shuffle_idx(gate, UInt32(i)) / whole
        var query = query_of(few, first_token, key_head, row)
        few.queries.result.unsafe_offset(
            query * HEAD_DIM + lane * 4
        ).unsafe_store[alignment=8](sums.cast[DType.bfloat16]())
