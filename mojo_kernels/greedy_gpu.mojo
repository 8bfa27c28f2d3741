"""The token of the greatest logit on a GPU: a block a row, or several a row where rows are few."""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    thread_idx,
)
from max.gpu.host import DeviceAttribute, DeviceContext
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.memory import bitcast, unsafe_stack_allocation
from std.utils.numerics import neg_inf
from std.utils.static_tuple import StaticTuple

from .operands import Elements, Floats, Ids

comptime THREADS = 512

comptime GROUP = 32
"""Neighbouring threads that compare what they found without shared memory: a warp is one or two groups."""

comptime GROUPS = THREADS // GROUP

comptime BLOCKS = 2
"""Blocks that fit on a multiprocessor. Were more to fit, the compiler would save registers and request less at once."""

comptime UNROLL = 4
"""Vectors that a thread requests before it looks at the first."""

comptime LEAST = 2
"""Vectors of a thread; with fewer, more blocks take no less time."""

comptime MOST_PARTS = GROUP
"""A thread looks at one part of a row when they are joined."""

comptime MERGE_ROWS = 4
"""Rows of a block that joins parts."""


@fieldwise_init
struct Found(TrivialRegisterPassable):
    """A logit and its place. The first of the greatest wins; where all are minus infinity or NaN that is place 0.
    """

    var logit: Float32
    var place: Int32

    @always_inline
    def __init__(out self):
        self.logit = neg_inf[DType.float32]()
        self.place = 0

    @always_inline
    def consider(mut self, logit: Float32, place: Int32):
        if logit > self.logit or (logit == self.logit and place < self.place):
            self.logit = logit
            self.place = place

    @always_inline
    def of_group(self) -> Self:
        """The best of a group's threads, all of which must call."""
        var best = self
        comptime for distance in [16, 8, 4, 2, 1]:
            best.consider(
                warp.shuffle_xor(best.logit, UInt32(distance)),
                warp.shuffle_xor(best.place, UInt32(distance)),
            )
        return best

    @always_inline
    def of_block(self) -> Self:
        """The best of a block's threads, known to the first group."""
        var logits = unsafe_stack_allocation[
            GROUPS, Float32, address_space=AddressSpace.SHARED
        ]()
        var places = unsafe_stack_allocation[
            GROUPS, Int32, address_space=AddressSpace.SHARED
        ]()
        var thread = Int(thread_idx.x)
        var best = self.of_group()
        if thread % GROUP == 0:
            logits[unsafe_offset=thread // GROUP] = best.logit
            places[unsafe_offset=thread // GROUP] = best.place
        barrier()
        if thread >= GROUP:
            return best
        best = Self()
        if thread < GROUPS:
            best = Self(
                logits[unsafe_offset=thread], places[unsafe_offset=thread]
            )
        return best.of_group()


@always_inline
def request[
    width: Int
](row: Floats, vector: Int32, last: Int32) -> Array[
    SIMD[DType.float32, width], UNROLL
]:
    """Every `THREADS`-th vector from `vector` on, the one before `last` in place of those from there on.

    Without branches, behind which a load would wait for the one before.
    """
    var loaded = Array[SIMD[DType.float32, width], UNROLL](fill=0)
    comptime for u in range(UNROLL):
        var at = min(vector + Int32(u * THREADS), last - 1)
        loaded[u] = row.unsafe_offset(Int(at) * width).unsafe_load[
            width=width, alignment=4 * width
        ]()
    return loaded^


@always_inline
def greatest[
    width: Int
](
    row: Floats,
    first: Int32,
    last: Int32,
    vocab_size: Int32,
    known: Elements[DType.int64],
) -> Found:
    """The best that a thread finds among its block's vectors.

    Parameters:
        width: Logits of a vector.

    Args:
        row: The row's logits.
        first: The block's first vector.
        last: The end of its vectors, at least 1; those behind the known logits count as none.
        vocab_size: Logits of the row.
        known: See `step3p5_greedy`.
    """
    var vector = first + Int32(thread_idx.x)
    # They do not wait for how many are known.
    var loaded = request[width](row, vector, last)
    var end = Int32(max(min(known[unsafe_offset=0], Int64(vocab_size)), 0))
    var whole = end // Int32(width)
    var logits = SIMD[DType.float32, width](neg_inf[DType.float32]())
    var vectors = SIMD[DType.int32, width](0)
    while True:
        comptime for u in range(UNROLL):
            var at = vector + Int32(u * THREADS)
            var counts = SIMD[DType.bool, width](fill=at < min(last, whole))
            var is_greater = loaded[u].gt(logits) & counts
            logits = is_greater.select(loaded[u], logits)
            vectors = is_greater.select(SIMD[DType.int32, width](at), vectors)
        vector += Int32(UNROLL * THREADS)
        if vector >= last:
            break
        loaded = request[width](row, vector, last)
    var best = Found()
    comptime for i in range(width):
        best.consider(logits[i], vectors[i] * Int32(width) + Int32(i))
    # Those behind the last whole vector are everybody's.
    var behind = whole * Int32(width) + Int32(thread_idx.x)
    if behind < end:
        best.consider(row[unsafe_offset=Int(behind)], behind)
    return best


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__name(t"step3p5_greedy_{width}")
def greedy_kernel[
    width: Int
](
    ids: Elements[DType.int64],
    found: Ids,
    logits: Floats,
    known: Elements[DType.int64],
    vocab_size: Int32,
    parts: Int32,
    vectors: Int32,
):
    """A block finds the best of a part of a row: of the whole, `ids [rows]`, else `found [rows, parts, 2]`.

    Parameters:
        width: Logits of a vector, a divisor of `vocab_size`.

    Args:
        ids: Result `[rows]` where a row has one part.
        found: Logits, as their bits, and places where it has several.
        logits: `[rows, vocab_size]`.
        known: See `step3p5_greedy`.
        vocab_size: Logits of a row.
        parts: Blocks of a row.
        vectors: Of a part.
    """
    wait_on_dependent_grids()
    launch_dependent_grids()
    var row = Int(block_idx.x)
    var part = Int(block_idx.y)
    var first = Int32(part) * vectors
    var best = greatest[width](
        logits.unsafe_offset(row * Int(vocab_size)),
        first,
        min(first + vectors, vocab_size // Int32(width)),
        vocab_size,
        known,
    ).of_block()
    if thread_idx.x != 0:
        return
    if parts == 1:
        ids[unsafe_offset=row] = Int64(best.place)
    else:
        found.unsafe_offset((row * Int(parts) + part) * 2).unsafe_store[
            alignment=8
        ](SIMD[DType.int32, 2](bitcast[DType.int32, 1](best.logit), best.place))


@__name("step3p5_greedy_merge")
def greedy_merge_kernel(
    ids: Elements[DType.int64], found: Ids, rows: Int32, parts: Int32
):
    """A group of threads finds the best of a row's parts."""
    wait_on_dependent_grids()
    launch_dependent_grids()
    var row = Int(block_idx.x) * MERGE_ROWS + Int(thread_idx.x) // GROUP
    var part = Int(thread_idx.x) % GROUP
    var best = Found()
    if row < Int(rows) and part < Int(parts):
        var of_part = found.unsafe_offset(
            (row * Int(parts) + part) * 2
        ).unsafe_load[width=2, alignment=8]()
        best = Found(bitcast[DType.float32, 1](of_part[0]), of_part[1])
    best = best.of_group()
    if row < Int(rows) and part == 0:
        ids[unsafe_offset=row] = Int64(best.place)


def greedy_gpu(
    ids: Elements[DType.int64],
    logits: Floats,
    known: Elements[DType.int64],
    rows: Int,
    vocab_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues `greedy_kernel` with as many blocks as occupy every multiprocessor once, at least one a row, and where a
    row has several `greedy_merge_kernel`.
    """
    if rows == 0:
        return
    comptime for width in [4, 1]:
        if vocab_size % width == 0:
            var vectors = vocab_size // width
            var parts = min(
                ctx.get_attribute(DeviceAttribute.MULTIPROCESSOR_COUNT) // rows,
                ceildiv(vectors, LEAST * THREADS),
                MOST_PARTS,
            )
            parts = max(parts, 1)
            var buffer = ctx.enqueue_create_buffer[DType.int32](
                rows * parts * 2 if parts > 1 else 1
            )
            var found = buffer.unsafe_ptr().unsafe_origin_cast[
                MutUntrackedOrigin
            ]()
            comptime kernel = greedy_kernel[width]
            ctx.enqueue_function[kernel](
                ids,
                found,
                logits,
                known,
                Int32(vocab_size),
                Int32(parts),
                Int32(ceildiv(vectors, parts)),
                grid_dim=(rows, parts),
                block_dim=THREADS,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )
            if parts > 1:
                ctx.enqueue_function[greedy_merge_kernel](
                    ids,
                    found,
                    Int32(rows),
                    Int32(parts),
                    grid_dim=ceildiv(rows, MERGE_ROWS),
                    block_dim=MERGE_ROWS * GROUP,
                    attributes=pdl_launch_attributes(PDLLevel.ON),
                )
            _ = buffer^
            return
