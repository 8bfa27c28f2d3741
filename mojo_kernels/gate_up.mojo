"""The first half of the experts: `silu(gate x) * (up x)`."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.math import ceildiv, exp
from std.utils.numerics import inf

from .crossover import gate_up_gpu
from .dot_tile import TILE_ROWS, TileSums
from .expert_pieces import ExpertPieces
from .grouped import GroupedProduct, Panel
from .operands import Elements, Floats, Ids, elements, expect_size
from .team import Team, on_team

comptime GATE_ROWS = TILE_ROWS // 2
"""Rows of `gate` in a tile, and as many of `up`: the number of strips of each."""


@fieldwise_init
struct GateUp[weight_dtype: DType](GroupedProduct, ImplicitlyCopyable):
    """A tile is three rows of `gate`, one a strip, and the same three of `up`.
    """

    comptime dtype = Self.weight_dtype

    var act: Floats
    var x: Floats
    var gate: Elements[Self.weight_dtype]
    var up: Elements[Self.weight_dtype]
    var rows: Ids
    var top_k: Int
    var hidden_size: Int
    var intermediate_size: Int
    var limit: Float32

    @always_inline
    def tiles(self) -> Int:
        return ceildiv(self.intermediate_size, GATE_ROWS)

    @always_inline
    def depth(self) -> Int:
        return self.hidden_size

    @always_inline
    def x_row(self, slot: Int) -> Floats:
        var token = Int(self.rows[unsafe_offset=slot]) // self.top_k
        return self.x.unsafe_offset(token * self.hidden_size)

    @always_inline
    def w_row(self, expert: Int, tile: Int, row: Int) -> Elements[Self.dtype]:
        var m = min(
            tile + row % GATE_ROWS * self.tiles(), self.intermediate_size - 1
        )
        var tensor = self.gate if row < GATE_ROWS else self.up
        return tensor.unsafe_offset(
            (expert * self.intermediate_size + m) * self.hidden_size
        )

    @always_inline
    def store(self, slot: Int, tile: Int, sums: TileSums):
        # Comparisons, not min and max, which would drop a NaN.
        var gated = sums / (1 + exp(-sums))
        gated = gated.gt(self.limit).select(self.limit, gated)
        var up = sums.rotate_left[GATE_ROWS]()
        up = up.gt(self.limit).select(self.limit, up)
        up = up.lt(-self.limit).select(-self.limit, up)
        var act = gated * up
        var to = self.act.unsafe_offset(slot * self.intermediate_size)
        comptime for j in range(GATE_ROWS):
            var m = tile + j * self.tiles()
            if m < self.intermediate_size:
                to[unsafe_offset=m] = act[j]


@always_inline
def gate_up_phase[
    dtype: DType
](mut team: Team, product: GateUp[dtype], offsets: Ids, experts: Int):
    """The first half of all experts."""
    var panel = Panel(product.hidden_size)
    var pieces = ExpertPieces(product, offsets, experts)

    def piece(index: Int) {imm}:
        pieces.run(panel, index)

    team.each(pieces.count, piece)


def gate_up_cpu[
    dtype: DType
](product: GateUp[dtype], offsets: Ids, experts: Int):
    """The first half of all experts, on a team of its own."""

    def work(mut team: Team) {imm}:
        gate_up_phase(team, product, offsets, experts)

    on_team(work)


@extensibility.register("step3p5_moe_gate_up")
struct Step3p5MoeGateUp:
    """`act[a] = silu(gate_e x_t) * (up_e x_t)` for every assignment of a token `t` to an expert `e`.
    """

    @staticmethod
    def execute[
        act_dtype: DType, x_dtype: DType, dtype: DType, //, target: StaticString
    ](
        act: OutputTensor[dtype=act_dtype, rank=2, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        gate: InputTensor[dtype=dtype, rank=3, ...],
        up: InputTensor[dtype=dtype, rank=3, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        offsets: InputTensor[dtype=DType.int32, rank=1, ...],
        limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Multiplies every expert's tokens with its gate and up matrices.

        Parameters:
            act_dtype: Type of the result; float32 on a CPU.
            x_dtype: Type of the tokens; float32 on a CPU.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device.

        Args:
            act: Result `[T * K, M]`, in the order of `rows`.
            x: Tokens `[T, H]`.
            gate: Gate matrices `[E, M, H]`.
            up: Up matrices `[E, M, H]`.
            rows: Assignments `t * K + k` grouped by expert `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            limit: `L > 0`: `min(silu(gate x), L) * clamp(up x, -L, L)`; 0 or infinite: no limit.
            ctx: The device.
        """
        comptime op = "step3p5_moe_gate_up"
        expect_size(op, "gate[E, M, H] dim H", gate.dim_size(2), x.dim_size(1))
        expect_size(op, "up[E, M, H] dim E", up.dim_size(0), gate.dim_size(0))
        expect_size(op, "up[E, M, H] dim M", up.dim_size(1), gate.dim_size(1))
        expect_size(op, "up[E, M, H] dim H", up.dim_size(2), x.dim_size(1))
        expect_size(op, "act[T*K, M] dim M", act.dim_size(1), gate.dim_size(1))
        expect_size(
            op, "act[T*K, M] dim T*K", act.dim_size(0), rows.dim_size(0)
        )
        expect_size(
            op, "offsets[E+1]", offsets.dim_size(0), gate.dim_size(0) + 1
        )
        var tokens = x.dim_size(0)
        if tokens == 0 or rows.dim_size(0) == 0 or gate.dim_size(1) == 0:
            return
        var top_k = rows.dim_size(0) // tokens
        expect_size(op, "rows[T*K]", rows.dim_size(0), tokens * top_k)
        var bound = limit if limit > 0 else inf[DType.float32]()
        comptime if target == "cpu":
            comptime assert (
                x_dtype == DType.float32 and act_dtype == DType.float32
            ), "step3p5_moe_gate_up: tokens are float32 on a CPU"
            gate_up_cpu(
                GateUp[dtype](
                    rebind[Floats](elements(act.unsafe_ptr())),
                    rebind[Floats](elements(x.unsafe_ptr())),
                    elements(gate.unsafe_ptr()),
                    elements(up.unsafe_ptr()),
                    elements(rows.unsafe_ptr()),
                    top_k,
                    x.dim_size(1),
                    gate.dim_size(1),
                    bound,
                ),
                elements(offsets.unsafe_ptr()),
                gate.dim_size(0),
            )
        else:
            gate_up_gpu(
                elements(act.unsafe_ptr()),
                elements(x.unsafe_ptr()),
                elements(gate.unsafe_ptr()),
                elements(up.unsafe_ptr()),
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                tokens,
                top_k,
                gate.dim_size(0),
                x.dim_size(1),
                gate.dim_size(1),
                bound,
                elements(act.unsafe_ptr()),
                elements(gate.unsafe_ptr()),
                elements(up.unsafe_ptr()),
                0,
                bound,
                ctx,
            )
