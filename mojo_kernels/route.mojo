"""Chooses every token's experts and their weights."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .operands import Floats, Ids, elements, expect_size
from .route_gpu import route_gpu
from .score import order_key, sigmoid
from .tasks import piece_count, share
from .team import Team, on_team


@fieldwise_init
struct Router[normalize: Bool](ImplicitlyCopyable):
    """Operands of `step3p5_moe_route`."""

    var ids: Ids
    var weights: Floats
    var logits: Floats
    var bias: Floats
    var tokens: Int
    var experts: Int
    var top_k: Int
    var scale: Float32

    def pieces(self) -> Int:
        """Number of pieces."""
        # A score costs about as much as reading 16 numbers.
        var bytes = self.tokens * self.experts * 64
        return piece_count(self.tokens, bytes, 0)

    def run_piece(self, piece: Int, pieces: Int):
        """Routes a share of the tokens."""
        var scores = List[Float32](length=self.experts, fill=0)
        var keys = List[Int32](length=self.experts, fill=0)
        var first, last = share(self.tokens, piece, pieces)
        for t in range(first, last):
            var logits = self.logits.unsafe_offset(t * self.experts)
            for e in range(self.experts):
                scores[e] = sigmoid(logits[unsafe_offset=e])
                keys[e] = order_key(scores[e] + self.bias[unsafe_offset=e])
            var chosen = self.weights.unsafe_offset(t * self.top_k)
            var ids = self.ids.unsafe_offset(t * self.top_k)
            var total = Float32(0)
            for k in range(self.top_k):
                var best = 0
                for e in range(1, self.experts):
                    if keys[e] > keys[best]:
                        best = e
                keys[best] = Int32.MIN
                ids[unsafe_offset=k] = Int32(best)
                chosen[unsafe_offset=k] = scores[best]
                total += scores[best]
            comptime if Self.normalize:
                for k in range(self.top_k):
                    chosen[unsafe_offset=k] /= total + 1e-20
            for k in range(self.top_k):
                chosen[unsafe_offset=k] *= self.scale


def route_cpu[
    normalize: Bool
](
    ids: Ids,
    weights: Floats,
    logits: Floats,
    bias: Floats,
    tokens: Int,
    experts: Int,
    top_k: Int,
    scale: Float32,
):
    """Routes all tokens on a team of its own."""
    var router = Router[normalize](
        ids, weights, logits, bias, tokens, experts, top_k, scale
    )
    var pieces = router.pieces()

    def piece(index: Int) {imm}:
        router.run_piece(index, pieces)

    def work(mut team: Team) {imm}:
        team.each(pieces, piece)

    on_team(work)


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
        else:
            route_gpu[normalize](
                elements(ids.unsafe_ptr()),
                elements(weights.unsafe_ptr()),
                elements(logits.unsafe_ptr()),
                elements(bias.unsafe_ptr()),
                tokens,
                experts,
                top_k,
                scale,
                ctx,
            )
