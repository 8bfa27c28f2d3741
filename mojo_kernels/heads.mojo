"""Where projected heads come from and go to: queries to the op's result, keys and values to the paged cache."""

from extensibility import InputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from .operands import Elements, elements


@fieldwise_init
struct PagedCache[dtype: DType](TrivialRegisterPassable):
    """One layer of a paged cache `[pages, 2, layers, page_size, heads, head_dim]`.

    `blocks` is the layer's place in page 0, `page_stride` and `value_offset` lead to another page and from keys to
    values, `row_size` is `heads * head_dim`.
    """

    var blocks: Elements[Self.dtype]
    var page_stride: Int
    var value_offset: Int
    var page_size: Int
    var row_size: Int
    var lookup_table: Elements[DType.uint32]
    var max_pages: Int

    @always_inline
    def keys(self, request: Int, position: Int) -> Elements[Self.dtype]:
        """The keys of all heads at a request's position."""
        # A GPU divides 32 bits in a quarter of the time of 64.
        var index, row = divmod(UInt32(position), UInt32(self.page_size))
        var page = self.lookup_table[
            unsafe_offset=request * self.max_pages + Int(index)
        ]
        return self.blocks.unsafe_offset(
            Int(page) * self.page_stride + Int(row) * self.row_size
        )


def paged_cache[
    dtype: DType
](
    kv_blocks: MutableInputTensor[dtype=dtype, rank=6, ...],
    page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
    lookup_table: InputTensor[dtype=DType.uint32, rank=2, ...],
    layer: UInt32,
) -> PagedCache[dtype]:
    """One layer of a cache as an op has it: `page_stride`, on the host, is -1 where pages are packed.
    """
    var row_size = kv_blocks.dim_size(4) * kv_blocks.dim_size(5)
    var layer_size = kv_blocks.dim_size(3) * row_size
    var value_offset = kv_blocks.dim_size(2) * layer_size
    var stride = Int(page_stride[0])
    return {
        elements(kv_blocks.unsafe_ptr()).unsafe_offset(Int(layer) * layer_size),
        stride if stride >= 0 else 2 * value_offset,
        value_offset,
        kv_blocks.dim_size(3),
        row_size,
        elements(lookup_table.unsafe_ptr()),
        lookup_table.dim_size(1),
    }


@always_inline
def request_of(
    row_offsets: Elements[DType.uint32], requests: Int, token: Int
) -> Int:
    """The last request whose first row is not behind the token."""
    var low = 0
    var high = requests
    while high - low > 1:
        var middle = (low + high) // 2
        if Int(row_offsets[unsafe_offset=middle]) <= token:
            low = middle
        else:
            high = middle
    return low


@fieldwise_init
struct Heads[dtype: DType](DevicePassable, TrivialRegisterPassable):
    """The heads of every token: `query_heads` of queries, then `key_heads` of keys, then as many of values.
    """

    var result: Elements[Self.dtype]
    var q: Elements[Self.dtype]
    var k: Elements[Self.dtype]
    var v: Elements[Self.dtype]
    var query_heads: Int
    var key_heads: Int
    var head_dim: Int
    var cache: PagedCache[Self.dtype]
    var row_offsets: Elements[DType.uint32]
    var cache_lengths: Elements[DType.uint32]
    var requests: Int

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Heads"

    @always_inline
    def count(self) -> Int:
        """Heads of a token."""
        return self.query_heads + 2 * self.key_heads

    @always_inline
    def request(self, token: Int) -> Int:
        """The request that a token belongs to."""
        return request_of(self.row_offsets, self.requests, token)

    @always_inline
    def source(self, token: Int, head: Int) -> Elements[Self.dtype]:
        """A head as it was projected."""
        if head < self.query_heads:
            return self.q.unsafe_offset(
                (token * self.query_heads + head) * self.head_dim
            )
        var key_head = head - self.query_heads
        if key_head < self.key_heads:
            return self.k.unsafe_offset(
                (token * self.key_heads + key_head) * self.head_dim
            )
        key_head -= self.key_heads
        return self.v.unsafe_offset(
            (token * self.key_heads + key_head) * self.head_dim
        )

    @always_inline
    def target(
        self, token: Int, head: Int, request: Int
    ) -> Elements[Self.dtype]:
        """Where a head of a token of `request` goes."""
        if head < self.query_heads:
            return self.result.unsafe_offset(
                (token * self.query_heads + head) * self.head_dim
            )
        var position = (
            Int(self.cache_lengths[unsafe_offset=request])
            + token
            - Int(self.row_offsets[unsafe_offset=request])
        )
        var keys = self.cache.keys(request, position)
        var key_head = head - self.query_heads
        if key_head < self.key_heads:
            return keys.unsafe_offset(key_head * self.head_dim)
        return keys.unsafe_offset(
            self.cache.value_offset
            + (key_head - self.key_heads) * self.head_dim
        )


@fieldwise_init
struct HeadForm[weight_dtype: DType](DevicePassable, TrivialRegisterPassable):
    """Queries and keys are normed, `x * rsqrt(mean(x²) + eps) * (offset + w)`, then rotated by the token's angles.
    """

    var q_weight: Elements[Self.weight_dtype]
    var k_weight: Elements[Self.weight_dtype]
    var eps: Float32
    var offset: Float32
    var angles: Elements[DType.float32]
    """The rope table `[T, 2 * half]`: cosines, then sines; column `i` of a head pairs with `i + half`."""
    var half: Int

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "HeadForm"
