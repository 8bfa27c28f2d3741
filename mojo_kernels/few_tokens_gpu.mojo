"""Few new tokens a request on a GPU: what attention begins with, and the keys and values that they add to the cache."""

from max.gpu import lane_id, warp_id
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from .attend_gpu import Queries
from .heads import HeadForm
from .key_tiles_gpu import HEAD_DIM
from .operands import Elements
from .qkv_gpu import WIDTH, head_gpu

comptime BF16 = DType.bfloat16


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
    weight_dtype: DType, //, WARPS: Int
](
    few: FewTokens[weight_dtype],
    request: Int,
    key_head: Int,
    begin: Int,
    end: Int,
):
    """A block writes one head's new keys, normed and rotated, and values to the cache: those at the positions `begin` to
    `end`, a warp each.
    """
    var column = Int(lane_id()) * WIDTH
    var first_token = few.first_token(request)
    var cached = few.cached(request)
    for token in range(
        max(begin - cached, 0) + Int(warp_id()),
        min(end - cached, few.count(request)),
        WARPS,
    ):
        var row = first_token + token
        var source = (row * few.queries.key_heads + key_head) * HEAD_DIM
        var to = few.queries.cache.keys(request, cached + token).unsafe_offset(
            key_head * HEAD_DIM
        )
        head_gpu[True, WIDTH](
            to,
            few.k.unsafe_offset(source),
            few.form.k_weight,
            few.form.angles.unsafe_offset(row * 2 * few.form.half),
            HEAD_DIM,
            few.form,
        )
        to.unsafe_offset(few.queries.cache.value_offset + column).unsafe_store[
            alignment=8
        ](
            few.v.unsafe_offset(source + column).unsafe_load[
                width=WIDTH, alignment=8
            ]()
        )
