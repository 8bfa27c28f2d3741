"""Few new tokens a request on a GPU: what attention begins with, and the keys and values that they add to the cache."""

from max.gpu import lane_id, warp_id
from max.gpu.primitives import warp
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.math import rsqrt

from .attend_gpu import Queries
from .heads import HeadForm
from .key_tiles_gpu import HEAD_DIM, KEYS, SharedTile, chunk_offset
from .operands import Elements
from .qkv_gpu import WIDTH, read

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


struct NewKey[HALF: Int](Movable):
    """A lane's columns of a new key and value, and its angles: a warp reads them at once and has them later.

    Parameters:
        HALF: Column `i` pairs with `i + HALF` in the rotation.
    """

    comptime Values = SIMD[DType.float32, WIDTH]

    var key: Self.Values
    var value: SIMD[DType.bfloat16, WIDTH]
    var scale: Self.Values
    var cosines: Self.Values
    var sines: Self.Values

    @always_inline
    def __init__[
        weight_dtype: DType, //
    ](out self, few: FewTokens[weight_dtype], token: Int, key_head: Int):
        """Reads the projections of one of the batch's tokens."""
        var column = Int(lane_id()) * WIDTH
        var at = (token * few.queries.key_heads + key_head) * HEAD_DIM + column
        self.key = read[WIDTH](few.k, at)
        self.value = few.v.unsafe_offset(at).unsafe_load[
            width=WIDTH, alignment=8
        ]()
        self.scale = few.form.offset + read[WIDTH](few.form.k_weight, column)
        self.cosines = 1
        self.sines = 0
        if column < 2 * Self.HALF:
            var angles = token * 2 * Self.HALF + column % Self.HALF
            self.cosines = read[WIDTH](few.form.angles, angles)
            self.sines = read[WIDTH](few.form.angles, angles + Self.HALF)
            if column < Self.HALF:
                self.sines = -self.sines

    @always_inline
    def rotated(self, eps: Float32) -> SIMD[DType.bfloat16, WIDTH]:
        """The key, normed and rotated."""
        var squares = warp.sum((self.key * self.key).reduce_add())
        var values = self.key * (rsqrt(squares / HEAD_DIM + eps) * self.scale)
        var partners = Self.Values(0)
        comptime for i in range(WIDTH):
            partners[i] = warp.shuffle_xor(
                values[i], UInt32(Self.HALF // WIDTH)
            )
        return (values * self.cosines + partners * self.sines).cast[
            DType.bfloat16
        ]()


@always_inline
def store_new_keys[
    weight_dtype: DType, HALF: Int, //, WARPS: Int
](
    few: FewTokens[weight_dtype],
    first: NewKey[HALF],
    request: Int,
    key_head: Int,
    tokens: Tuple[Int, Int],
    tile_begin: Int,
    keys: SharedTile,
    values: SharedTile,
):
    """A block writes one head's new keys and values to the cache, a warp each, and to a tile in shared memory.

    Parameters:
        weight_dtype: Type of the norms' weights.
        HALF: See `NewKey`.
        WARPS: Of the block.

    Args:
        few: The batch.
        first: The warp's first of them.
        request: Whose keys.
        key_head: Which head.
        tokens: First and last + 1 of the request's new tokens whose keys the block writes.
        tile_begin: Position of the first key of the tile, to which its new keys go as well; none lies before it.
        keys: The tile's keys.
        values: The tile's values.
    """
    var column = Int(lane_id()) * WIDTH
    var first_token = few.first_token(request)
    var cached = few.cached(request)

    @always_inline
    def store(key: NewKey[HALF], position: Int) {imm}:
        var to = few.queries.cache.keys(request, position).unsafe_offset(
            key_head * HEAD_DIM + column
        )
        var rotated = key.rotated(few.form.eps)
        to.unsafe_store[alignment=8](rotated)
        to.unsafe_offset(few.queries.cache.value_offset).unsafe_store[
            alignment=8
        ](key.value)
        if position < tile_begin + KEYS:
            var place = (
                chunk_offset(position - tile_begin, column // 8) + column % 8
            )
            keys.unsafe_offset(place).unsafe_store[alignment=8](rotated)
            values.unsafe_offset(place).unsafe_store[alignment=8](key.value)

    var token = tokens[0] + Int(warp_id())
    if token < tokens[1]:
        store(first, cached + token)
    for other in range(token + WARPS, tokens[1], WARPS):
        store(NewKey[HALF](few, first_token + other, key_head), cached + other)
