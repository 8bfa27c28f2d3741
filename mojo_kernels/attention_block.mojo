"""The first half of a decoder layer as one op on a CPU: norm, projections, QK norm, rotation, cache, attention, residual.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .attend import Attend
from .grouped import Panel
from .heads import HeadForm, Heads, PagedCache
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Floats, Scratch, elements, expect_size
from .qkv import HeadsPieces
from .team import Team, on_team


@extensibility.register("step3p5_attention_block")
struct Step3p5AttentionBlock:
    """`y = h + attention(norm(h)) wo^T`, new keys and values into the cache."""

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
        ctx: DeviceContext,
    ) raises:
        """Runs the layer's half on a CPU; a GPU has an op for each step.

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
            ctx: The device.
        """
        comptime op = "step3p5_attention_block"
        comptime assert target == "cpu", "step3p5_attention_block runs on a CPU"
        var tokens = h.dim_size(0)
        var hidden_size = h.dim_size(1)
        var kv_heads = blocks.dim_size(4)
        var head_dim = blocks.dim_size(5)
        var heads = wq.dim_size(0) // head_dim
        var batch = cache_lengths.dim_size(0)
        expect_size(op, "norm_weight[H]", norm_weight.dim_size(0), hidden_size)
        expect_size(op, "wq[heads*D, H] dim H", wq.dim_size(1), hidden_size)
        expect_size(op, "wq[heads*D, H]", wq.dim_size(0), heads * head_dim)
        expect_size(op, "wk[kv_heads*D, H] dim H", wk.dim_size(1), hidden_size)
        expect_size(
            op, "wk[kv_heads*D, H]", wk.dim_size(0), kv_heads * head_dim
        )
        expect_size(op, "wv[kv_heads*D, H] dim H", wv.dim_size(1), hidden_size)
        expect_size(
            op, "wv[kv_heads*D, H]", wv.dim_size(0), kv_heads * head_dim
        )
        expect_size(op, "wo[H, heads*D] dim H", wo.dim_size(0), hidden_size)
        expect_size(op, "wo[H, heads*D]", wo.dim_size(1), heads * head_dim)
        comptime if gated:
            expect_size(op, "wg[heads, H] dim heads", wg.dim_size(0), heads)
            expect_size(op, "wg[heads, H] dim H", wg.dim_size(1), hidden_size)
        comptime if qk_norm:
            expect_size(op, "q_norm[D]", q_norm.dim_size(0), head_dim)
            expect_size(op, "k_norm[D]", k_norm.dim_size(0), head_dim)
        comptime if rotates:
            expect_size(op, "table[T, R] dim T", table.dim_size(0), tokens)
        expect_size(
            op, "row_offsets[batch+1]", row_offsets.dim_size(0), batch + 1
        )
        expect_size(
            op, "lookup_table[batch, any]", lookup_table.dim_size(0), batch
        )
        expect_size(op, "y[T, H] dim T", y.dim_size(0), tokens)
        expect_size(op, "y[T, H] dim H", y.dim_size(1), hidden_size)
        if tokens == 0:
            return

        var x = Scratch[DType.float32](tokens * hidden_size)
        var q = Scratch[DType.float32](tokens * heads * head_dim)
        var k = Scratch[DType.float32](tokens * kv_heads * head_dim)
        var v = Scratch[DType.float32](tokens * kv_heads * head_dim)
        var gates = Scratch[DType.float32](tokens * heads)

        var layer_size = blocks.dim_size(3) * kv_heads * head_dim
        var value_offset = blocks.dim_size(2) * layer_size
        var stride = Int(page_stride[0])
        var cache = PagedCache(
            elements(blocks.unsafe_ptr()).unsafe_offset(
                Int(layer) * layer_size
            ),
            stride if stride >= 0 else 2 * value_offset,
            value_offset,
            blocks.dim_size(3),
            kv_heads * head_dim,
            elements(lookup_table.unsafe_ptr()),
            lookup_table.dim_size(1),
        )
        var pieces_of_heads = HeadsPieces[
            DType.float32, DType.float32, qk_norm
        ](
            Heads(
                q.data,
                q.data,
                k.data,
                v.data,
                heads,
                kv_heads,
                head_dim,
                cache,
                elements(row_offsets.unsafe_ptr()),
                elements(cache_lengths.unsafe_ptr()),
                batch,
            ),
            HeadForm(
                elements(q_norm.unsafe_ptr()),
                elements(k_norm.unsafe_ptr()),
                eps,
                norm_offset,
                elements(table.unsafe_ptr()),
                table.dim_size(1) // 2 if rotates else 0,
            ),
            tokens,
        )
        var residual = elements(h.unsafe_ptr())
        var normed = x.data
        var norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )

        @always_inline
        def projection(
            to: Floats, w: InputTensor[dtype=dtype, rank=2, ...]
        ) {imm} -> Linear[dtype]:
            return Linear[dtype](
                to,
                to,
                normed,
                elements(w.unsafe_ptr()),
                hidden_size,
                w.dim_size(0),
            )

        var to_q = projection(q.data, wq)
        var to_k = projection(k.data, wk)
        var to_v = projection(v.data, wv)
        var to_gates = projection(gates.data, wg)
        var attend = Attend[gated](
            q.data,
            q.data,
            gates.data,
            cache,
            elements(row_offsets.unsafe_ptr()),
            elements(cache_lengths.unsafe_ptr()),
            batch,
            heads,
            kv_heads,
            head_dim,
            Int(window),
            Float32(head_dim) ** Float32(-0.5),
        )
        var output = Linear[dtype, adds=True](
            elements(y.unsafe_ptr()),
            residual,
            q.data,
            elements(wo.unsafe_ptr()),
            heads * head_dim,
            hidden_size,
        )

        def work(mut team: Team) {imm}:
            norm_phase(team, norm, normed, residual, tokens)

            var panel = Panel(hidden_size)
            var q_end = to_q.pieces(tokens)
            var k_end = q_end + to_k.pieces(tokens)
            var v_end = k_end + to_v.pieces(tokens)
            var end = v_end
            comptime if gated:
                end += to_gates.pieces(tokens)

            def project(piece: Int) {imm}:
                if piece < q_end:
                    to_q.run_piece(panel, tokens, piece, q_end)
                elif piece < k_end:
                    to_k.run_piece(panel, tokens, piece - q_end, k_end - q_end)
                elif piece < v_end:
                    to_v.run_piece(panel, tokens, piece - k_end, v_end - k_end)
                else:
                    to_gates.run_piece(
                        panel, tokens, piece - v_end, end - v_end
                    )

            team.each(end, project)

            var pieces = pieces_of_heads.count()

            def head_piece(piece: Int) {imm}:
                pieces_of_heads.run(piece, pieces)

            team.each(pieces, head_piece)

            def attend_piece(piece: Int) {imm}:
                attend.run_piece(piece)

            team.each(attend.pieces(), attend_piece)
            linear_phase(team, output, tokens)

        on_team(work)
        x.keep()
        q.keep()
        k.keep()
        v.keep()
        gates.keep()
