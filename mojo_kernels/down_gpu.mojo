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
def down_stream_gpu[
    dtype: DType, tiles: Int
](
    y: Elements[dtype],
    act: BFloats,
    down: BFloats,
    rows: Ids,
    offsets: Ids,
    weights: Floats,
    tokens: Int32,
    top_k: Int32,
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
):
    """`y_t = sum_k weights[t, k] * (down_e act)`.

    The list of the experts is read before the preceding kernel has ended. That is sound because whatever wrote it
    ended before the activations' kernel began.
    """
    var columns = external_memory[
        Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var depth = Int(intermediate_size)
    var first = Int(block_idx.x) * TILE_ROWS
    var lane = (first + lane_row()) * depth + lane_column()
    var matrix = Int(hidden_size) * depth
    var hits = HitList()
    hits.fill(offsets, Int(experts))
    var count = hits.count()
    var at = down.unsafe_offset(hits.expert(0) * matrix + lane)
    var pair = RowPair(at, at.unsafe_offset(8 * depth), depth)
    var stream = Stream[WARPS, STAGES](pair)
    var partials = Partials[WARPS, tiles]()
    for i in range(Int(thread_idx.x), Int(tokens) * TILE_ROWS, WARPS * LANES):
        columns[unsafe_offset=i] = 0
    wait_on_dependent_grids()
    launch_dependent_grids()
    var x = ListedRows(act, depth)
    for hit in range(count):
        var following = pair
        if hit + 1 < count:
            at = down.unsafe_offset(hits.expert(hit + 1) * matrix + lane)
            following = RowPair(at, at.unsafe_offset(8 * depth), depth)
        else:
            following.depth = 0
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
                    var token = i * TILE_TOKENS + lane_column() // 4 + j
                    if token < size:
                        var assignment = rows[unsafe_offset=slot + token]
                        var weight = weights[unsafe_offset=Int(assignment)]
                        var to = columns.unsafe_offset(
                            Int(assignment // top_k) * TILE_ROWS + lane_row()
                        )
                        to[unsafe_offset=0] = fma(
                            weight, sums[j], to[unsafe_offset=0]
                        )
                        to[unsafe_offset=8] = fma(
                            weight, sums[2 + j], to[unsafe_offset=8]
                        )
            slot += size
        pair = following
    barrier()
    for i in range(Int(thread_idx.x), Int(tokens) * TILE_ROWS, WARPS * LANES):
        var token, column = divmod(i, TILE_ROWS)
        y[unsafe_offset=token * Int(hidden_size) + first + column] = columns[
            unsafe_offset=i
        ].cast[dtype]()


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
            rows,
            offsets,
            weights,
            Int32(tokens),
            Int32(top_k),
            Int32(experts),
            Int32(hidden_size),
            Int32(intermediate_size),
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
