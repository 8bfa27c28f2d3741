"""Few new tokens a request on a GPU: what attention begins with, and the keys and values that they add to the cache."""

from max.gpu import WARP_SIZE, lane_id, warp_id
from max.gpu.primitives import warp
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.math import rsqrt

from .attend_gpu import Queries
from .heads import HeadForm
from .key_tiles_gpu import HEAD_DIM
from .operands import Elements

comptime BF16 = DType.bfloat16

comptime WIDTH = HEAD_DIM // WARP_SIZE
"""Elements of a head that a lane has: with 32 lanes four neighbours."""

comptime Values = SIMD[DType.float32, WIDTH]


@fieldwise_init
struct FewTokens[weight_dtype: DType](DevicePassable, TrivialRegisterPassable):
    """Projections of a ragged batch, as they are before norms and rotations, and where the gated results go.
    """

    var queries: Queries[BF16]
    """`q` are the projections."""
    var k: Elements[BF16]
    """Projected keys `[T, key heads * HEAD_DIM]`."""
    var v: Elements[BF16]
    """Projected values, as `k`."""
    var gate: Elements[BF16]
    """Logits of the heads' gates `[T, heads]`."""
    var form: HeadForm[Self.weight_dtype]

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "FewTokens"

    @always_inline
    def first_token(self, request: Int) -> Int:
        """A request's first row in the batch."""
        return Int(self.queries.row_offsets[unsafe_offset=request])

    @always_inline
    def count(self, request: Int) -> Int:
        """New tokens of a request."""
        return self.first_token(request + 1) - self.first_token(request)

    @always_inline
    def cached(self, request: Int) -> Int:
        """Positions of a request before its new tokens."""
        return Int(self.queries.cache_lengths[unsafe_offset=request])


@always_inline
def store_new_keys[
    weight_dtype: DType, //, HALF: Int, WARPS: Int
](
    few: FewTokens[weight_dtype],
    request: Int,
    key_head: Int,
    begin: Int,
    end: Int,
):
    """A block writes one head's new keys, normed and rotated, and values to the cache: those at the positions `begin` to
    `end`, a warp each.

    Column `i` of a head pairs with `i + HALF`.
    """
    comptime PAIR = HALF // WIDTH
    comptime assert 2 * HALF <= HEAD_DIM and PAIR & (PAIR - 1) == 0
    var column = Int(lane_id()) * WIDTH
    var first_token = few.first_token(request)
    var cached = few.cached(request)
    for token in range(
        max(begin - cached, 0) + Int(warp_id()),
        min(end - cached, few.count(request)),
        WARPS,
    ):
        var source = (
            (first_token + token) * few.queries.key_heads + key_head
        ) * HEAD_DIM + column
        var values = read_four(few.k.unsafe_offset(source))
        var added = few.v.unsafe_offset(source).unsafe_load[
            width=WIDTH, alignment=8
        ]()
        var squares = warp.sum((values * values).reduce_add())
        values *= rsqrt(squares / HEAD_DIM + few.form.eps) * (
            few.form.offset + read_four(few.form.k_weight.unsafe_offset(column))
        )
        var partners = Values(0)
        comptime for i in range(WIDTH):
            partners[i] = warp.shuffle_xor(values[i], UInt32(PAIR))
        if column < 2 * HALF:
            var angles = few.form.angles.unsafe_offset(
                (first_token + token) * 2 * HALF + column % HALF
            )
            var sines = angles.unsafe_offset(HALF).unsafe_load[
                width=WIDTH, alignment=16
            ]()
            if column < HALF:
                sines = -sines
            values = (
                values * angles.unsafe_load[width=WIDTH, alignment=16]()
                + partners * sines
            )
        var to = few.queries.cache.keys(request, cached + token).unsafe_offset(
            key_head * HEAD_DIM + column
        )
        to.unsafe_store[alignment=8](values.cast[BF16]())
        to.unsafe_offset(few.queries.cache.value_offset).unsafe_store[
            alignment=8
        ](added)


@always_inline
def read_four[dtype: DType, //](source: Elements[dtype]) -> Values:
    """Four neighbouring elements in float32."""
    return source.unsafe_load[width=WIDTH, alignment=8]().cast[DType.float32]()
