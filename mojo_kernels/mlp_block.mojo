"""The second half of a dense decoder layer as one op on a CPU: norm, gated MLP, residual."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .gate_up import GateUp, gate_up_phase
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Scratch, elements, expect_size
from .swiglu import EveryToken
from .team import Team, on_team


@extensibility.register("step3p5_mlp_block")
struct Step3p5MlpBlock:
    """`y = h + down( silu(gate x) * (up x) )`, `x = norm(h)`."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        h: InputTensor[dtype=DType.float32, rank=2, ...],
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=dtype, rank=2, ...],
        up: InputTensor[dtype=dtype, rank=2, ...],
        down: InputTensor[dtype=dtype, rank=2, ...],
        eps: Float32,
        norm_offset: Float32,
        limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Runs the layer's half on a CPU; a GPU has an op for each step.

        Parameters:
            dtype: Type of the matrices.
            target: Kind of device.

        Args:
            y: Result `[T, H]`.
            h: Hidden states `[T, H]`.
            norm_weight: `[H]`.
            gate: Gate matrix `[M, H]`.
            up: Up matrix `[M, H]`.
            down: Down matrix `[H, M]`.
            eps: Of the norm.
            norm_offset: Added to the norm's weights.
            limit: Clamp limit; infinite: none.
            ctx: The device.
        """
        comptime op = "step3p5_mlp_block"
        comptime assert target == "cpu", "step3p5_mlp_block runs on a CPU"
        var tokens = h.dim_size(0)
        var hidden_size = h.dim_size(1)
        var width = gate.dim_size(0)
        expect_size(op, "norm_weight[H]", norm_weight.dim_size(0), hidden_size)
        expect_size(op, "gate[M, H] dim H", gate.dim_size(1), hidden_size)
        expect_size(op, "up[M, H] dim M", up.dim_size(0), width)
        expect_size(op, "up[M, H] dim H", up.dim_size(1), hidden_size)
        expect_size(op, "down[H, M] dim H", down.dim_size(0), hidden_size)
        expect_size(op, "down[H, M] dim M", down.dim_size(1), width)
        expect_size(op, "y[T, H] dim T", y.dim_size(0), tokens)
        expect_size(op, "y[T, H] dim H", y.dim_size(1), hidden_size)
        if tokens == 0:
            return

        var x = Scratch[DType.float32](tokens * hidden_size)
        var act = Scratch[DType.float32](tokens * width)
        var every = EveryToken(tokens)

        var residual = elements(h.unsafe_ptr())
        var normed = x.data
        var norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )
        var gate_up = GateUp[dtype](
            act.data,
            x.data,
            elements(gate.unsafe_ptr()),
            elements(up.unsafe_ptr()),
            every.rows.data,
            1,
            hidden_size,
            width,
            limit,
        )
        var product = Linear[dtype, adds=True](
            elements(y.unsafe_ptr()),
            residual,
            act.data,
            elements(down.unsafe_ptr()),
            width,
            hidden_size,
        )
        var offsets = every.offsets.data

        def work(mut team: Team) {imm}:
            norm_phase(team, norm, normed, residual, tokens)
            gate_up_phase(team, gate_up, offsets, 1)
            linear_phase(team, product, tokens)

        on_team(work)
        x.keep()
        act.keep()
        every.keep()
