"""The router of one to four tokens on a Hopper GPU: logits, choice and grouping by one cluster of blocks, in one launch.

A block multiplies its share of the depth with all of the router's rows, so that its weights fit into its registers and
shared memory: it requests all of them before the preceding kernel has ended. The first block adds up the shares, which
the others store into its shared memory, and chooses.
"""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_dim,
    block_idx,
    lane_id,
    thread_idx,
    warp_id,
)
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.memory import external_memory
from max.gpu.primitives.cluster import (
    cluster_arrive,
    cluster_arrive_relaxed,
    cluster_wait,
)
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.memory import bitcast, unsafe_stack_allocation
from std.sys._assembly import inlined_assembly
from std.utils import StaticTuple

from .choose_gpu import choose_experts, group_chosen, score_expert
from .dense_split_gpu import peer_address
from .operands import Floats, Ids
from .stream_gpu import (
    BFloats,
    LANES,
    Piece,
    SharedFloats,
    SharedIds,
    TILE_ROWS,
    TileSums,
    divide,
    lane_column,
    lane_row,
    multiply_add,
    stream_piece,
    token_piece,
)

comptime CLUSTER = 8
"""Blocks of the largest cluster that every Hopper GPU takes."""

comptime MAX_TOKENS = 4

comptime MAX_WARPS = 18
"""Of a block; each has 16 rows, so that they are 288 experts."""

comptime EXPERTS_A_LANE = MAX_WARPS * TILE_ROWS // LANES

comptime STEP = 32
"""Depth of a lane's two pieces, which lie in two rows: four lanes read 64 bytes of each."""

comptime MAX_STEPS = 16
"""Steps of a block's depth: a hidden size of 4096."""

comptime HELD = 6
"""Steps whose weights are held in registers, 8 a step; the others are in shared memory."""

comptime PIECE_BYTES = 16

comptime TOKEN_STRIDE = MAX_STEPS * STEP + 32
"""Elements of shared memory from a token to the next, which lies in other banks."""

comptime CHAINS = 4
"""Sums that a lane adds to by turns: an addition waits for the one before."""


@always_inline
def copy_piece(to: Int32, source: BFloats):
    """Begins to copy eight weights to an address of shared memory."""
    inlined_assembly[
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16;",
        NoneType,
        constraints="r,l,~{memory}",
        has_side_effect=True,
    ](to, source)


@always_inline
def wait_for_copies():
    """Waits for all that the thread began to copy."""
    inlined_assembly[
        "cp.async.wait_all;",
        NoneType,
        constraints="~{memory}",
        has_side_effect=True,
    ]()


@always_inline
def store_peer(address: Int32, value: Float32):
    """Writes the shared memory of any block of the cluster."""
    inlined_assembly[
        "st.shared::cluster.f32 [$0], $1;",
        NoneType,
        constraints="r,f,~{memory}",
        has_side_effect=True,
    ](address, value)


@fieldwise_init
struct RouterMemory(ImplicitlyCopyable):
    """A block's shared memory: weights, tokens, and the sums of all blocks, of which the first block's are used.
    """

    var base: SharedFloats
    var experts: Int

    @staticmethod
    def bytes(experts: Int) -> Int:
        """Size for so many experts."""
        var threads = experts // TILE_ROWS * LANES
        return (
            2 * (MAX_STEPS - HELD) * threads * PIECE_BYTES
            + MAX_TOKENS * TOKEN_STRIDE * 2
            + CLUSTER * MAX_TOKENS * experts * 4
        )

    @always_inline
    def piece(self, index: Int) -> SharedFloats:
        """One of the thread's own pieces."""
        var at = index * Int(block_dim.x) + Int(thread_idx.x)
        return self.base.unsafe_offset(at * (PIECE_BYTES // 4))

    @always_inline
    def token(self, token: Int) -> SharedFloats:
        """The block's share of a token's values, bfloat16."""
        var pieces = 2 * (MAX_STEPS - HELD) * Int(block_dim.x)
        return self.base.unsafe_offset(
            pieces * (PIECE_BYTES // 4) + token * (TOKEN_STRIDE // 2)
        )

    @always_inline
    def sums(self, rank: Int, token: Int) -> SharedFloats:
        """Where the sums of a block's share of a token lie `[E]`."""
        return self.token(MAX_TOKENS).unsafe_offset(
            (rank * MAX_TOKENS + token) * self.experts
        )

    @always_inline
    def scores(self) -> SharedFloats:
        """Tokens' scores `[T, E]`, in the place of weights that have been used.
        """
        return self.base

    @always_inline
    def keys(self) -> SharedIds:
        """What orders the experts `[T, E]`."""
        return self.base.unsafe_offset(
            MAX_TOKENS * self.experts
        ).unsafe_bitcast[Int32]()


@always_inline
def load_shared(source: SharedFloats) -> Piece:
    """Reads eight bfloat16."""
    return bitcast[DType.uint32, 4](source.unsafe_load[width=4, alignment=16]())


@always_inline
def multiply_piece(
    low: Piece,
    high: Piece,
    tokens: Piece,
    step: Int,
    mut sums: Array[TileSums, CHAINS],
):
    """Adds a step's products."""
    comptime for q in range(2):
        var chain = step % (CHAINS // 2) * 2 + q
        sums[chain] = multiply_add(
            low.slice[2, offset=2 * q](),
            high.slice[2, offset=2 * q](),
            tokens.slice[2, offset=2 * q](),
            sums[chain],
        )


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](
        Int32(MAX_WARPS * LANES)
    )
)
def router_kernel[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    rows: Ids,
    offsets: Ids,
    x: BFloats,
    w: BFloats,
    bias: Floats,
    tokens: Int32,
    hidden_size: Int32,
    experts: Int32,
    top_k: Int32,
    scale: Float32,
):
    """See `step3p5_moe_router`. A warp has 16 experts; the launch has one cluster.
    """
    var chosen: SharedIds = unsafe_stack_allocation[
        MAX_TOKENS * LANES, Int32, address_space=AddressSpace.SHARED
    ]()
    var memory = RouterMemory(
        external_memory[
            Float32, address_space=AddressSpace.SHARED, alignment=16
        ](),
        Int(experts),
    )
    var thread = Int(thread_idx.x)
    var rank = Int(block_idx.x)
    var depth = Int(hidden_size) // CLUSTER
    var steps = depth // STEP
    var row = Int(warp_id()) * TILE_ROWS + lane_row()
    var low = w.unsafe_offset(
        row * Int(hidden_size) + rank * depth + lane_column()
    )
    var high = low.unsafe_offset(8 * Int(hidden_size))
    var held = Array[Piece, 2 * HELD](fill=0)
    comptime for s in range(HELD):
        if s < steps:
            held[2 * s] = stream_piece(low.unsafe_offset(s * STEP))
            held[2 * s + 1] = stream_piece(high.unsafe_offset(s * STEP))
    for s in range(HELD, steps):
        var at = 2 * (s - HELD)
        copy_piece(Int32(Int(memory.piece(at))), low.unsafe_offset(s * STEP))
        copy_piece(
            Int32(Int(memory.piece(at + 1))), high.unsafe_offset(s * STEP)
        )
    var _, expert = divide(thread, Int(experts))
    # Nothing is stored into a block that does not run yet.
    cluster_arrive_relaxed()
    # The weights do not depend on the preceding kernel, the tokens do. The experts' kernel begins with what depends on
    # the tokens alone: so they must be there when it is launched.
    wait_on_dependent_grids()
    launch_dependent_grids()
    var own_bias = bias[unsafe_offset=expert]
    var pieces = depth // 8
    for i in range(thread, Int(tokens) * pieces, Int(block_dim.x)):
        var token, piece = divide(i, pieces)
        var values = token_piece(
            x.unsafe_offset(token * Int(hidden_size) + rank * depth + piece * 8)
        )
        memory.token(token).unsafe_offset(piece * 4).unsafe_store[alignment=16](
            bitcast[DType.float32, 4](values)
        )
    barrier()
    var has_token = lane_row() < Int(tokens)
    var own_token = memory.token(min(lane_row(), MAX_TOKENS - 1)).unsafe_offset(
        lane_column() // 2
    )
    var sums = Array[TileSums, CHAINS](fill=0)
    comptime for s in range(MAX_STEPS):
        comptime if s == HELD:
            wait_for_copies()
        if s < steps:
            var values = Piece(0)
            if has_token:
                values = load_shared(own_token.unsafe_offset(s * STEP // 2))
            comptime if s < HELD:
                multiply_piece(held[2 * s], held[2 * s + 1], values, s, sums)
            else:
                comptime at = 2 * (s - HELD)
                multiply_piece(
                    load_shared(memory.piece(at)),
                    load_shared(memory.piece(at + 1)),
                    values,
                    s,
                    sums,
                )
    var share = sums[0]
    comptime for chain in range(1, CHAINS):
        share += sums[chain]
    cluster_wait()
    comptime for j in range(2):
        var token = lane_column() // 4 + j
        if token < Int(tokens):
            var to = peer_address(
                Int32(Int(memory.sums(rank, token).unsafe_offset(row))), 0
            )
            store_peer(to, share[j])
            store_peer(to + 8 * 4, share[2 + j])
    cluster_arrive()
    if rank > 0:
        # Nothing reads this block's memory; the first block waits for what was stored, not for an exit.
        return
    cluster_wait()
    var scores = memory.scores()
    var keys = memory.keys()
    for i in range(thread, Int(tokens * experts), Int(block_dim.x)):
        # The number of threads is a multiple of the number of experts.
        var token, _ = divide(i, Int(experts))
        var logit = Float32(0)
        comptime for peer in range(CLUSTER):
            logit += memory.sums(peer, token)[unsafe_offset=expert]
        score_expert(scores, keys, i, logit, own_bias)
    barrier()
    var own = Int(warp_id())
    if own < Int(tokens):
        var at = own * Int(top_k)
        choose_experts[normalize, EXPERTS_A_LANE](
            ids.unsafe_offset(at),
            weights.unsafe_offset(at),
            chosen.unsafe_offset(at),
            scores.unsafe_offset(own * Int(experts)),
            keys.unsafe_offset(own * Int(experts)),
            Int(experts),
            Int(top_k),
            scale,
        )
    barrier()
    group_chosen(rows, offsets, chosen, Int(tokens * top_k), Int(experts))


def router_fits(
    tokens: Int, hidden_size: Int, experts: Int, top_k: Int
) -> Bool:
    """Whether the kernel here can take so many tokens and a router of this size.
    """
    # A warp for every token at least.
    return (
        0 < tokens <= min(MAX_TOKENS, experts // TILE_ROWS)
        and hidden_size % (CLUSTER * STEP) == 0
        and hidden_size <= CLUSTER * STEP * MAX_STEPS
        and experts % TILE_ROWS == 0
        and experts <= MAX_WARPS * TILE_ROWS
        and top_k <= LANES
    )


def launch_router[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    rows: Ids,
    offsets: Ids,
    x: BFloats,
    w: BFloats,
    bias: Floats,
    tokens: Int,
    hidden_size: Int,
    experts: Int,
    top_k: Int,
    scale: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `router_kernel`."""
    comptime kernel = router_kernel[normalize]
    ctx.enqueue_function[kernel](
        ids,
        weights,
        rows,
        offsets,
        x,
        w,
        bias,
        Int32(tokens),
        Int32(hidden_size),
        Int32(experts),
        Int32(top_k),
        scale,
        grid_dim=CLUSTER,
        block_dim=experts // TILE_ROWS * LANES,
        cluster_dim=Dim(CLUSTER),
        shared_mem_bytes=RouterMemory.bytes(experts),
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(RouterMemory.bytes(MAX_WARPS * TILE_ROWS))
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
