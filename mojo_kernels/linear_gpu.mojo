"""A linear layer for few tokens on an NVIDIA GPU: the weights are read once."""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_idx, grid_dim, warp_id
from max.gpu.host import DeviceAttribute, DeviceContext
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.utils import StaticTuple

from .operands import Elements
from .stream_gpu import (
    BFloats,
    CHUNK,
    LANES,
    ListedRows,
    Partials,
    RowPair,
    Stream,
    TILE_ROWS,
    TILE_TOKENS,
    lane_column,
    lane_row,
    multiply_pass,
)
from .tasks import share

comptime WARPS = 8
comptime STAGES = 2
comptime BLOCKS = 2


@fieldwise_init
struct LinearWeights(ImplicitlyCopyable):
    """A matrix cut into units of 16 rows."""

    var w: BFloats
    var in_features: Int

    @always_inline
    def rows(self, unit: Int) -> RowPair:
        """The lane's place in a unit."""
        var row = unit * TILE_ROWS + lane_row()
        var at = self.w.unsafe_offset(row * self.in_features + lane_column())
        return RowPair(
            at, at.unsafe_offset(8 * self.in_features), self.in_features
        )


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
def linear_stream_gpu[
    dtype: DType, tiles: Int
](
    y: Elements[dtype],
    x: BFloats,
    w: BFloats,
    tokens: Int32,
    in_features: Int32,
    out_features: Int32,
):
    """`y = x w^T`; a block takes a share of the units, which lie behind one another.
    """
    var first, last = share(
        Int(out_features) // TILE_ROWS, Int(block_idx.x), Int(grid_dim.x)
    )
    var weights = LinearWeights(w, Int(in_features))
    var rows = weights.rows(first)
    if first == last:
        rows.depth = 0
    var stream = Stream[WARPS, STAGES](rows)
    var partials = Partials[WARPS, tiles]()
    # The weights do not depend on the preceding kernel, the tokens do.
    wait_on_dependent_grids()
    launch_dependent_grids()
    for unit in range(first, last):
        var following = weights.rows(unit + 1)
        if unit + 1 == last:
            following.depth = 0
        var token = 0
        while token < Int(tokens):
            var size = min(Int(tokens) - token, tiles * TILE_TOKENS)
            var next = rows
            if token + size == Int(tokens):
                next = following
            multiply_pass(
                stream,
                partials,
                rows,
                next,
                ListedRows(x, Int(in_features)),
                token,
                size,
            )
            for i in range(Int(warp_id()), ceildiv(size, TILE_TOKENS), WARPS):
                var sums = partials.total(i)
                comptime for j in range(2):
                    var t = i * TILE_TOKENS + lane_column() // 4 + j
                    if t < size:
                        var to = y.unsafe_offset(
                            (token + t) * Int(out_features)
                            + unit * TILE_ROWS
                            + lane_row()
                        )
                        to[unsafe_offset=0] = sums[j].cast[dtype]()
                        to[unsafe_offset=8] = sums[2 + j].cast[dtype]()
            token += size
        rows = following


def linear_fits(in_features: Int, out_features: Int) -> Bool:
    """Whether the kernel here can take a matrix of this size."""
    return in_features % CHUNK == 0 and out_features % TILE_ROWS == 0


def linear_stream[
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
    """Enqueues `linear_stream_gpu` on all multiprocessors."""

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = linear_stream_gpu[dtype, tiles]
        var blocks = BLOCKS * ctx.get_attribute(
            DeviceAttribute.MULTIPROCESSOR_COUNT
        )
        ctx.enqueue_function[kernel](
            y,
            x,
            w,
            Int32(tokens),
            Int32(in_features),
            Int32(out_features),
            grid_dim=min(blocks, out_features // TILE_ROWS),
            block_dim=WARPS * LANES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[4]()
