"""The experts of a GPU with the shared expert among them: what it reads is read while the routed ones are still chosen.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext
from std.utils.numerics import inf

from .crossover import down_gpu, gate_up_gpu
from .operands import elements, expect_size


@extensibility.register("step3p5_moe_gate_up_shared")
struct Step3p5MoeGateUpShared:
    """`step3p5_moe_gate_up`, and `step3p5_swiglu` of the same tokens."""

    @staticmethod
    def execute[
        act_dtype: DType, x_dtype: DType, dtype: DType, //, target: StaticString
    ](
        act: OutputTensor[dtype=act_dtype, rank=2, ...],
        shared_act: OutputTensor[dtype=act_dtype, rank=2, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        gate: InputTensor[dtype=dtype, rank=3, ...],
        up: InputTensor[dtype=dtype, rank=3, ...],
        shared_gate: InputTensor[dtype=dtype, rank=2, ...],
        shared_up: InputTensor[dtype=dtype, rank=2, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        offsets: InputTensor[dtype=DType.int32, rank=1, ...],
        limit: Float32,
        shared_limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Multiplies the tokens with the gate and up matrices of their experts and of the shared one.

        Parameters:
            act_dtype: Type of the results.
            x_dtype: Type of the tokens.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device, a GPU's.

        Args:
            act: Result `[T * K, M]`, in the order of `rows`.
            shared_act: Result of the shared expert `[T, S]`.
            x: Tokens `[T, H]`; `offsets` and `rows` follow from them.
            gate: Gate matrices `[E, M, H]`.
            up: Up matrices `[E, M, H]`.
            shared_gate: Gate matrix `[S, H]`.
            shared_up: Up matrix `[S, H]`.
            rows: Assignments `t * K + k` grouped by expert `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            limit: See `step3p5_moe_gate_up`.
            shared_limit: The shared expert's.
            ctx: The device.
        """
        comptime op = "step3p5_moe_gate_up_shared"
        comptime assert target != "cpu", "step3p5_moe_gate_up_shared: GPUs only"
        var tokens = x.dim_size(0)
        var hidden_size = x.dim_size(1)
        expect_size(op, "gate[E, M, H] dim H", gate.dim_size(2), hidden_size)
        expect_size(op, "up[E, M, H] dim E", up.dim_size(0), gate.dim_size(0))
        expect_size(op, "up[E, M, H] dim M", up.dim_size(1), gate.dim_size(1))
        expect_size(op, "up[E, M, H] dim H", up.dim_size(2), hidden_size)
        expect_size(op, "act[T*K, M] dim M", act.dim_size(1), gate.dim_size(1))
        expect_size(
            op, "act[T*K, M] dim T*K", act.dim_size(0), rows.dim_size(0)
        )
        expect_size(
            op, "offsets[E+1]", offsets.dim_size(0), gate.dim_size(0) + 1
        )
        expect_size(
            op, "shared_gate[S, H] dim H", shared_gate.dim_size(1), hidden_size
        )
        expect_size(
            op, "shared_up[S, H] dim H", shared_up.dim_size(1), hidden_size
        )
        expect_size(
            op,
            "shared_up[S, H] dim S",
            shared_up.dim_size(0),
            shared_gate.dim_size(0),
        )
        expect_size(
            op, "shared_act[T, S] dim T", shared_act.dim_size(0), tokens
        )
        expect_size(
            op,
            "shared_act[T, S] dim S",
            shared_act.dim_size(1),
            shared_gate.dim_size(0),
        )
        if tokens == 0:
            return
        var top_k = rows.dim_size(0) // tokens
        expect_size(op, "rows[T*K]", rows.dim_size(0), tokens * top_k)
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
            hidden_size,
            gate.dim_size(1),
            limit if limit > 0 else inf[DType.float32](),
            elements(shared_act.unsafe_ptr()),
            elements(shared_gate.unsafe_ptr()),
            elements(shared_up.unsafe_ptr()),
            shared_gate.dim_size(0),
            shared_limit if shared_limit > 0 else inf[DType.float32](),
            ctx,
        )


@extensibility.register("step3p5_moe_down_shared")
struct Step3p5MoeDownShared:
    """`step3p5_moe_down` upon the shared expert's down product."""

    @staticmethod
    def execute[
        y_dtype: DType, act_dtype: DType, dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=y_dtype, rank=2, ...],
        act: InputTensor[dtype=act_dtype, rank=2, ...],
        down: InputTensor[dtype=dtype, rank=3, ...],
        shared_act: InputTensor[dtype=act_dtype, rank=2, ...],
        shared_down: InputTensor[dtype=dtype, rank=2, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        offsets: InputTensor[dtype=DType.int32, rank=1, ...],
        weights: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Multiplies every assignment, and every token once more, with a down matrix and sums over a token's experts.

        Parameters:
            y_dtype: Type of the result.
            act_dtype: Type of the activations.
            dtype: Type of the weights; products are accumulated in float32.
            target: Kind of device, a GPU's.

        Args:
            y: Result `[T, H]`.
            act: Activations `[T * K, M]`, in the order of `rows`.
            down: Down matrices `[E, H, M]`.
            shared_act: The shared expert's activations `[T, S]`.
            shared_down: Its down matrix `[H, S]`.
            rows: Assignments `t * K + k` grouped by expert `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            weights: Weight of every assignment `[T, K]`; the shared expert's is 1.
            ctx: The device.
        """
        comptime op = "step3p5_moe_down_shared"
        comptime assert target != "cpu", "step3p5_moe_down_shared: GPUs only"
        var tokens = y.dim_size(0)
        var hidden_size = y.dim_size(1)
        expect_size(op, "down[E, H, M] dim H", down.dim_size(1), hidden_size)
        expect_size(
            op, "down[E, H, M] dim M", down.dim_size(2), act.dim_size(1)
        )
        expect_size(op, "weights[T, K] dim T", weights.dim_size(0), tokens)
        expect_size(
            op, "rows[T*K]", rows.dim_size(0), tokens * weights.dim_size(1)
        )
        expect_size(
            op, "act[T*K, M] dim T*K", act.dim_size(0), rows.dim_size(0)
        )
        expect_size(
            op, "offsets[E+1]", offsets.dim_size(0), down.dim_size(0) + 1
        )
        expect_size(
            op, "shared_act[T, S] dim T", shared_act.dim_size(0), tokens
        )
        expect_size(
            op, "shared_down[H, S] dim H", shared_down.dim_size(0), hidden_size
        )
        expect_size(
            op,
            "shared_down[H, S] dim S",
            shared_down.dim_size(1),
            shared_act.dim_size(1),
        )
        if tokens == 0 or hidden_size == 0:
            return
        down_gpu(
            elements(y.unsafe_ptr()),
            elements(act.unsafe_ptr()),
            elements(down.unsafe_ptr()),
            elements(rows.unsafe_ptr()),
            elements(offsets.unsafe_ptr()),
            elements(weights.unsafe_ptr()),
            tokens,
            weights.dim_size(1),
            down.dim_size(0),
            hidden_size,
            act.dim_size(1),
            elements(shared_act.unsafe_ptr()),
            elements(shared_down.unsafe_ptr()),
            shared_act.dim_size(1),
            ctx,
        )
