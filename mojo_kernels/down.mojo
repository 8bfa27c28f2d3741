"""The second half of the experts: the down product, weighted and summed over a token's experts."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv, fma
from std.sys import size_of

from .crossover import down_gpu
from .dot_tile import LANES, Lanes, TILE_ROWS, TileSums, load_row
from .expert_pieces import ExpertPieces
from .grouped import GroupedProduct, Panel, multiply_group
from .operands import Elements, Floats, Ids, Scratch, elements, expect_size
from .tasks import piece_count, share
from .team import Team, on_team


comptime FEW_ASSIGNMENTS = 256
"""Up to so many, a thread multiplies with one expert after another and keeps the products; beyond, it owns columns of
the result and adds at once."""


@fieldwise_init
struct Down[weight_dtype: DType, adds: Bool](
    GroupedProduct, ImplicitlyCopyable
):
    """A tile is six rows of `down`, one a strip: six columns of `y`.

    Parameters:
        weight_dtype: Type of the weights.
        adds: Adds to the tokens' rows of `y`, weighted; otherwise every assignment has a row of `y`, in the order of
            `rows`.
    """

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
        var row = slot
        var weight = Float32(1)
        comptime if Self.adds:
            var assignment = Int(self.rows[unsafe_offset=slot])
            weight = self.weights[unsafe_offset=assignment]
            row = assignment // self.top_k
        var to = self.y.unsafe_offset(row * self.hidden_size)
        comptime for j in range(TILE_ROWS):
            var h = tile + j * self.tiles()
            if h < self.hidden_size:
                comptime if Self.adds:
                    to[unsafe_offset=h] = fma(
                        weight, sums[j], to[unsafe_offset=h]
                    )
                else:
                    to[unsafe_offset=h] = sums[j]

    def add_products(
        self,
        y: Floats,
        products: Floats,
        slots: Tuple[Int, Int],
        columns: Tuple[Int, Int],
    ):
        """Adds the weighted `products` of the assignments in `slots`, a row each, to the tokens' rows of `y`, vectors
        `columns`.
        """
        for slot in range(slots[0], slots[1]):
            var assignment = Int(self.rows[unsafe_offset=slot])
            var weight = self.weights[unsafe_offset=assignment]
            var product = products.unsafe_offset(slot * self.hidden_size)
            var to = y.unsafe_offset(
                assignment // self.top_k * self.hidden_size
            )
            for c in range(columns[0], columns[1]):
                var at = c * LANES
                if self.hidden_size - at >= LANES:
                    to.unsafe_offset(at).unsafe_store(
                        fma(
                            Lanes(weight),
                            load_row(product.unsafe_offset(at)),
                            load_row(to.unsafe_offset(at)),
                        )
                    )
                else:
                    for h in range(at, self.hidden_size):
                        to[unsafe_offset=h] = fma(
                            weight,
                            product[unsafe_offset=h],
                            to[unsafe_offset=h],
                        )


@fieldwise_init
struct ExpertSums[dtype: DType](ImplicitlyCopyable):
    """`y_t += sum_k weights[t, k] * (down_e act)`, a token's experts in ascending order: the order of a sum depends on
    nothing else.
    """

    var product: Down[Self.dtype, adds=True]
    var products: Floats
    """Room for `[kept_rows, H]`."""
    var assignments: Int
    var experts: Int

    @staticmethod
    def kept_rows(assignments: Int) -> Int:
        """Rows that have to be kept, `H` each."""
        return assignments if assignments <= FEW_ASSIGNMENTS else 0

    @always_inline
    def phases(self, mut team: Team, panel: Panel, offsets: Ids):
        """Adds all experts.

        Args:
            team: The threads.
            panel: Scratch space of the thread.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
        """
        if self.assignments <= FEW_ASSIGNMENTS:
            self.expert_after_expert(team, panel, offsets)
        else:
            self.by_columns(team, panel, offsets)

    def expert_after_expert(self, mut team: Team, panel: Panel, offsets: Ids):
        """Long streams of weights; the products are summed when all are there.
        """
        ref down = self.product
        var pieces = ExpertPieces(
            Down[Self.dtype, adds=False](
                self.products,
                down.act,
                down.down,
                down.rows,
                down.weights,
                down.top_k,
                down.hidden_size,
                down.intermediate_size,
            ),
            offsets,
            self.experts,
        )

        def multiply(index: Int) {imm}:
            pieces.run(panel, index)

        team.each(pieces.count, multiply)

        # These experts may be some of many, and not have every assignment.
        var slots = (
            Int(offsets[unsafe_offset=0]),
            Int(offsets[unsafe_offset=self.experts]),
        )
        var vectors = ceildiv(down.hidden_size, LANES)
        var bytes = (slots[1] - slots[0]) * down.hidden_size * 4
        var parts = piece_count(vectors, bytes, 0)

        def add(index: Int) {imm}:
            self.product.add_products(
                self.product.y,
                self.products,
                slots,
                share(vectors, index, parts),
            )

        team.each(parts, add)

    def by_columns(self, mut team: Team, panel: Panel, offsets: Ids):
        """Every piece owns columns of `y`."""
        comptime size = size_of[Self.dtype]()
        var tiles = self.product.tiles()
        var hit = 0
        for e in range(self.experts):
            hit += Int(offsets[unsafe_offset=e] != offsets[unsafe_offset=e + 1])
        var bytes = hit * tiles * TILE_ROWS * self.product.depth() * size
        var pieces = piece_count(tiles, bytes, self.assignments // max(hit, 1))

        def piece(index: Int) {imm}:
            for e in range(self.experts):
                var begin = Int(offsets[unsafe_offset=e])
                var end = Int(offsets[unsafe_offset=e + 1])
                multiply_group(
                    self.product,
                    panel,
                    e,
                    (begin, end),
                    share(tiles, index, pieces),
                )

        team.each(pieces, piece)


def down_cpu[
    dtype: DType
](product: Down[dtype, adds=True], offsets: Ids, tokens: Int, experts: Int,):
    """All experts' sums, on a team of its own."""
    for i in range(tokens * product.hidden_size):
        product.y[unsafe_offset=i] = 0
    var assignments = tokens * product.top_k
    var products = Scratch[DType.float32](
        ExpertSums[dtype].kept_rows(assignments) * product.hidden_size
    )
    var sums = ExpertSums(product, products.data, assignments, experts)

    def work(mut team: Team) {imm}:
        var panel = Panel(product.intermediate_size)
        sums.phases(team, panel, offsets)

    on_team(work)
    products.keep()


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
                Down[dtype, adds=True](
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
