"""The second half of a mixture-of-experts decoder layer as one op on a CPU: norm, router, experts, shared expert, residual.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .down import Down
from .gate_up import GateUp, GateUpPieces, gate_up_phase
from .grouped import Panel
from .group import group_cpu
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Elements, Floats, Scratch, elements, expect_size
from .route import Router
from .swiglu import EveryToken
from .tasks import share
from .team import Team, on_team


@extensibility.register("step3p5_moe_block")
struct Step3p5MoeBlock:
    """`y = h + sum_k w_k expert_k(x) + shared(x)`, `x = norm(h)`."""

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString, top_k: Int, normalize: Bool
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        h: InputTensor[dtype=DType.float32, rank=2, ...],
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        router: InputTensor[dtype=DType.float32, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=dtype, rank=3, ...],
        up: InputTensor[dtype=dtype, rank=3, ...],
        down: InputTensor[dtype=dtype, rank=3, ...],
        shared_gate: InputTensor[dtype=dtype, rank=2, ...],
        shared_up: InputTensor[dtype=dtype, rank=2, ...],
        shared_down: InputTensor[dtype=dtype, rank=2, ...],
        eps: Float32,
        norm_offset: Float32,
        scale: Float32,
        limit: Float32,
        shared_limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Runs the layer's half on a CPU; a GPU has an op for each step.

        Parameters:
            dtype: Type of the experts' weights.
            target: Kind of device.
            top_k: Experts of a token.
            normalize: Divides a token's weights by their sum + 1e-20.

        Args:
            y: Result `[T, H]`.
            h: Hidden states `[T, H]`.
            norm_weight: `[H]`.
            router: Router matrix `[E, H]`.
            bias: Added to the score for the choice only `[E]`.
            gate: Gate matrices `[E, M, H]`.
            up: Up matrices `[E, M, H]`.
            down: Down matrices `[E, H, M]`.
            shared_gate: Gate matrix of the shared expert `[S, H]`.
            shared_up: Its up matrix `[S, H]`.
            shared_down: Its down matrix `[H, S]`.
            eps: Of the norm.
            norm_offset: Added to the norm's weights.
            scale: Multiplies the experts' weights last.
            limit: Clamp limit of the experts; infinite: none.
            shared_limit: Clamp limit of the shared expert; infinite: none.
            ctx: The device.
        """
        comptime op = "step3p5_moe_block"
        comptime assert target == "cpu", "step3p5_moe_block runs on a CPU"
        var tokens = h.dim_size(0)
        var hidden_size = h.dim_size(1)
        var experts = router.dim_size(0)
        var width = gate.dim_size(1)
        var shared_width = shared_gate.dim_size(0)
        expect_size(op, "norm_weight[H]", norm_weight.dim_size(0), hidden_size)
        expect_size(op, "router[E, H] dim H", router.dim_size(1), hidden_size)
        expect_size(op, "bias[E]", bias.dim_size(0), experts)
        expect_size(op, "gate[E, M, H] dim E", gate.dim_size(0), experts)
        expect_size(op, "gate[E, M, H] dim H", gate.dim_size(2), hidden_size)
        expect_size(op, "up[E, M, H] dim E", up.dim_size(0), experts)
        expect_size(op, "up[E, M, H] dim M", up.dim_size(1), width)
        expect_size(op, "up[E, M, H] dim H", up.dim_size(2), hidden_size)
        expect_size(op, "down[E, H, M] dim E", down.dim_size(0), experts)
        expect_size(op, "down[E, H, M] dim H", down.dim_size(1), hidden_size)
        expect_size(op, "down[E, H, M] dim M", down.dim_size(2), width)
        expect_size(
            op, "shared_gate[S, H] dim H", shared_gate.dim_size(1), hidden_size
        )
        expect_size(
            op, "shared_up[S, H] dim S", shared_up.dim_size(0), shared_width
        )
        expect_size(
            op, "shared_up[S, H] dim H", shared_up.dim_size(1), hidden_size
        )
        expect_size(
            op, "shared_down[H, S] dim H", shared_down.dim_size(0), hidden_size
        )
        expect_size(
            op, "shared_down[H, S] dim S", shared_down.dim_size(1), shared_width
        )
        expect_size(op, "y[T, H] dim T", y.dim_size(0), tokens)
        expect_size(op, "y[T, H] dim H", y.dim_size(1), hidden_size)
        if top_k > experts:
            raise Error(
                op,
                ": top_k is ",
                top_k,
                ", expected at most the ",
                experts,
                " experts",
            )
        if tokens == 0:
            return

        var assignments = tokens * top_k
        var x = Scratch[DType.float32](tokens * hidden_size)
        var logits = Scratch[DType.float32](tokens * experts)
        var ids = Scratch[DType.int32](assignments)
        var weights = Scratch[DType.float32](assignments)
        var rows = Scratch[DType.int32](assignments)
        var offsets = Scratch[DType.int32](experts + 1)
        var act = Scratch[DType.float32](assignments * width)
        var shared_act = Scratch[DType.float32](tokens * shared_width)
        var every = EveryToken(tokens)

        var residual = elements(h.unsafe_ptr())
        var result = elements(y.unsafe_ptr())
        var norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )
        var normed = x.data
        var score = Linear[DType.float32](
            logits.data,
            logits.data,
            x.data,
            elements(router.unsafe_ptr()),
            hidden_size,
            experts,
        )
        var routing = Router[normalize](
            ids.data,
            weights.data,
            logits.data,
            elements(bias.unsafe_ptr()),
            tokens,
            experts,
            top_k,
            scale,
        )
        var shared_gate_up = GateUpPieces(
            GateUp[dtype](
                shared_act.data,
                x.data,
                elements(shared_gate.unsafe_ptr()),
                elements(shared_up.unsafe_ptr()),
                every.rows.data,
                1,
                hidden_size,
                shared_width,
                shared_limit,
            ),
            every.offsets.data,
            1,
        )
        var gate_up = GateUp[dtype](
            act.data,
            x.data,
            elements(gate.unsafe_ptr()),
            elements(up.unsafe_ptr()),
            rows.data,
            top_k,
            hidden_size,
            width,
            limit,
        )
        var shared_product = Linear[dtype, adds=True](
            result,
            residual,
            shared_act.data,
            elements(shared_down.unsafe_ptr()),
            shared_width,
            hidden_size,
        )
        var product = Down[dtype](
            result,
            act.data,
            elements(down.unsafe_ptr()),
            rows.data,
            weights.data,
            top_k,
            hidden_size,
            width,
        )
        var grouped = offsets.data
        var assigned = rows.data
        var chosen = ids.data

        def work(mut team: Team) {imm}:
            norm_phase(team, norm, normed, residual, tokens)
            linear_phase(team, score, tokens)

            var panel = Panel(max(hidden_size, width, shared_width))
            var routers = routing.pieces()

            def route_or_share(index: Int) {imm}:
                if index < routers:
                    routing.run_piece(index, routers)
                else:
                    shared_gate_up.run(panel, index - routers)

            team.each(routers + shared_gate_up.count, route_or_share)

            def group(_index: Int) {imm}:
                group_cpu(assigned, grouped, chosen, assignments, experts)

            team.each(1, group)
            gate_up_phase(team, gate_up, grouped, experts)

            var pieces = product.pieces(grouped, experts)

            def down_piece(index: Int) {imm}:
                shared_product.run_piece(panel, tokens, index, pieces)
                var tiles = share(product.tiles(), index, pieces)
                product.add_experts(panel, grouped, experts, tiles)

            team.each(pieces, down_piece)

        on_team(work)
        x.keep()
        logits.keep()
        ids.keep()
        weights.keep()
        rows.keep()
        offsets.keep()
        act.keep()
        shared_act.keep()
        every.keep()
