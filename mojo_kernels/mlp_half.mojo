"""The second half of a dense decoder layer on a CPU: norm, gated MLP, residual."""

from extensibility import InputTensor, OutputTensor

from .gate_up import GateUp, gate_up_phase
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Floats, Scratch, elements, expect_size
from .swiglu import EveryToken
from .team import Team


struct MlpHalf[dtype: DType](Movable):
    """`y = h + down( silu(gate x) * (up x) )`, `x = norm(h)`.

    Parameters:
        dtype: Type of the matrices.
    """

    var tokens: Int
    var residual: Floats
    var x: Scratch[DType.float32]
    var act: Scratch[DType.float32]
    var every: EveryToken
    var norm: Norm
    var gate_up: GateUp[Self.dtype]
    var product: Linear[Self.dtype, adds=True]

    def __init__(
        out self,
        op: StaticString,
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        h: Floats,
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=Self.dtype, rank=2, ...],
        up: InputTensor[dtype=Self.dtype, rank=2, ...],
        down: InputTensor[dtype=Self.dtype, rank=2, ...],
        eps: Float32,
        norm_offset: Float32,
        limit: Float32,
    ) raises:
        """Takes the operands and room for what lies between them.

        Args:
            op: Name of the op, for errors.
            y: Result `[T, H]`.
            h: Hidden states `[T, H]`.
            norm_weight: `[H]`.
            gate: Gate matrix `[M, H]`.
            up: Up matrix `[M, H]`.
            down: Down matrix `[H, M]`.
            eps: Of the norm.
            norm_offset: Added to the norm's weights.
            limit: Clamp limit; infinite: none.
        """
        var tokens = y.dim_size(0)
        var hidden_size = y.dim_size(1)
        var width = gate.dim_size(0)
        expect_size(op, "norm_weight[H]", norm_weight.dim_size(0), hidden_size)
        expect_size(op, "gate[M, H] dim H", gate.dim_size(1), hidden_size)
        expect_size(op, "up[M, H] dim M", up.dim_size(0), width)
        expect_size(op, "up[M, H] dim H", up.dim_size(1), hidden_size)
        expect_size(op, "down[H, M] dim H", down.dim_size(0), hidden_size)
        expect_size(op, "down[H, M] dim M", down.dim_size(1), width)

        self.tokens = tokens
        self.residual = h
        self.x = Scratch[DType.float32](tokens * hidden_size)
        self.act = Scratch[DType.float32](tokens * width)
        self.every = EveryToken(tokens)
        self.norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )
        self.gate_up = GateUp[Self.dtype](
            self.act.data,
            self.x.data,
            elements(gate.unsafe_ptr()),
            elements(up.unsafe_ptr()),
            self.every.rows.data,
            1,
            hidden_size,
            width,
            limit,
        )
        self.product = Linear[Self.dtype, adds=True](
            elements(y.unsafe_ptr()),
            h,
            self.act.data,
            elements(down.unsafe_ptr()),
            width,
            hidden_size,
        )

    @always_inline
    def phases(self, mut team: Team):
        """Computes the half, in three phases."""
        norm_phase(team, self.norm, self.x.data, self.residual, self.tokens)
        gate_up_phase(team, self.gate_up, self.every.offsets.data, 1)
        linear_phase(team, self.product, self.tokens)
