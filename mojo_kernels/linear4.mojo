"""Four linear layers of the same tokens in one op: queries, keys, values and gates."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.sys import size_of
from std.utils.static_tuple import StaticTuple

from .crossover import linear4_gpu
from .dot_tile import TILE_ROWS, TileSums
from .grouped import GroupedProduct, Panel, multiply_group
from .linear import Linear
from .linear_gpu import MATRICES
from .operands import Elements, Floats, elements, expect_size
from .tasks import piece_count, share
from .team import Team, on_team


@fieldwise_init
struct Linear4[weight_dtype: DType](GroupedProduct, ImplicitlyCopyable):
    """The tiles of one matrix behind those of the other."""

    comptime dtype = Self.weight_dtype

    var parts: StaticTuple[Linear[Self.weight_dtype], MATRICES]

    @always_inline
    def tiles(self) -> Int:
        """Tiles of all matrices."""
        var total = 0
        comptime for i in range(MATRICES):
            total += self.parts[i].tiles()
        return total

    @always_inline
    def place(self, tile: Int) -> Tuple[Int, Int]:
        """Matrix of a tile, and the tile within it."""
        var matrix = 0
        var local = tile
        comptime for i in range(MATRICES - 1):
            if matrix == i and local >= self.parts[i].tiles():
                local -= self.parts[i].tiles()
                matrix = i + 1
        return matrix, local

    @always_inline
    def depth(self) -> Int:
        return self.parts[0].depth()

    @always_inline
    def x_row(self, slot: Int) -> Floats:
        return self.parts[0].x_row(slot)

    @always_inline
    def w_row(self, expert: Int, tile: Int, row: Int) -> Elements[Self.dtype]:
        var matrix, local = self.place(tile)
        return self.parts[matrix].w_row(expert, local, row)

    @always_inline
    def store(self, slot: Int, tile: Int, sums: TileSums):
        var matrix, local = self.place(tile)
        self.parts[matrix].store(slot, local, sums)


def linear4_cpu[dtype: DType](product: Linear4[dtype], tokens: Int):
    """Every piece owns tiles, of one matrix or of two."""
    var tiles = product.tiles()
    var bytes = tiles * TILE_ROWS * product.depth() * size_of[dtype]()
    var pieces = piece_count(tiles, bytes, tokens)

    def work(mut team: Team) {imm}:
        var panel = Panel(product.depth())

        def piece(index: Int) {imm}:
            var own = share(tiles, index, pieces)
            multiply_group(product, panel, 0, (0, tokens), own)

        team.each(pieces, piece)

    on_team(work)


@extensibility.register("step3p5_linear4")
struct Step3p5Linear4:
    """`y_i = x w_i^T` for four matrices."""

    @staticmethod
    def execute[
        x_dtype: DType, dtype: DType, //, target: StaticString
    ](
        y0: OutputTensor[dtype=x_dtype, rank=2, ...],
        y1: OutputTensor[dtype=x_dtype, rank=2, ...],
        y2: OutputTensor[dtype=x_dtype, rank=2, ...],
        y3: OutputTensor[dtype=x_dtype, rank=2, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        w0: InputTensor[dtype=dtype, rank=2, ...],
        w1: InputTensor[dtype=dtype, rank=2, ...],
        w2: InputTensor[dtype=dtype, rank=2, ...],
        w3: InputTensor[dtype=dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Multiplies tokens with four matrices.

        Parameters:
            x_dtype: Type of the tokens and results; float32 on a CPU.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device.

        Args:
            y0: Result `[T, N_0]`.
            y1: Result `[T, N_1]`.
            y2: Result `[T, N_2]`.
            y3: Result `[T, N_3]`.
            x: Tokens `[T, K]`.
            w0: Weights `[N_0, K]`.
            w1: Weights `[N_1, K]`.
            w2: Weights `[N_2, K]`.
            w3: Weights `[N_3, K]`.
            ctx: The device.
        """
        comptime op = "step3p5_linear4"
        var tokens = x.dim_size(0)
        var depth = x.dim_size(1)
        expect_size(op, "w0[N, K] dim K", w0.dim_size(1), depth)
        expect_size(op, "w1[N, K] dim K", w1.dim_size(1), depth)
        expect_size(op, "w2[N, K] dim K", w2.dim_size(1), depth)
        expect_size(op, "w3[N, K] dim K", w3.dim_size(1), depth)
        expect_size(op, "y0[T, N] dim N", y0.dim_size(1), w0.dim_size(0))
        expect_size(op, "y1[T, N] dim N", y1.dim_size(1), w1.dim_size(0))
        expect_size(op, "y2[T, N] dim N", y2.dim_size(1), w2.dim_size(0))
        expect_size(op, "y3[T, N] dim N", y3.dim_size(1), w3.dim_size(0))
        if tokens == 0:
            return
        comptime if target == "cpu":
            comptime assert (
                x_dtype == DType.float32
            ), "step3p5_linear4: tokens are float32 on a CPU"

            @always_inline
            def part(
                y: Pointer[Scalar[x_dtype], MutAnyOrigin],
                w: Pointer[Scalar[dtype], MutAnyOrigin],
                out_features: Int,
            ) {imm} -> Linear[dtype]:
                var to = rebind[Floats](elements(y))
                return Linear[dtype](
                    to,
                    to,
                    rebind[Floats](elements(x.unsafe_ptr())),
                    elements(w),
                    depth,
                    out_features,
                )

            linear4_cpu(
                Linear4[dtype](
                    StaticTuple[Linear[dtype], MATRICES](
                        part(y0.unsafe_ptr(), w0.unsafe_ptr(), w0.dim_size(0)),
                        part(y1.unsafe_ptr(), w1.unsafe_ptr(), w1.dim_size(0)),
                        part(y2.unsafe_ptr(), w2.unsafe_ptr(), w2.dim_size(0)),
                        part(y3.unsafe_ptr(), w3.unsafe_ptr(), w3.dim_size(0)),
                    )
                ),
                tokens,
            )
        else:
            linear4_gpu(
                StaticTuple[Elements[x_dtype], MATRICES](
                    elements(y0.unsafe_ptr()),
                    elements(y1.unsafe_ptr()),
                    elements(y2.unsafe_ptr()),
                    elements(y3.unsafe_ptr()),
                ),
                elements(x.unsafe_ptr()),
                StaticTuple[Elements[dtype], MATRICES](
                    elements(w0.unsafe_ptr()),
                    elements(w1.unsafe_ptr()),
                    elements(w2.unsafe_ptr()),
                    elements(w3.unsafe_ptr()),
                ),
                tokens,
                depth,
                StaticTuple[Int, MATRICES](
                    w0.dim_size(0),
                    w1.dim_size(0),
                    w2.dim_size(0),
                    w3.dim_size(0),
                ),
                ctx,
            )
