"""Chooses every token's experts and groups the choices by expert: `step3p5_moe_route` and `step3p5_moe_group` in one op.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .assign_gpu import assign_gpu
from .group import group_cpu
from .operands import elements, expect_size
from .route import route_cpu


@extensibility.register("step3p5_moe_assign")
struct Step3p5MoeAssign:
    """The results of routing and of grouping."""

    @staticmethod
    def execute[
        target: StaticString, normalize: Bool
    ](
        ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        rows: OutputTensor[dtype=DType.int32, rank=1, ...],
        offsets: OutputTensor[dtype=DType.int32, rank=1, ...],
        logits: InputTensor[dtype=DType.float32, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        scale: Float32,
        ctx: DeviceContext,
    ) raises:
        """Routes every token and groups the assignments.

        Parameters:
            target: Kind of device.
            normalize: Divides a token's weights by their sum + 1e-20.

        Args:
            ids: Experts of every token `[T, K]` in descending order of their score, equal ones in ascending order.
            weights: Their weights `[T, K]`.
            rows: Assignments `t * K + k` grouped by expert, ascending within each `[T * K]`.
            offsets: First assignment of every expert in `rows`, and the end `[E + 1]`.
            logits: Router logits `[T, E]`.
            bias: Added to the score for the choice only `[E]`.
            scale: Multiplies the weights last.
            ctx: The device.
        """
        comptime op = "step3p5_moe_assign"
        var tokens = logits.dim_size(0)
        var experts = logits.dim_size(1)
        var top_k = ids.dim_size(1)
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
        comptime if target == "cpu":
            route_cpu[normalize](
                elements(ids.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                elements(logits.unsafe_ptr()),
                elements(bias.unsafe_ptr()),
                tokens,
                experts,
                top_k,
                scale,
            )
            group_cpu(
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                elements(ids.unsafe_ptr()),
                tokens * top_k,
                experts,
            )
        else:
            assign_gpu[normalize](
                elements(ids.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                elements(rows.unsafe_ptr()),
                elements(offsets.unsafe_ptr()),
                elements(logits.unsafe_ptr()),
                elements(bias.unsafe_ptr()),
                tokens,
                experts,
                top_k,
                scale,
                ctx,
            )
