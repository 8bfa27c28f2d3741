"""The gate of every head of attention's output."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .head_gate_gpu import gate_factor, head_gate_gpu
from .operands import elements, expect_size


@extensibility.register("step3p5_head_gate")
struct Step3p5HeadGate:
    """`y[t, h, :] = x[t, h, :] * sigmoid(gate[t, h])`."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=dtype, rank=2, ...],
        x: InputTensor[dtype=dtype, rank=3, ...],
        gate: InputTensor[dtype=dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Multiplies in float32.

        Parameters:
            dtype: Type of all.
            target: Kind of device.

        Args:
            y: Result `[T, N * head_dim]`.
            x: Heads `[T, N, head_dim]`.
            gate: Logits `[T, N]`.
            ctx: The device.
        """
        comptime op = "step3p5_head_gate"
        var heads = x.dim_size(0) * x.dim_size(1)
        var head_dim = x.dim_size(2)
        expect_size(op, "gate[T, N] dim T", gate.dim_size(0), x.dim_size(0))
        expect_size(op, "gate[T, N] dim N", gate.dim_size(1), x.dim_size(1))
        expect_size(op, "y[T, N * head_dim]", y.size(), heads * head_dim)
        var results = elements(y.unsafe_ptr())
        var values = elements(x.unsafe_ptr())
        var gates = elements(gate.unsafe_ptr())
        comptime if target == "cpu":
            for head in range(heads):
                var factor = gate_factor(
                    gates[unsafe_offset=head].cast[DType.float32]()
                )
                for i in range(head * head_dim, (head + 1) * head_dim):
                    results[unsafe_offset=i] = (
                        values[unsafe_offset=i].cast[DType.float32]() * factor
                    ).cast[dtype]()
        else:
            head_gate_gpu(results, values, gates, heads, head_dim, ctx)
