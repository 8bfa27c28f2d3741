"""`silu(gate x) * (up x)` for few tokens on an NVIDIA GPU: every hit expert's matrices are read once."""

from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    grid_dim,
    warp_id,
)
from max.gpu.host import DeviceAttribute, DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.utils import StaticTuple

from .activation import activate
from .operands import Elements, Ids
from .stream_gpu import (
    BFloats,
    CHUNK,
    GatheredRows,
    HitList,
    LANES,
    ListedRows,
    MAX_EXPERTS,
    Partials,
    RowPair,
    Stream,
    TILE_TOKENS,
    TokenRows,
    divide,
    lane_column,
    lane_row,
    multiply_pass,
)
from .tasks import share

comptime WARPS = 8
comptime STAGES = 2
comptime BLOCKS = 2
"""Blocks of a multiprocessor: while one adds up its warps' sums, the other reads."""

comptime TILE_WIDTH = 8
"""A block's 16 rows are so many of `gate` and the same of `up`, so that a lane has both halves of a result."""


@fieldwise_init
struct GateUpWeights(ImplicitlyCopyable):
    """Both matrices of every expert, cut into tiles of 8 + 8 rows; a unit is a tile of a hit expert.
    """

    var gate: BFloats
    var up: BFloats
    var hidden_size: Int
    var intermediate_size: Int

    @always_inline
    def tiles(self) -> Int:
        """Tiles of an expert."""
        return self.intermediate_size // TILE_WIDTH

    @always_inline
    def rows(self, hits: HitList, unit: Int) -> RowPair:
        """The lane's place in a unit."""
        var hit, tile = divide(unit, self.tiles())
        var row = (
            hits.expert(hit) * self.intermediate_size
            + tile * TILE_WIDTH
            + lane_row()
        )
        var at = row * self.hidden_size + lane_column()
        return RowPair(
            self.gate.unsafe_offset(at),
            self.up.unsafe_offset(at),
            self.hidden_size,
        )


@fieldwise_init
struct SharedGateUp[dtype: DType](ImplicitlyCopyable):
    """The first half of a shared expert, which has every token."""

    var act: Elements[Self.dtype]
    """Result `[T, width]`."""
    var gate: BFloats
    var up: BFloats
    var width: Int
    """0: there is none, and the rest is not looked at."""
    var limit: Float32


@always_inline
def stream_gate_up[
    dtype: DType, Rows: TokenRows, tiles: Int, //, tokens_ready: Bool
](
    act: Elements[dtype],
    x: Rows,
    weights: GateUpWeights,
    hits: HitList,
    limit: Float32,
    mut partials: Partials[WARPS, tiles],
):
    """A block's share of the units, which lie behind one another.

    Parameters:
        dtype: Type of the result.
        Rows: Where the tokens are.
        tiles: Tiles of tokens that are multiplied at once.
        tokens_ready: The tokens were written before the preceding kernel began, so that only storing waits for its end;
            otherwise only the first weights are requested before.

    Args:
        act: Result, a row for every slot.
        x: Tokens.
        weights: Matrices.
        hits: Experts with tokens.
        limit: See `activate`.
        partials: The block's shared memory for sums.
    """
    var first, last = share(
        hits.count() * weights.tiles(), Int(block_idx.x), Int(grid_dim.x)
    )
    if first == last:
        return
    var rows = weights.rows(hits, first)
    var stream = Stream[WARPS, STAGES](rows)
    comptime if not tokens_ready:
        wait_on_dependent_grids()
        launch_dependent_grids()
    for unit in range(first, last):
        var hit, tile = divide(unit, weights.tiles())
        var following = rows
        if unit + 1 < last:
            following = weights.rows(hits, unit + 1)
        else:
            following.depth = 0
        var slot = hits.begin(hit)
        var end = hits.begin(hit + 1)
        while slot < end:
            var tokens = min(end - slot, tiles * TILE_TOKENS)
            var next = rows
            if slot + tokens == end:
                next = following
            multiply_pass(stream, partials, rows, next, x, slot, tokens)
            comptime if tokens_ready:
                wait_on_dependent_grids()
            for i in range(Int(warp_id()), ceildiv(tokens, TILE_TOKENS), WARPS):
                var sums = partials.total(i)
                comptime for j in range(2):
                    var token = i * TILE_TOKENS + lane_column() // 4 + j
                    if token < tokens:
                        var at = (
                            (slot + token) * weights.intermediate_size
                            + tile * TILE_WIDTH
                            + lane_row()
                        )
                        act[unsafe_offset=at] = activate(
                            sums[j], sums[2 + j], limit
                        ).cast[dtype]()
            slot += tokens
        rows = following


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__name(t"step3p5_gate_up_stream_{dtype}_{tiles}")
def gate_up_stream_gpu[
    dtype: DType, tiles: Int
](
    act: Elements[dtype],
    shared_act: Elements[dtype],
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    shared_gate: BFloats,
    shared_up: BFloats,
    rows: Ids,
    offsets: Ids,
    tokens: Int32,
    top_k: Int32,
    experts: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    shared_size: Int32,
    limit: Float32,
    shared_limit: Float32,
):
    """`act[slot] = silu(gate_e x_t) * (up_e x_t)`, and the same of the shared expert, which has every token.

    The shared expert is read before the preceding kernels have ended, which choose the routed ones and take more time
    than they read. That is sound because they choose by the tokens: the first of them, the router's product, has waited
    for these before it lets the next kernel begin.
    """
    var partials = Partials[WARPS, tiles]()
    var hits = HitList()
    if shared_size > 0:
        hits.fill_one(Int(tokens))
        stream_gate_up[tokens_ready=True](
            shared_act,
            ListedRows(x, Int(hidden_size)),
            GateUpWeights(
                shared_gate, shared_up, Int(hidden_size), Int(shared_size)
            ),
            hits,
            shared_limit,
            partials,
        )
        # Every warp is done with the list.
        barrier()
    wait_on_dependent_grids()
    launch_dependent_grids()
    hits.fill(offsets, Int(experts))
    stream_gate_up[tokens_ready=False](
        act,
        GatheredRows(x, rows, Int(top_k), Int(hidden_size)),
        GateUpWeights(gate, up, Int(hidden_size), Int(intermediate_size)),
        hits,
        limit,
        partials,
    )


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__name(t"step3p5_swiglu_stream_{dtype}_{tiles}")
def swiglu_stream_gpu[
    dtype: DType, tiles: Int
](
    act: Elements[dtype],
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    tokens: Int32,
    hidden_size: Int32,
    intermediate_size: Int32,
    limit: Float32,
):
    """`act[t] = silu(gate x_t) * (up x_t)`."""
    var partials = Partials[WARPS, tiles]()
    var hits = HitList()
    hits.fill_one(Int(tokens))
    stream_gate_up[tokens_ready=False](
        act,
        ListedRows(x, Int(hidden_size)),
        GateUpWeights(gate, up, Int(hidden_size), Int(intermediate_size)),
        hits,
        limit,
        partials,
    )


def gate_up_fits(
    hidden_size: Int, intermediate_size: Int, experts: Int
) -> Bool:
    """Whether the kernels here can take matrices of these sizes."""
    return (
        hidden_size % CHUNK == 0
        and intermediate_size % TILE_WIDTH == 0
        and experts <= MAX_EXPERTS
    )


def gate_up_stream[
    dtype: DType
](
    act: Elements[dtype],
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    rows: Ids,
    offsets: Ids,
    tokens: Int,
    top_k: Int,
    experts: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    shared: SharedGateUp[dtype],
    ctx: DeviceContext,
) raises:
    """Enqueues `gate_up_stream_gpu` on all multiprocessors."""

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = gate_up_stream_gpu[dtype, tiles]
        ctx.enqueue_function[kernel](
            act,
            shared.act,
            x,
            gate,
            up,
            shared.gate,
            shared.up,
            rows,
            offsets,
            Int32(tokens),
            Int32(top_k),
            Int32(experts),
            Int32(hidden_size),
            Int32(intermediate_size),
            Int32(shared.width),
            limit,
            shared.limit,
            grid_dim=BLOCKS
            * ctx.get_attribute(DeviceAttribute.MULTIPROCESSOR_COUNT),
            block_dim=WARPS * LANES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[4]()


def swiglu_stream[
    dtype: DType
](
    act: Elements[dtype],
    x: BFloats,
    gate: BFloats,
    up: BFloats,
    tokens: Int,
    hidden_size: Int,
    intermediate_size: Int,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `swiglu_stream_gpu` on all multiprocessors."""

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = swiglu_stream_gpu[dtype, tiles]
        ctx.enqueue_function[kernel](
            act,
            x,
            gate,
            up,
            Int32(tokens),
            Int32(hidden_size),
            Int32(intermediate_size),
            limit,
            grid_dim=BLOCKS
            * ctx.get_attribute(DeviceAttribute.MULTIPROCESSOR_COUNT),
            block_dim=WARPS * LANES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[4]()
