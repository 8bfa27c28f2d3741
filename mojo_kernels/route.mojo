"""Chooses every token's experts and their weights."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from std.math import exp
from std.memory import bitcast
from std.utils.numerics import isnan

from .operands import expect_size
from .tasks import share, task_count


@always_inline
def sigmoid(x: Float32) -> Float32:
    """`1 / (1 + exp(-x))`, computed in float64 so that the result is correctly rounded but for rare ties.
    """
    if isnan(x):  # `exp` takes NaN to a number.
        return x
    return (1 / (1 + exp(-x.cast[DType.float64]()))).cast[DType.float32]()


@always_inline
def order_key(score: Float32) -> Int32:
    """An integer that orders as the score does; NaN is above all, so that a broken token stays visible.
    """
    if isnan(score):
        return Int32.MAX
    var bits = bitcast[DType.int32](score)
    return bits if bits >= 0 else bits ^ Int32.MAX


@extensibility.register("step3p5_moe_route")
struct Step3p5MoeRoute:
    """The `K` experts with the largest `sigmoid(logits) + bias`, weighted by `sigmoid(logits)`.
    """

    @staticmethod
    def execute[
        target: StaticString, normalize: Bool
    ](
        ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        weights: OutputTensor[dtype=DType.float32, rank=2, ...],
        logits: InputTensor[dtype=DType.float32, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        scale: Float32,
        ctx: DeviceContext,
    ) raises:
        """Routes every token.

        Parameters:
            target: Kind of device.
            normalize: Divides a token's weights by their sum + 1e-20.

        Args:
            ids: Experts of every token `[T, K]` in descending order of their score, equal ones in ascending order.
            weights: Their weights `[T, K]`.
            logits: Router logits `[T, E]`.
            bias: Added to the score for the choice only `[E]`.
            scale: Multiplies the weights last.
            ctx: The device.
        """
        comptime op = "step3p5_moe_route"
        var tokens = logits.dim_size(0)
        var experts = logits.dim_size(1)
        var top_k = ids.dim_size(1)
        expect_size(op, "bias[E]", bias.dim_size(0), experts)
        expect_size(op, "ids[T, K] dim T", ids.dim_size(0), tokens)
        expect_size(op, "weights[T, K] dim T", weights.dim_size(0), tokens)
        expect_size(op, "weights[T, K] dim K", weights.dim_size(1), top_k)
        if top_k > experts:
            raise Error(
                op,
                ": top_k is ",
                top_k,
                ", expected at most the ",
                experts,
                " experts",
            )
        comptime assert target == "cpu", "step3p5_moe_route: CPU only"
        # A score costs about as much as reading 16 numbers.
        var tasks = task_count(tokens, tokens * experts * 64, 1)

        def task(index: Int) {imm}:
            var scores = List[Float32](length=experts, fill=0)
            var keys = List[Int32](length=experts, fill=0)
            var first, last = share(tokens, index, tasks)
            for t in range(first, last):
                for e in range(experts):
                    scores[e] = sigmoid(
                        logits.unsafe_ptr()[unsafe_offset=t * experts + e]
                    )
                    keys[e] = order_key(
                        scores[e] + bias.unsafe_ptr()[unsafe_offset=e]
                    )
                var chosen = weights.unsafe_ptr().unsafe_offset(t * top_k)
                var total = Float32(0)
                for k in range(top_k):
                    var best = 0
                    for e in range(1, experts):
                        if keys[e] > keys[best]:
                            best = e
                    keys[best] = Int32.MIN
                    ids.unsafe_ptr()[unsafe_offset=t * top_k + k] = Int32(best)
                    chosen[unsafe_offset=k] = scores[best]
                    total += scores[best]
                comptime if normalize:
                    for k in range(top_k):
                        chosen[unsafe_offset=k] /= total + 1e-20
                for k in range(top_k):
                    chosen[unsafe_offset=k] *= scale

        sync_parallelize(task, tasks)
