"""Chooses every token's experts from the token itself: a router's product and `step3p5_moe_assign` in one op."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .crossover import router_gpu
from .operands import elements, expect_size


@extensibility.register("step3p5_moe_router")
struct Step3p5MoeRouter:
    """The results of routing and of grouping, for GPUs."""

    @staticmethod
    def execute[
        x_dtype: DType,
        dtype: DType,
        //,
        target: StaticString,
        normalize: Bool,
    ](
        ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        rows: OutputTensor[dtype=DType.int32, rank=1, ...],
        offsets: OutputTensor[dtype=DType.int32, rank=1, ...],
        x: InputTensor[dtype=x_dtype, rank=2, ...],
        w: InputTensor[dtype=dtype, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        scale: Float32,
        ctx: DeviceContext,
    ) raises:
        """Computes every token's logits `w x`, routes it and groups the assignments.

        Parameters:
            x_dtype: Type of the tokens.
            dtype: Type of the router; products are accumulated in float32.
            target: Kind of device, a GPU's.
            normalize: Divides a token's weights by their sum + 1e-20.

        Args:
            ids: Experts of every token `[T, K]` in descending order of their score, equal ones in ascending order.
            weights: Their weights `[T, K]`.
            rows: Assignments `t * K + k` grouped by expert, ascending within each `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            x: Tokens `[T, H]`.
            w: The router `[E, H]`.
            bias: Added to the score for the choice only `[E]`.
            scale: Multiplies the weights last.
            ctx: The device.
        """
        comptime op = "step3p5_moe_router"
        comptime assert target != "cpu", (
            "step3p5_moe_router: GPUs only; on a CPU step3p5_linear and"
            " step3p5_moe_assign"
        )
        var tokens = x.dim_size(0)
        var experts = w.dim_size(0)
        var top_k = ids.dim_size(1)
        expect_size(op, "w[E, H] dim H", w.dim_size(1), x.dim_size(1))
        expect_size(op, "bias[E]", bias.dim_size(0), experts)
        expect_size(op, "ids[T, K] dim T", ids.dim_size(0), tokens)
        expect_size(op, "weights[T, K] dim T", weights.dim_size(0), tokens)
        expect_size(op, "weights[T, K] dim K", weights.dim_size(1), top_k)
        expect_size(op, "rows[T*K]", rows.dim_size(0), tokens * top_k)
        expect_size(op, "offsets[E + 1]", offsets.dim_size(0), experts + 1)
        if top_k > experts:
            raise Error(
                op,
                ": top_k is ",
                top_k,
                ", expected at most the ",
                experts,
                " experts",
            )
        router_gpu[normalize](
            elements(ids.unsafe_ptr()),
            elements(weights.unsafe_ptr()),
            elements(rows.unsafe_ptr()),
            elements(offsets.unsafe_ptr()),
            elements(x.unsafe_ptr()),
            elements(w.unsafe_ptr()),
            elements(bias.unsafe_ptr()),
            tokens,
            x.dim_size(1),
            experts,
            top_k,
            scale,
            ctx,
        )
