"""A linear layer without bias, on the same micro-kernel as the experts."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv
from std.sys import size_of

from .crossover import linear_gpu
from .dot_tile import TILE_ROWS, TileSums
from .grouped import GroupedProduct, Panel, multiply_group
from .operands import Elements, Floats, elements, expect_size
from .tasks import piece_count, share
from .team import Team, on_team


@fieldwise_init
struct Linear[weight_dtype: DType, adds: Bool = False](
    GroupedProduct, TrivialRegisterPassable
):
    """One expert that has every token; a tile is six rows of `w`, one a strip.

    Parameters:
        weight_dtype: Type of the weights.
        adds: The result is `base + x w^T`.
    """

    comptime dtype = Self.weight_dtype

    var y: Floats
    var base: Floats
    var x: Floats
    var w: Elements[Self.weight_dtype]
    var in_features: Int
    var out_features: Int

    @always_inline
    def tiles(self) -> Int:
        return ceildiv(self.out_features, TILE_ROWS)

    @always_inline
    def depth(self) -> Int:
        return self.in_features

    @always_inline
    def x_row(self, slot: Int) -> Floats:
        return self.x.unsafe_offset(slot * self.in_features)

    @always_inline
    def w_row(self, expert: Int, tile: Int, row: Int) -> Elements[Self.dtype]:
        var n = min(tile + row * self.tiles(), self.out_features - 1)
        return self.w.unsafe_offset(n * self.in_features)

    @always_inline
    def store(self, slot: Int, tile: Int, sums: TileSums):
        var to = self.y.unsafe_offset(slot * self.out_features)
        comptime for j in range(TILE_ROWS):
            var n = tile + j * self.tiles()
            if n < self.out_features:
                comptime if Self.adds:
                    var base = self.base[
                        unsafe_offset=slot * self.out_features + n
                    ]
                    to[unsafe_offset=n] = base + sums[j]
                else:
                    to[unsafe_offset=n] = sums[j]

    def pieces(self, tokens: Int) -> Int:
        """Number of pieces for so many tokens."""
        comptime size = size_of[Self.weight_dtype]()
        var bytes = self.out_features * self.in_features * size
        return piece_count(self.tiles(), bytes, tokens)

    @always_inline
    def run_piece(self, panel: Panel, tokens: Int, piece: Int, pieces: Int):
        """Computes the columns of `y` that belong to one piece."""
        var tiles = share(self.tiles(), piece, pieces)
        multiply_group(self, panel, 0, (0, tokens), tiles)


@always_inline
def linear_phase[
    dtype: DType, adds: Bool
](mut team: Team, product: Linear[dtype, adds], tokens: Int):
    """A whole linear layer."""
    var panel = Panel(product.in_features)
    var pieces = product.pieces(tokens)

    def piece(index: Int) {imm}:
        product.run_piece(panel, tokens, index, pieces)

    team.each(pieces, piece)


@extensibility.register("step3p5_linear")
struct Step3p5Linear:
    """`y = x w^T`."""

    @staticmethod
    def execute[
        y_dtype: DType, x_dtype: DType, dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=y_dtype, rank=2, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        w: InputTensor[dtype=dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Multiplies tokens with a matrix.

        Parameters:
            y_dtype: Type of the result; float32 on a CPU.
            x_dtype: Type of the tokens; float32 on a CPU.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device.

        Args:
            y: Result `[T, N]`.
            x: Tokens `[T, K]`.
            w: Weights `[N, K]`.
            ctx: The device.
        """
        comptime op = "step3p5_linear"
        expect_size(op, "w[N, K] dim K", w.dim_size(1), x.dim_size(1))
        expect_size(op, "y[T, N] dim N", y.dim_size(1), w.dim_size(0))
        expect_size(op, "y[T, N] dim T", y.dim_size(0), x.dim_size(0))
        if y.dim_size(0) == 0 or y.dim_size(1) == 0:
            return
        comptime if target == "cpu":
            comptime assert (
                y_dtype == DType.float32 and x_dtype == DType.float32
            ), "step3p5_linear: tokens are float32 on a CPU"
            var to = rebind[Floats](elements(y.unsafe_ptr()))
            var product = Linear[dtype](
                to,
                to,
                rebind[Floats](elements(x.unsafe_ptr())),
                elements(w.unsafe_ptr()),
                x.dim_size(1),
                w.dim_size(0),
            )
            var tokens = x.dim_size(0)

            def work(mut team: Team) {imm}:
                linear_phase(team, product, tokens)

            on_team(work)
        else:
            linear_gpu(
                elements(y.unsafe_ptr()),
                elements(x.unsafe_ptr()),
                elements(w.unsafe_ptr()),
                x.dim_size(0),
                x.dim_size(1),
                w.dim_size(0),
                ctx,
            )
