"""Softmax attention over the paged cache on a GPU, plainly: a warp a query head of a token, key by key.

For GPUs that MAX has no attention kernel for.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu import WARP_SIZE, block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext
from max.gpu.primitives import warp
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.math import ceildiv, exp
from std.utils.numerics import neg_inf

from .heads import PagedCache, paged_cache, request_of
from .operands import Elements, elements, expect_size

comptime WARPS = 4

comptime MAX_HEAD_DIM = 256
"""A warp keeps a head's query and sum in registers."""


@fieldwise_init
struct Queries[dtype: DType](DevicePassable, TrivialRegisterPassable):
    """Queries of a ragged batch, the keys that they see, and where the results go.
    """

    var result: Elements[Self.dtype]
    """Results `[T, heads, head_dim]`."""
    var q: Elements[Self.dtype]
    """Queries `[T, heads, head_dim]`."""
    var cache: PagedCache[Self.dtype]
    var row_offsets: Elements[DType.uint32]
    """First token of every request, and the end `[R + 1]`."""
    var cache_lengths: Elements[DType.uint32]
    """Tokens of every request in the cache before these `[R]`."""
    var requests: Int
    var heads: Int
    var key_heads: Int
    var head_dim: Int
    var window: Int
    """A query sees so many keys at most, its own the last; 0: all."""
    var scale: Float32

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Queries"

    @always_inline
    def values[
        count: Int
    ](self, head: Elements[Self.dtype]) -> SIMD[DType.float32, count]:
        """A lane's share of a head, every `WARP_SIZE`-th element; 0 behind its end.
        """
        var values = SIMD[DType.float32, count](0)
        comptime for j in range(count):
            var i = Int(lane_id()) + j * WARP_SIZE
            if i < self.head_dim:
                values[j] = head[unsafe_offset=i].cast[DType.float32]()
        return values


@__name(t"step3p5_attend_{dtype}")
def attend_kernel[dtype: DType](queries: Queries[dtype], tokens: Int32):
    """One head of one token: online softmax over the keys up to its own position.
    """
    comptime VALUES = MAX_HEAD_DIM // WARP_SIZE
    var token, head = divmod(
        Int(block_idx.x) * WARPS + Int(warp_id()), queries.heads
    )
    if token >= Int(tokens):
        return
    var request = request_of(queries.row_offsets, queries.requests, token)
    var position = (
        Int(queries.cache_lengths[unsafe_offset=request])
        + token
        - Int(queries.row_offsets[unsafe_offset=request])
    )
    var first = 0
    if queries.window > 0:
        first = max(position - queries.window + 1, 0)
    var at = (token * queries.heads + head) * queries.head_dim
    var key_head = head // (queries.heads // queries.key_heads)
    var q = queries.values[VALUES](queries.q.unsafe_offset(at)) * queries.scale
    var sums = SIMD[DType.float32, VALUES](0)
    var maximum = neg_inf[DType.float32]()
    var total = Float32(0)
    for key in range(first, position + 1):
        var k = queries.cache.keys(request, key).unsafe_offset(
            key_head * queries.head_dim
        )
        var v = k.unsafe_offset(queries.cache.value_offset)
        var score = warp.sum((q * queries.values[VALUES](k)).reduce_add())
        var now = max(maximum, score)
        var shrink = exp(maximum - now)
        var weight = exp(score - now)
        sums = sums * shrink + queries.values[VALUES](v) * weight
        total = total * shrink + weight
        maximum = now
    sums /= total
    comptime for j in range(VALUES):
        var i = Int(lane_id()) + j * WARP_SIZE
        if i < queries.head_dim:
            queries.result[unsafe_offset=at + i] = sums[j].cast[dtype]()


@extensibility.register("step3p5_attend")
struct Step3p5Attend:
    """`softmax(scale q k^T) v` over the paged cache, on a GPU."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        result: OutputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=3, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        kv_blocks: MutableInputTensor[dtype=dtype, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        cache_lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        lookup_table: InputTensor[dtype=DType.uint32, rank=2, ...],
        layer: UInt32,
        window: Int32,
        scale: Float32,
        ctx: DeviceContext,
    ) raises:
        """Attends with every token to the keys of its request, up to its own.

        Parameters:
            dtype: Type of queries, cache and results.
            target: Kind of device; a GPU.

        Args:
            result: `[T, query heads, head_dim]`.
            q: Queries, as `result`.
            row_offsets: First row of every request, and the end `[R + 1]`.
            kv_blocks: The cache `[pages, 2, layers, page_size, key heads, head_dim]`; it holds these tokens' keys.
            page_stride: Elements from page to page, on the host `[1]`; -1 where they are packed.
            cache_lengths: Tokens of every request before this step `[R]`.
            lookup_table: Every request's pages in order of position `[R, …]`.
            layer: Layer within the cache.
            window: Keys that a query sees at most, its own the last; 0: all.
            scale: Of the scores.
            ctx: The device.
        """
        comptime op = "step3p5_attend"
        var tokens = result.dim_size(0)
        var heads = result.dim_size(1)
        var key_heads = kv_blocks.dim_size(4)
        var head_dim = kv_blocks.dim_size(5)
        expect_size(op, "q[T, H, D] dim T", q.dim_size(0), tokens)
        expect_size(op, "q[T, H, D] dim H", q.dim_size(1), heads)
        expect_size(op, "q[T, H, D] dim D", q.dim_size(2), head_dim)
        expect_size(
            op,
            "row_offsets[R + 1]",
            row_offsets.dim_size(0),
            cache_lengths.dim_size(0) + 1,
        )
        if heads % key_heads != 0 or head_dim > MAX_HEAD_DIM:
            raise Error(
                op,
                ": ",
                heads,
                " query heads for ",
                key_heads,
                " key heads of ",
                head_dim,
                ", expected a multiple, and heads of at most ",
                MAX_HEAD_DIM,
            )
        if tokens == 0:
            return
        comptime if target == "cpu":
            raise Error(op, ": on a CPU, expected a GPU")
        else:
            ctx.enqueue_function[attend_kernel[dtype]](
                Queries(
                    elements(result.unsafe_ptr()),
                    elements(q.unsafe_ptr()),
                    paged_cache(kv_blocks, page_stride, lookup_table, layer),
                    elements(row_offsets.unsafe_ptr()),
                    elements(cache_lengths.unsafe_ptr()),
                    cache_lengths.dim_size(0),
                    heads,
                    key_heads,
                    head_dim,
                    Int(window),
                    scale,
                ),
                Int32(tokens),
                grid_dim=ceildiv(tokens * heads, WARPS),
                block_dim=WARPS * WARP_SIZE,
            )
