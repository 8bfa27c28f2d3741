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


comptime MATRICES = 4
"""Most matrices that one launch multiplies the same tokens with."""


@fieldwise_init
struct LinearWeights[dtype: DType](ImplicitlyCopyable):
    """Matrices cut into units of 16 rows, one behind the other."""

    var y: StaticTuple[Elements[Self.dtype], MATRICES]
    var w: StaticTuple[BFloats, MATRICES]
    var out_features: StaticTuple[Int, MATRICES]
    """Multiples of 16; 0 where there is no matrix."""
    var in_features: Int

    @always_inline
    def units(self) -> Int:
        """Units of all matrices."""
        var total = 0
        comptime for i in range(MATRICES):
            total += self.out_features[i] // TILE_ROWS
        return total

    @always_inline
    def rows(self, unit: Int) -> RowPair:
        """The lane's place in a unit."""
        var w = self.w[0]
        var row = unit * TILE_ROWS
        comptime for i in range(1, MATRICES):
            var before = self.first_row(i)
            if unit * TILE_ROWS >= before:
                w = self.w[i]
                row = unit * TILE_ROWS - before
        var at = w.unsafe_offset(
            (row + lane_row()) * self.in_features + lane_column()
        )
        return RowPair(
            at, at.unsafe_offset(8 * self.in_features), self.in_features
        )

    @always_inline
    def first_row(self, matrix: Int) -> Int:
        """Rows of the matrices before one."""
        var total = 0
        comptime for i in range(MATRICES - 1):
            if i < matrix:
                total += self.out_features[i]
        return total

    @always_inline
    def target(self, unit: Int, token: Int) -> Elements[Self.dtype]:
        """Where the lane's sum of a unit's lower row goes; that of the higher one goes 8 elements behind.
        """
        var y = self.y[0]
        var row = unit * TILE_ROWS
        var columns = self.out_features[0]
        comptime for i in range(1, MATRICES):
            var before = self.first_row(i)
            if unit * TILE_ROWS >= before:
                y = self.y[i]
                row = unit * TILE_ROWS - before
                columns = self.out_features[i]
        return y.unsafe_offset(token * columns + row + lane_row())


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(WARPS * LANES))
)
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(BLOCKS))
@__name(t"step3p5_linear_stream_{dtype}_{tiles}")
def linear_stream_gpu[
    dtype: DType, tiles: Int
](
    y0: Elements[dtype],
    y1: Elements[dtype],
    y2: Elements[dtype],
    y3: Elements[dtype],
    x: BFloats,
    w0: BFloats,
    w1: BFloats,
    w2: BFloats,
    w3: BFloats,
    tokens: Int32,
    in_features: Int32,
    out_features0: Int32,
    out_features1: Int32,
    out_features2: Int32,
    out_features3: Int32,
):
    """`y_i = x w_i^T`; a block takes a share of the units, which lie behind one another.
    """
    var weights = LinearWeights[dtype](
        StaticTuple[Elements[dtype], MATRICES](y0, y1, y2, y3),
        StaticTuple[BFloats, MATRICES](w0, w1, w2, w3),
        StaticTuple[Int, MATRICES](
            Int(out_features0),
            Int(out_features1),
            Int(out_features2),
            Int(out_features3),
        ),
        Int(in_features),
    )
    var first, last = share(weights.units(), Int(block_idx.x), Int(grid_dim.x))
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
                        var to = weights.target(unit, token + t)
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
    y: StaticTuple[Elements[dtype], MATRICES],
    x: BFloats,
    w: StaticTuple[BFloats, MATRICES],
    tokens: Int,
    in_features: Int,
    out_features: StaticTuple[Int, MATRICES],
    ctx: DeviceContext,
) raises:
    """Enqueues `linear_stream_gpu` on all multiprocessors."""
    var units = 0
    for i in range(MATRICES):
        units += out_features[i] // TILE_ROWS

    def enqueue[tiles: Int]() raises {imm}:
        comptime kernel = linear_stream_gpu[dtype, tiles]
        var blocks = BLOCKS * ctx.get_attribute(
            DeviceAttribute.MULTIPROCESSOR_COUNT
        )
        ctx.enqueue_function[kernel](
            y[0],
            y[1],
            y[2],
            y[3],
            x,
            w[0],
            w[1],
            w[2],
            w[3],
            Int32(tokens),
            Int32(in_features),
            Int32(out_features[0]),
            Int32(out_features[1]),
            Int32(out_features[2]),
            Int32(out_features[3]),
            grid_dim=min(blocks, units),
            block_dim=WARPS * LANES,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens <= TILE_TOKENS:
        enqueue[1]()
    else:
        enqueue[4]()
