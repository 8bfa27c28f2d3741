"""The gated half of a dense MLP or a shared expert: the routed experts' kernel with one expert that has every token."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.utils.numerics import inf

from .crossover import swiglu_gpu
from .gate_up import GateUp, gate_up_cpu
from .operands import Floats, Scratch, elements, expect_size


struct EveryToken(Movable):
    """The assignment of every token to one expert, as `step3p5_moe_group` gives it.
    """

    var rows: Scratch[DType.int32]
    var offsets: Scratch[DType.int32]

    def __init__(out self, tokens: Int):
        self.rows = Scratch[DType.int32](tokens)
        for t in range(tokens):
            self.rows.data[unsafe_offset=t] = Int32(t)
        self.offsets = Scratch[DType.int32](2)
        self.offsets.data[unsafe_offset=0] = 0
        self.offsets.data[unsafe_offset=1] = Int32(tokens)

    def keep(self):
        """Keeps the memory to here: kernels hold only where it lies."""
        pass


@extensibility.register("step3p5_swiglu")
struct Step3p5Swiglu:
    """`act = silu(gate x) * (up x)`."""

    @staticmethod
    def execute[
        act_dtype: DType, x_dtype: DType, dtype: DType, //, target: StaticString
    ](
        act: OutputTensor[dtype=act_dtype, rank=2, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        gate: InputTensor[dtype=dtype, rank=2, ...],
        up: InputTensor[dtype=dtype, rank=2, ...],
        limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Multiplies tokens with a gate and an up matrix.

        Parameters:
            act_dtype: Type of the result; float32 on a CPU.
            x_dtype: Type of the tokens; float32 on a CPU.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device.

        Args:
            act: Result `[T, M]`.
            x: Tokens `[T, H]`.
            gate: Gate matrix `[M, H]`.
            up: Up matrix `[M, H]`.
            limit: `L > 0`: `min(silu(gate x), L) * clamp(up x, -L, L)`; 0 or infinite: no limit.
            ctx: The device.
        """
        comptime op = "step3p5_swiglu"
        var tokens = x.dim_size(0)
        expect_size(op, "gate[M, H] dim H", gate.dim_size(1), x.dim_size(1))
        expect_size(op, "up[M, H] dim M", up.dim_size(0), gate.dim_size(0))
        expect_size(op, "up[M, H] dim H", up.dim_size(1), x.dim_size(1))
        expect_size(op, "act[T, M] dim T", act.dim_size(0), tokens)
        expect_size(op, "act[T, M] dim M", act.dim_size(1), gate.dim_size(0))
        if tokens == 0 or gate.dim_size(0) == 0:
            return
        var bound = limit if limit > 0 else inf[DType.float32]()
        comptime if target == "cpu":
            comptime assert (
                x_dtype == DType.float32 and act_dtype == DType.float32
            ), "step3p5_swiglu: tokens are float32 on a CPU"
            var every = EveryToken(tokens)
            gate_up_cpu(
                GateUp[dtype](
                    rebind[Floats](elements(act.unsafe_ptr())),
                    rebind[Floats](elements(x.unsafe_ptr())),
                    elements(gate.unsafe_ptr()),
                    elements(up.unsafe_ptr()),
                    every.rows.data,
                    1,
                    x.dim_size(1),
                    gate.dim_size(0),
                    bound,
                ),
                every.offsets.data,
                1,
            )
            every.keep()
        else:
            swiglu_gpu(
                elements(act.unsafe_ptr()),
                elements(x.unsafe_ptr()),
                elements(gate.unsafe_ptr()),
                elements(up.unsafe_ptr()),
                tokens,
                x.dim_size(1),
                gate.dim_size(0),
                bound,
                ctx,
            )
