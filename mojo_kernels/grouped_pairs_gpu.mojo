"""Stores of WGMMA's sums to rows of tokens."""

from max.gpu import lane_id
from std.memory import bitcast
from std.sys._assembly import inlined_assembly

from .operands import Elements

comptime Pair = SIMD[DType.bfloat16, 2]
"""Two neighbouring columns (tokens) of one row (of weights): lane `l` of a warp holds columns `2 (l % 4)` and
`2 (l % 4) + 1` of row `l // 4` of an 8 x 8 matrix."""


@always_inline
def store_transposed(to: Elements[DType.bfloat16], pair: Pair, stored: Bool):
    """Stores the warp's 8 x 8 matrix by columns.

    Args:
        to: Where column `lane // 4` of this lane's matrix begins: eight values.
        pair: This lane's part of the matrix.
        stored: Whether that column is stored. All lanes must call.
    """
    var moved = inlined_assembly[
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        UInt32,
        constraints="=r,r",
    ](bitcast[DType.uint32, 1](pair))
    if stored:
        to.unsafe_offset(Int(lane_id()) % 4 * 2).unsafe_store[alignment=4](
            bitcast[DType.bfloat16, 2](moved)
        )
