"""The weighted sum of the experts' down products for few tokens on an NVIDIA GPU: every hit matrix is read once.

A block owns 16 columns of the result for all tokens and goes through the experts in order, so that nothing depends on
which block is faster. Its weights do not depend on the activations: it requests the first ones before the preceding
kernel has ended.
"""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.memory import external_memory
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv, fma
from std.sys import size_of
from std.utils import StaticTuple

from .operands import Elements, Floats, Ids
from .stream_gpu import (
    BFloats,
    CHUNK,
    HitList,
    LANES,
    ListedRows,
    MAX_EXPERTS,
    Partials,
    RowPair,
    Stream,
    TILE_ROWS,
    TILE_TOKENS,
    lane_column,
    lane_row,
    multiply_pass,
)

comptime WARPS = 10
"""A depth of 1280 is two chunks for each of them."""

comptime STAGES = 2
comptime BLOCKS = 2
"""Blocks of a multiprocessor: 256 of 16 columns fill 132 multiprocessors once."""

comptime MAX_TOKENS = 1024
"""Tokens whose columns fit into the shared memory of a block, of which there are two."""


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__name(t"step3p5_down_stream_{dtype}_{tiles}")
def down_stream_gpu[
    dtype: DType, tiles: Int
](
    y: Elements[dtype],
    act: BFloats,
    down: BFloats,
    shared_act: BFloats,
    shared_down: BFloats,
    rows: Ids,
    offsets: Ids,
    weights: Floats,
    tokens: Int32,
    top_k: Int32,
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    shared_size: Int32,
):
    """`y_t = shared_down shared_act_t + sum_k weights[t, k] * (down_e act)`.

    The list of the experts is read before the preceding kernel has ended. That is sound because whatever wrote it
    ended before the activations' kernel began.
    """
    var columns = external_memory[
        Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var first = Int(block_idx.x) * TILE_ROWS
    var hits = HitList()
    hits.fill(offsets, Int(experts))
    var count = hits.count()

    @always_inline
    def rows_of(matrix: BFloats, depth: Int) {imm} -> RowPair:
        """The lane's place in the block's rows of a matrix."""
        var at = matrix.unsafe_offset(
            (first + lane_row()) * depth + lane_column()
        )
        return RowPair(at, at.unsafe_offset(8 * depth), depth)

    @always_inline
    def hit_rows(hit: Int) {imm} -> RowPair:
        """The same of a hit expert; behind the last one nothing is read."""
        var depth = Int(intermediate_size)
        var expert = hits.expert(hit) if hit < count else 0
        var pair = rows_of(
            down.unsafe_offset(expert * Int(hidden_size) * depth), depth
        )
        if hit >= count:
            pair.depth = 0
        return pair

    @always_inline
    def add(token: Int, weight: Float32, low: Float32, high: Float32) {imm}:
        """Adds to the lane's two columns of a token."""
        var to = columns.unsafe_offset(token * TILE_ROWS + lane_row())
        to[unsafe_offset=0] = fma(weight, low, to[unsafe_offset=0])
        to[unsafe_offset=8] = fma(weight, high, to[unsafe_offset=8])

    var pair = hit_rows(0)
    if shared_size > 0:
        pair = rows_of(shared_down, Int(shared_size))
    var stream = Stream[WARPS, STAGES](pair)
    var partials = Partials[WARPS, tiles]()
    for i in range(Int(thread_idx.x), Int(tokens) * TILE_ROWS, WARPS * LANES):
        columns[unsafe_offset=i] = 0
    wait_on_dependent_grids()
    launch_dependent_grids()
    if shared_size > 0:
        var shared_x = ListedRows(shared_act, Int(shared_size))
        var token = 0
        while token < Int(tokens):
            var size = min(Int(tokens) - token, tiles * TILE_TOKENS)
            var next = pair
            if token + size == Int(tokens):
                next = hit_rows(0)
            multiply_pass(stream, partials, pair, next, shared_x, token, size)
            for i in range(Int(warp_id()), ceildiv(size, TILE_TOKENS), WARPS):
                var sums = partials.total(i)
                comptime for j in range(2):
                    var t = i * TILE_TOKENS + lane_column() // 4 + j
                    if t < size:
                        add(token + t, 1, sums[j], sums[2 + j])
            token += size
        pair = hit_rows(0)
    var x = ListedRows(act, Int(intermediate_size))
    for hit in range(count):
        var following = hit_rows(hit + 1)
        var slot = hits.begin(hit)
        var end = hits.begin(hit + 1)
        while slot < end:
            var size = min(end - slot, tiles * TILE_TOKENS)
            var next = pair
            if slot + size == end:
                next = following
            multiply_pass(stream, partials, pair, next, x, slot, size)
            for i in range(Int(warp_id()), ceildiv(size, TILE_TOKENS), WARPS):
                var sums = partials.total(i)
                comptime for j in range(2):
                    var t = i * TILE_TOKENS + lane_column() // 4 + j
                    if t < size:
                        var assignment = rows[unsafe_offset=slot + t]
                        add(
                            Int(assignment // top_k),
                            weights[unsafe_offset=Int(assignment)],
                            sums[j],
                            sums[2 + j],
                        )
            slot += size
        pair = following
    barrier()
    for i in range(Int(thread_idx.x), Int(tokens) * TILE_ROWS, WARPS * LANES):
        var token, column = divmod(i, TILE_ROWS)
        y[unsafe_offset=token * Int(hidden_size) + first + column] = columns[
            unsafe_offset=i
        ].cast[dtype]()


@fieldwise_init
struct SharedDown(ImplicitlyCopyable):
    """The second half of a shared expert, which has every token."""

    var act: BFloats
    """Its activations `[T, width]`."""
    var down: BFloats
    var width: Int
    """0: there is none, and the rest is not looked at."""


def down_fits(
    tokens: Int, hidden_size: Int, intermediate_size: Int, experts: Int
) -> Bool:
    """Whether the kernel here can take matrices of these sizes for so many tokens.
    """
    return (
        tokens <= MAX_TOKENS
        and intermediate_size % CHUNK == 0
        and hidden_size % TILE_ROWS == 0
        and experts <= MAX_EXPERTS
    )


def down_stream[
    dtype: DType
](
    y: Elements[dtype],
    act: BFloats,
    down: BFloats,
    rows: Ids,
    offsets: Ids,
    weights: Floats,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    shared: SharedDown,
    ctx: DeviceContext,
) raises:
    """Enqueues `down_stream_gpu`: a block for every 16 columns."""

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = down_stream_gpu[dtype, tiles]
        comptime column_bytes = TILE_ROWS * size_of[DType.float32]()
        ctx.enqueue_function[kernel](
            y,
            act,
            down,
            shared.act,
            shared.down,
            rows,
            offsets,
            weights,
            Int32(tokens),
            Int32(top_k),
            Int32(experts),
            Int32(hidden_size),
            Int32(intermediate_size),
            Int32(shared.width),
            grid_dim=hidden_size // TILE_ROWS,
            block_dim=WARPS * LANES,
            shared_mem_bytes=tokens * column_bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(MAX_TOKENS * column_bytes)
            ),
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[4]()
