"""A linear layer of few rows for few tokens on an NVIDIA GPU, as the router is one.

So little is read that the time is that of memory's answers, one after the other. So there is one round of them: a
block has requested all of its weights before the tokens are there, and then requests all of its tokens.
"""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.memory import unsafe_stack_allocation
from std.utils import StaticTuple

from .operands import Elements
from .stream_gpu import (
    BFloats,
    CHUNK,
    LANES,
    Piece,
    SharedFloats,
    TILE_TOKENS,
    TileSums,
    lane_column,
    lane_row,
    multiply_add,
    stream_piece,
    token_piece,
)

comptime ROWS = 8
"""Weight rows of a block, half of what `linear_gpu` gives one: the tensor cores multiply 16 rows of one operand with 8
of the other, and here the weights are the other. So twice as many multiprocessors read.
"""

comptime WARPS = 16

comptime CHUNKS = 4
"""Chunks of the depth that a warp holds."""

comptime MAX_DEPTH = WARPS * CHUNKS * CHUNK
"""The depth that a block's registers hold of its rows."""

comptime PIECES = 2 * CHUNKS
"""A lane's pieces of a row."""


@always_inline
def request[
    load: def(BFloats) thin -> Piece
](mut pieces: Array[Piece, PIECES], row: BFloats, depth: Int):
    """Reads the lane's pieces of a row; behind the row's end they stay zero."""
    comptime for c in range(CHUNKS):
        var chunk = (c * WARPS + Int(warp_id())) * CHUNK
        if chunk < depth:
            comptime for half in range(2):
                pieces[2 * c + half] = load(
                    row.unsafe_offset(chunk + half * CHUNK // 2 + lane_column())
                )


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__name(t"step3p5_linear_narrow_{dtype}_{tiles}")
def linear_narrow_gpu[
    dtype: DType, tiles: Int
](
    y: Elements[dtype],
    x: BFloats,
    w: BFloats,
    tokens: Int32,
    in_features: Int32,
    out_features: Int32,
):
    """`y = x w^T`; a block in `x` is 8 rows of `w`, one in `y` is `8 * tiles` tokens.

    Parameters:
        dtype: Type of the result.
        tiles: 1 or 2.
    """
    var shares: SharedFloats = unsafe_stack_allocation[
        WARPS * LANES * 4,
        Float32,
        alignment=16,
        address_space=AddressSpace.SHARED,
    ]()
    var depth = Int(in_features)
    var first_row = Int(block_idx.x) * ROWS
    var first = Int(block_idx.y) * tiles * TILE_TOKENS
    var size = min(Int(tokens) - first, tiles * TILE_TOKENS)
    var weights = Array[Piece, PIECES](fill=0)
    request[stream_piece](
        weights, w.unsafe_offset((first_row + lane_row()) * depth), depth
    )
    # The weights do not depend on the preceding kernel, the tokens do.
    wait_on_dependent_grids()
    launch_dependent_grids()
    var low = Array[Piece, PIECES](fill=0)
    var high = Array[Piece, PIECES](fill=0)
    var token = x.unsafe_offset((first + lane_row()) * depth)
    if lane_row() < size:
        request[token_piece](low, token, depth)
    comptime if tiles == 2:
        if lane_row() + TILE_TOKENS < size:
            request[token_piece](
                high, token.unsafe_offset(TILE_TOKENS * depth), depth
            )
    # A sum for every chunk: an addition waits for the one before.
    var sums = Array[TileSums, CHUNKS](fill=0)
    comptime for q in range(4):
        comptime for c in range(CHUNKS):
            comptime piece = 2 * c + q // 2
            comptime part = q % 2 * 2
            sums[c] = multiply_add(
                low[piece].slice[2, offset=part](),
                high[piece].slice[2, offset=part](),
                weights[piece].slice[2, offset=part](),
                sums[c],
            )
    var own = sums[0]
    comptime for c in range(1, CHUNKS):
        own += sums[c]
    shares.unsafe_offset(Int(thread_idx.x) * 4).unsafe_store[alignment=16](own)
    barrier()
    # A thread adds up one result: the warps' shares of it, in their order.
    var lane, j = divmod(Int(thread_idx.x), 4)
    if lane < LANES:
        var t = lane // 4 + j // 2 * TILE_TOKENS
        var row = first_row + lane % 4 * 2 + j % 2
        var total = Float32(0)
        comptime for warp in range(WARPS):
            total += shares[unsafe_offset=warp * LANES * 4 + Int(thread_idx.x)]
        if t < size:
            var to = (first + t) * Int(out_features) + row
            y[unsafe_offset=to] = total.cast[dtype]()


def blocks_needed(tokens: Int, out_features: Int) -> Int:
    """Blocks that `linear_narrow` starts, each of which takes a multiprocessor.
    """
    return ceildiv(tokens, tokens_of_block(tokens)) * (out_features // ROWS)


def tokens_of_block(tokens: Int) -> Int:
    """Tokens that a block takes: 8 where these are all, else 16."""
    return TILE_TOKENS if tokens <= TILE_TOKENS else 2 * TILE_TOKENS


def narrow_fits(in_features: Int, out_features: Int) -> Bool:
    """Whether the kernel here can take a matrix of this size."""
    return (
        in_features % CHUNK == 0
        and in_features <= MAX_DEPTH
        and out_features % ROWS == 0
    )


def linear_narrow[
    dtype: DType
](
    y: Elements[dtype],
    x: BFloats,
    w: BFloats,
    tokens: Int,
    in_features: Int,
    out_features: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `linear_narrow_gpu`."""

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = linear_narrow_gpu[dtype, tiles]
        ctx.enqueue_function[kernel](
            y,
            x,
            w,
            Int32(tokens),
            Int32(in_features),
            Int32(out_features),
            grid_dim=(
                out_features // ROWS,
                ceildiv(tokens, tiles * TILE_TOKENS),
            ),
            block_dim=WARPS * LANES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[2]()
