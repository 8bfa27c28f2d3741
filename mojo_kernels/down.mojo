"""The second half of the experts: the down product, weighted and summed over a token's experts."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv, fma
from std.sys import size_of

from .crossover import down_gpu
from .dot_tile import TILE_ROWS, TileSums
from .grouped import GroupedProduct, Panel, multiply_group
from .operands import Elements, Floats, Ids, elements, expect_size
from .tasks import piece_count, share
from .team import Team, on_team


@fieldwise_init
struct Down[weight_dtype: DType](GroupedProduct, ImplicitlyCopyable):
    """A tile is six rows of `down`, one a strip: six columns of `y`."""

    comptime dtype = Self.weight_dtype

    var y: Floats
    var act: Floats
    var down: Elements[Self.weight_dtype]
    var rows: Ids
    var weights: Floats
    var top_k: Int
    var hidden_size: Int
    var intermediate_size: Int

    @always_inline
    def tiles(self) -> Int:
        """Number of tiles of an expert, the length of a strip."""
        return ceildiv(self.hidden_size, TILE_ROWS)

    @always_inline
    def depth(self) -> Int:
        return self.intermediate_size

    @always_inline
    def x_row(self, slot: Int) -> Floats:
        return self.act.unsafe_offset(slot * self.intermediate_size)

    @always_inline
    def w_row(self, expert: Int, tile: Int, row: Int) -> Elements[Self.dtype]:
        var h = min(tile + row * self.tiles(), self.hidden_size - 1)
        return self.down.unsafe_offset(
            (expert * self.hidden_size + h) * self.intermediate_size
        )

    @always_inline
    def store(self, slot: Int, tile: Int, sums: TileSums):
        var assignment = Int(self.rows[unsafe_offset=slot])
        var weight = self.weights[unsafe_offset=assignment]
        var to = self.y.unsafe_offset(
            assignment // self.top_k * self.hidden_size
        )
        comptime for j in range(TILE_ROWS):
            var h = tile + j * self.tiles()
            if h < self.hidden_size:
                to[unsafe_offset=h] = fma(weight, sums[j], to[unsafe_offset=h])

    def clear(self, tokens: Int, first: Int, last: Int):
        """Zeroes the columns of the tiles `first` to `last`."""
        for t in range(tokens):
            var to = self.y.unsafe_offset(t * self.hidden_size)
            for j in range(TILE_ROWS):
                var strip = j * self.tiles()
                for h in range(
                    strip + first, min(strip + last, self.hidden_size)
                ):
                    to[unsafe_offset=h] = 0

    def pieces(self, offsets: Ids, experts: Int) -> Int:
        """Number of pieces; at least one."""
        var hit = 0
        for e in range(experts):
            hit += Int(offsets[unsafe_offset=e] != offsets[unsafe_offset=e + 1])
        comptime size = size_of[Self.weight_dtype]()
        var bytes = hit * self.hidden_size * self.intermediate_size * size
        var assignments = Int(offsets[unsafe_offset=experts])
        return piece_count(self.tiles(), bytes, assignments // max(hit, 1))

    @always_inline
    def add_experts(
        self, panel: Panel, offsets: Ids, experts: Int, tiles: Tuple[Int, Int]
    ):
        """Adds the experts in order: the order of a sum depends on nothing else.
        """
        for e in range(experts):
            var begin = Int(offsets[unsafe_offset=e])
            var end = Int(offsets[unsafe_offset=e + 1])
            multiply_group(self, panel, e, (begin, end), tiles)


def down_cpu[
    dtype: DType
](product: Down[dtype], offsets: Ids, tokens: Int, experts: Int):
    """Every piece owns columns of `y`."""
    var pieces = product.pieces(offsets, experts)

    def work(mut team: Team) {imm}:
        var panel = Panel(product.intermediate_size)

        def piece(index: Int) {imm}:
            var tiles = share(product.tiles(), index, pieces)
            product.clear(tokens, tiles[0], tiles[1])
            product.add_experts(panel, offsets, experts, tiles)

        team.each(pieces, piece)

    on_team(work)


@extensibility.register("step3p5_moe_down")
struct Step3p5MoeDown:
    """`y_t = sum_k weights[t, k] * (down_e act)`, summed in float32 in ascending order of the experts.
    """

    @staticmethod
    def execute[
        y_dtype: DType, act_dtype: DType, dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=y_dtype, rank=2, ...],
        act: InputTensor[dtype=act_dtype, rank=2, ...],
        down: InputTensor[dtype=dtype, rank=3, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        offsets: InputTensor[dtype=DType.int32, rank=1, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Multiplies every assignment with its expert's down matrix and sums over a token's experts.

        A token's experts are distinct.

        Parameters:
            y_dtype: Type of the result; float32 on a CPU.
            act_dtype: Type of the activations; float32 on a CPU.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device.

        Args:
            y: Result `[T, H]`.
            act: Activations `[T * K, M]`, in the order of `rows`.
            down: Down matrices `[E, H, M]`.
            rows: Assignments `t * K + k` grouped by expert `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            weights: Weight of every assignment `[T, K]`.
            ctx: The device.
        """
        comptime op = "step3p5_moe_down"
        expect_size(op, "down[E, H, M] dim H", down.dim_size(1), y.dim_size(1))
        expect_size(
            op, "down[E, H, M] dim M", down.dim_size(2), act.dim_size(1)
        )
        expect_size(
            op, "weights[T, K] dim T", weights.dim_size(0), y.dim_size(0)
        )
        expect_size(
            op,
            "rows[T*K]",
            rows.dim_size(0),
            weights.dim_size(0) * weights.dim_size(1),
        )
        expect_size(
            op, "act[T*K, M] dim T*K", act.dim_size(0), rows.dim_size(0)
        )
        expect_size(
            op, "offsets[E+1]", offsets.dim_size(0), down.dim_size(0) + 1
        )
        if y.dim_size(0) == 0 or y.dim_size(1) == 0:
            return
        comptime if target == "cpu":
            comptime assert (
                y_dtype == DType.float32 and act_dtype == DType.float32
            ), "step3p5_moe_down: activations are float32 on a CPU"
            down_cpu(
                Down[dtype](
                    rebind[Floats](elements(y.unsafe_ptr())),
                    rebind[Floats](elements(act.unsafe_ptr())),
                    elements(down.unsafe_ptr()),
                    elements(rows.unsafe_ptr()),
                    elements(weights.unsafe_ptr()),
                    weights.dim_size(1),
                    y.dim_size(1),
                    act.dim_size(1),
                ),
                elements(offsets.unsafe_ptr()),
                y.dim_size(0),
                down.dim_size(0),
            )
        else:
            down_gpu(
                elements(y.unsafe_ptr()),
                elements(act.unsafe_ptr()),
                elements(down.unsafe_ptr()),
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                y.dim_size(0),
                weights.dim_size(1),
                down.dim_size(0),
                y.dim_size(1),
                act.dim_size(1),
                elements(act.unsafe_ptr()),
                elements(down.unsafe_ptr()),
                0,
                ctx,
            )
