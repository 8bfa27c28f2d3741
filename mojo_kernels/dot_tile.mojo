"""The micro-kernel: dot products of a few token rows with a few weight rows, held in registers.

Every (token, weight row) pair has one vector accumulator over the depth and one reduction tree, whatever the shape of
the tile around it: a dot product has the same bits alone and in a full tile, so results depend neither on the batch nor
on the number of threads.
"""

from std.math import fma
from std.sys import CompilationTarget, simd_width_of
from std.sys.intrinsics import PrefetchOptions, prefetch

from .operands import Elements, Floats

comptime LANES = simd_width_of[DType.float32]()
"""Floats in a vector register."""

comptime Lanes = SIMD[DType.float32, LANES]

comptime TILE_ROWS = 6
"""Weight rows of a tile."""

comptime TILE_TOKENS = 2 if CompilationTarget.is_x86() and LANES < 16 else 4
"""Token rows of a full tile: with accumulators and one weight they fit into 16 registers (x86 before AVX-512) or 32."""

comptime TileSums = SIMD[DType.float32, 8]
"""Sums of one token with the rows of a tile; the last two lanes are padding."""

comptime FETCH = PrefetchOptions().for_read().low_locality().to_data_cache()


@always_inline
def load_row[dtype: DType](row: Elements[dtype]) -> Lanes:
    """The next `LANES` values of a row, as float32."""
    return row.unsafe_load[width=LANES]().cast[DType.float32]()


@always_inline
def load_tail[dtype: DType](row: Elements[dtype], count: Int) -> Lanes:
    """The last `count < LANES` values of a row, as float32, zeros behind them.
    """
    var values = Lanes(0)
    for i in range(count):
        values[i] = row[unsafe_offset=i].cast[DType.float32]()
    return values


struct DotTile[tokens: Int](Movable):
    """Accumulators of `tokens` x `TILE_ROWS` dot products.

    Parameters:
        tokens: Number of token rows, at most `TILE_TOKENS`.
    """

    var sums: Array[Lanes, Self.tokens * TILE_ROWS]

    @always_inline
    def __init__(out self):
        self.sums = Array[Lanes, Self.tokens * TILE_ROWS](fill=0)

    @always_inline
    def add[
        dtype: DType, next_dtype: DType, //, step: Int, streams: Int
    ](
        mut self,
        x: Array[Floats, Self.tokens],
        w: Array[Elements[dtype], TILE_ROWS],
        depth: Int,
        next: Array[Elements[next_dtype], streams],
    ):
        """Adds `depth` products to every accumulator.

        Parameters:
            dtype: Type of the weights, cast to float32 on load.
            next_dtype: Type of what is fetched.
            step: Distance of a weight row's successive vectors: `LANES` in the tensor, `TILE_ROWS * LANES` in a panel.
            streams: Number of rows to fetch.

        Args:
            x: Every token row's first element.
            w: Every weight row's first element.
            depth: Number of elements of each row.
            next: Rows that are needed next, as long as these: they are fetched into the second-level cache meanwhile.
        """
        var vectors = depth // LANES
        for c in range(vectors):
            comptime for j in range(streams):
                prefetch[FETCH](next[j].unsafe_offset(c * LANES))
            var xs = Array[Lanes, Self.tokens](fill=0)
            comptime for i in range(Self.tokens):
                xs[i] = load_row(x[i].unsafe_offset(c * LANES))
            comptime for j in range(TILE_ROWS):
                var values = load_row(w[j].unsafe_offset(c * step))
                comptime for i in range(Self.tokens):
                    comptime a = i * TILE_ROWS + j
                    self.sums[a] = fma(xs[i], values, self.sums[a])
        var left = depth - vectors * LANES
        if left > 0:
            var xs = Array[Lanes, Self.tokens](fill=0)
            comptime for i in range(Self.tokens):
                xs[i] = load_tail(x[i].unsafe_offset(vectors * LANES), left)
            comptime for j in range(TILE_ROWS):
                var values = load_tail(w[j].unsafe_offset(vectors * step), left)
                comptime for i in range(Self.tokens):
                    comptime a = i * TILE_ROWS + j
                    self.sums[a] = fma(xs[i], values, self.sums[a])

    @always_inline
    def reduced(self, token: Int) -> TileSums:
        """The sums of one token."""
        ref s = self.sums
        var i = token * TILE_ROWS
        return reduce_pairs(
            s[i]
            .join(s[i + 1])
            .join(s[i + 2].join(s[i + 3]))
            .join(
                s[i + 4].join(s[i + 5]).join(SIMD[DType.float32, 2 * LANES](0))
            )
        )


@always_inline
def reduce_pairs[width: Int](values: SIMD[DType.float32, width]) -> TileSums:
    """Sums eight rows of lanes that lie behind one another, neighbour with neighbour, to eight numbers.
    """
    comptime if width == 8:
        return rebind[TileSums](values)
    else:
        var even, odd = values.deinterleave()
        return reduce_pairs(rebind[SIMD[DType.float32, width // 2]](even + odd))
