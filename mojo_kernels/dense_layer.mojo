"""A dense decoder layer as one op on a CPU."""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .attention_half import AttentionHalf
from .mlp_half import MlpHalf
from .operands import expect_size
from .team import Team, on_team


@extensibility.register("step3p5_dense_layer")
struct Step3p5DenseLayer:
    """`m = h + attention(norm(h)) wo^T`, `y = m + mlp(norm(m))`."""

    @staticmethod
    def execute[
        dtype: DType,
        //,
        target: StaticString,
        qk_norm: Bool,
        rotates: Bool,
        gated: Bool,
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
        mlp_norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[dtype=dtype, rank=2, ...],
        up: InputTensor[dtype=dtype, rank=2, ...],
        down: InputTensor[dtype=dtype, rank=2, ...],
        limit: Float32,
        ctx: DeviceContext,
    ) raises:
        """Runs the layer on a CPU; a GPU has an op for each step.

        Parameters:
            dtype: Type of the matrices.
            target: Kind of device.
            qk_norm: Norms every head of the queries and keys; without, `q_norm` and `k_norm` are any vectors.
            rotates: Rotates queries and keys; without, `table` is any matrix.
            gated: Multiplies every head by `sigmoid(x wg^T)`; without, `wg` is any matrix.

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
            mlp_norm_weight: `[H]`.
            gate: Gate matrix `[M, H]`.
            up: Up matrix `[M, H]`.
            down: Down matrix `[H, M]`.
            limit: Clamp limit; infinite: none.
            ctx: The device.
        """
        comptime op = "step3p5_dense_layer"
        comptime assert target == "cpu", "step3p5_dense_layer runs on a CPU"
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
        var rest = MlpHalf[dtype](
            op,
            y,
            attention.result.data,
            mlp_norm_weight,
            gate,
            up,
            down,
            eps,
            norm_offset,
            limit,
        )

        def work(mut team: Team) {imm}:
            attention.phases(team)
            rest.phases(team)

        on_team(work)
