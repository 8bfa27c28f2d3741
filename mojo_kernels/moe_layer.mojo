"""A mixture-of-experts decoder layer as one op on a CPU."""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .attention_half import AttentionHalf
from .moe_half import MoeHalf
from .operands import expect_size
from .team import Team, on_team


@extensibility.register("step3p5_moe_layer")
struct Step3p5MoeLayer:
    """`m = h + attention(norm(h)) wo^T`, `y = m + sum_k w_k expert_k(norm(m)) + shared(norm(m))`.
    """

    @staticmethod
    def execute[
        dtype: DType,
        //,
        target: StaticString,
        qk_norm: Bool,
        rotates: Bool,
        gated: Bool,
        top_k: Int,
        normalize: Bool,
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        h: InputTensor[dtype=DType.float32, rank=2, ...],
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        wq: InputTensor[dtype=dtype, rank=2, ...],
        wk: InputTensor[dtype=dtype, rank=2, ...],
        wv: InputTensor[dtype=dtype, rank=2, ...],
        wo: InputTensor[dtype=dtype, rank=2, ...],
        wg: InputTensor[dtype=dtype, rank=2, ...],
        q_norm: InputTensor[dtype=DType.float32, rank=1, ...],
        k_norm: InputTensor[dtype=DType.float32, rank=1, ...],
        table: InputTensor[dtype=DType.float32, rank=2, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        blocks: MutableInputTensor[dtype=DType.float32, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        cache_lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        lookup_table: InputTensor[dtype=DType.uint32, rank=2, ...],
        layer: UInt32,
        eps: Float32,
        norm_offset: Float32,
        window: UInt32,
        moe_norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        router: InputTensor[dtype=DType.float32, rank=2, ...],
        bias: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=dtype, rank=3, ...],
        up: InputTensor[dtype=dtype, rank=3, ...],
        down: InputTensor[dtype=dtype, rank=3, ...],
        shared_gate: InputTensor[dtype=dtype, rank=2, ...],
        shared_up: InputTensor[dtype=dtype, rank=2, ...],
        shared_down: InputTensor[dtype=dtype, rank=2, ...],
        scale: Float32,
        limit: Float32,
        shared_limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Runs the layer on a CPU; a GPU has an op for each step.

        Parameters:
            dtype: Type of the matrices.
            target: Kind of device.
            qk_norm: Norms every head of the queries and keys; without, `q_norm` and `k_norm` are any vectors.
            rotates: Rotates queries and keys; without, `table` is any matrix.
            gated: Multiplies every head by `sigmoid(x wg^T)`; without, `wg` is any matrix.
            top_k: Experts of a token.
            normalize: Divides a token's weights by their sum + 1e-20.

        Args:
            y: Result `[T, H]`.
            h: Hidden states `[T, H]`.
            norm_weight: `[H]`.
            wq: Query projection `[heads * D, H]`.
            wk: Key projection `[kv_heads * D, H]`.
            wv: Value projection `[kv_heads * D, H]`.
            wo: Output projection `[H, heads * D]`.
            wg: Gate projection `[heads, H]`.
            q_norm: `[D]`.
            k_norm: `[D]`.
            table: From `step3p5_rope_table`, `[T, R]`.
            row_offsets: First token of every request, and the end `[batch + 1]`.
            blocks: The cache's pages `[pages, 2, layers, page_size, kv_heads, D]`.
            page_stride: Distance of pages in elements, or -1 where they lie behind one another `[1]`.
            cache_lengths: Tokens of every request in the cache before these `[batch]`.
            lookup_table: Pages of every request `[batch, any]`.
            layer: The layer's index in the cache.
            eps: Of the norms.
            norm_offset: Added to the norms' weights.
            window: A query sees so many keys at most, its own the last; 0: all.
            moe_norm_weight: `[H]`.
            router: Router matrix `[E, H]`.
            bias: Added to the score for the choice only `[E]`.
            gate: Gate matrices `[E, M, H]`.
            up: Up matrices `[E, M, H]`.
            down: Down matrices `[E, H, M]`.
            shared_gate: Gate matrix of the shared expert `[S, H]`.
            shared_up: Its up matrix `[S, H]`.
            shared_down: Its down matrix `[H, S]`.
            scale: Multiplies the experts' weights last.
            limit: Clamp limit of the experts; infinite: none.
            shared_limit: Clamp limit of the shared expert; infinite: none.
            ctx: The device.
        """
        comptime op = "step3p5_moe_layer"
        comptime assert target == "cpu", "step3p5_moe_layer runs on a CPU"
        expect_size(op, "y[T, H] dim T", y.dim_size(0), h.dim_size(0))
        expect_size(op, "y[T, H] dim H", y.dim_size(1), h.dim_size(1))
        if h.dim_size(0) == 0:
            return
        var attention = AttentionHalf[dtype, qk_norm, rotates, gated](
            op,
            h,
            norm_weight,
            wq,
            wk,
            wv,
            wo,
            wg,
            q_norm,
            k_norm,
            table,
            row_offsets,
            blocks,
            page_stride,
            cache_lengths,
            lookup_table,
            layer,
            eps,
            norm_offset,
            window,
        )
        var rest = MoeHalf[dtype, top_k, normalize](
            op,
            y,
            attention.result.data,
            moe_norm_weight,
            router,
            bias,
            gate,
            up,
            down,
            shared_gate,
            shared_up,
            shared_down,
            eps,
            norm_offset,
            scale,
            limit,
            shared_limit,
        )

        def work(mut team: Team) {imm}:
            attention.phases(team)
            rest.phases(team)

        on_team(work)
