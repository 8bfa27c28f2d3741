"""The second half of a mixture-of-experts decoder layer on a CPU: norm, router, experts, shared expert, residual."""

from extensibility import InputTensor, OutputTensor

from .down import Down, ExpertSums
from .expert_pieces import ExpertPieces
from .gate_up import GateUp
from .group import group_cpu
from .grouped import Panel
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Floats, Scratch, elements, expect_size
from .route import Router
from .swiglu import EveryToken
from .team import Team


struct MoeHalf[dtype: DType, top_k: Int, normalize: Bool](Movable):
    """`y = h + sum_k w_k expert_k(x) + shared(x)`, `x = norm(h)`.

    Parameters:
        dtype: Type of the experts' weights.
        top_k: Experts of a token.
        normalize: Divides a token's weights by their sum + 1e-20.
    """

    var tokens: Int
    var experts: Int
    var residual: Floats
    var x: Scratch[DType.float32]
    var logits: Scratch[DType.float32]
    var ids: Scratch[DType.int32]
    var weights: Scratch[DType.float32]
    var rows: Scratch[DType.int32]
    var offsets: Scratch[DType.int32]
    var act: Scratch[DType.float32]
    var shared_act: Scratch[DType.float32]
    var products: Scratch[DType.float32]
    var every: EveryToken
    var norm: Norm
    var score: Linear[DType.float32]
    var routing: Router[Self.normalize]
    var gate_up: GateUp[Self.dtype]
    var sums: ExpertSums[Self.dtype]
    var shared_gate_up: ExpertPieces[GateUp[Self.dtype]]
    var shared_product: Linear[Self.dtype, adds=True]

    def __init__(
        out self,
        op: StaticString,
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        h: Floats,
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        router: InputTensor[dtype=DType.float32, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=Self.dtype, rank=3, ...],
        up: InputTensor[dtype=Self.dtype, rank=3, ...],
        down: InputTensor[dtype=Self.dtype, rank=3, ...],
        shared_gate: InputTensor[dtype=Self.dtype, rank=2, ...],
        shared_up: InputTensor[dtype=Self.dtype, rank=2, ...],
        shared_down: InputTensor[dtype=Self.dtype, rank=2, ...],
        eps: Float32,
        norm_offset: Float32,
        scale: Float32,
        limit: Float32,
        shared_limit: Float32,
    ) raises:
        """Takes the operands and room for what lies between them.

        Args:
            op: Name of the op, for errors.
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
        """
        var tokens = y.dim_size(0)
        var hidden_size = y.dim_size(1)
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
        if Self.top_k > experts:
            raise Error(
                op,
                ": top_k is ",
                Self.top_k,
                ", expected at most the ",
                experts,
                " experts",
            )

        var assignments = tokens * Self.top_k
        self.tokens = tokens
        self.experts = experts
        self.residual = h
        self.x = Scratch[DType.float32](tokens * hidden_size)
        self.logits = Scratch[DType.float32](tokens * experts)
        self.ids = Scratch[DType.int32](assignments)
        self.weights = Scratch[DType.float32](assignments)
        self.rows = Scratch[DType.int32](assignments)
        self.offsets = Scratch[DType.int32](experts + 1)
        self.act = Scratch[DType.float32](assignments * width)
        self.shared_act = Scratch[DType.float32](tokens * shared_width)
        self.products = Scratch[DType.float32](
            ExpertSums[Self.dtype].kept_rows(assignments) * hidden_size
        )
        self.every = EveryToken(tokens)
        self.norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )
        self.score = Linear[DType.float32](
            self.logits.data,
            self.logits.data,
            self.x.data,
            elements(router.unsafe_ptr()),
            hidden_size,
            experts,
        )
        self.routing = Router[Self.normalize](
            self.ids.data,
            self.weights.data,
            self.logits.data,
            elements(bias.unsafe_ptr()),
            tokens,
            experts,
            Self.top_k,
            scale,
        )
        self.gate_up = GateUp[Self.dtype](
            self.act.data,
            self.x.data,
            elements(gate.unsafe_ptr()),
            elements(up.unsafe_ptr()),
            self.rows.data,
            Self.top_k,
            hidden_size,
            width,
            limit,
        )
        self.sums = ExpertSums(
            Down[Self.dtype, adds=True](
                elements(y.unsafe_ptr()),
                self.act.data,
                elements(down.unsafe_ptr()),
                self.rows.data,
                self.weights.data,
                Self.top_k,
                hidden_size,
                width,
            ),
            self.products.data,
            assignments,
            experts,
        )
        self.shared_gate_up = ExpertPieces(
            GateUp[Self.dtype](
                self.shared_act.data,
                self.x.data,
                elements(shared_gate.unsafe_ptr()),
                elements(shared_up.unsafe_ptr()),
                self.every.rows.data,
                1,
                hidden_size,
                shared_width,
                shared_limit,
            ),
            self.every.offsets.data,
            1,
        )
        self.shared_product = Linear[Self.dtype, adds=True](
            elements(y.unsafe_ptr()),
            h,
            self.shared_act.data,
            elements(shared_down.unsafe_ptr()),
            shared_width,
            hidden_size,
        )

    @always_inline
    def phases(self, mut team: Team):
        """Computes the half, in at most seven phases."""
        var tokens = self.tokens
        var experts = self.experts
        var offsets = self.offsets.data
        norm_phase(team, self.norm, self.x.data, self.residual, tokens)
        linear_phase(team, self.score, tokens)

        var panel = Panel(
            max(
                self.norm.width,
                self.gate_up.intermediate_size,
                self.shared_product.in_features,
            )
        )
        var routers = self.routing.pieces()

        def route_or_share(index: Int) {imm}:
            if index < routers:
                self.routing.run_piece(index, routers)
            else:
                self.shared_gate_up.run(panel, index - routers)

        team.each(routers + self.shared_gate_up.count, route_or_share)

        def group(_index: Int) {imm}:
            group_cpu(
                self.rows.data,
                offsets,
                self.ids.data,
                tokens * Self.top_k,
                experts,
            )

        team.each(1, group)

        var gate_up = ExpertPieces(self.gate_up, offsets, experts)
        var shared_pieces = self.shared_product.pieces(tokens)

        def share_or_expert(index: Int) {imm}:
            if index < shared_pieces:
                self.shared_product.run_piece(
                    panel, tokens, index, shared_pieces
                )
            else:
                gate_up.run(panel, index - shared_pieces)

        team.each(shared_pieces + gate_up.count, share_or_expert)
        self.sums.phases(team, panel, offsets)
