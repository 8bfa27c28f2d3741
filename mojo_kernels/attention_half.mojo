"""The first half of a decoder layer on a CPU: norm, projections, QK norm, rotation, cache, attention, residual."""

from extensibility import InputTensor
from extensibility import _MutableInputTensor as MutableInputTensor

from .attend import Attend
from .grouped import Panel
from .heads import HeadForm, Heads, PagedCache
from .linear import Linear, linear_phase
from .norm import Norm, norm_phase
from .operands import Elements, Floats, Scratch, elements, expect_size
from .qkv import HeadsPieces
from .team import Team


struct AttentionHalf[dtype: DType, qk_norm: Bool, rotates: Bool, gated: Bool](
    Movable
):
    """`result = h + attention(norm(h)) wo^T`, new keys and values into the cache.

    Parameters:
        dtype: Type of the matrices.
        qk_norm: Norms every head of the queries and keys; without, `q_norm` and `k_norm` are any vectors.
        rotates: Rotates queries and keys; without, `table` is any matrix.
        gated: Multiplies every head by `sigmoid(x wg^T)`; without, `wg` is any matrix.
    """

    var tokens: Int
    var residual: Floats
    var result: Scratch[DType.float32]
    """`[T, H]`."""
    var x: Scratch[DType.float32]
    var q: Scratch[DType.float32]
    var k: Scratch[DType.float32]
    var v: Scratch[DType.float32]
    var gates: Scratch[DType.float32]
    var norm: Norm
    var to_q: Linear[Self.dtype]
    var to_k: Linear[Self.dtype]
    var to_v: Linear[Self.dtype]
    var to_gates: Linear[Self.dtype]
    var heads: HeadsPieces[DType.float32, DType.float32, Self.qk_norm]
    var attend: Attend[Self.gated]
    var output: Linear[Self.dtype, adds=True]

    def __init__(
        out self,
        op: StaticString,
        h: InputTensor[dtype=DType.float32, rank=2, ...],
        norm_weight: InputTensor[dtype=DType.float32, rank=1, ...],
        wq: InputTensor[dtype=Self.dtype, rank=2, ...],
        wk: InputTensor[dtype=Self.dtype, rank=2, ...],
        wv: InputTensor[dtype=Self.dtype, rank=2, ...],
        wo: InputTensor[dtype=Self.dtype, rank=2, ...],
        wg: InputTensor[dtype=Self.dtype, rank=2, ...],
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
    ) raises:
        """Takes the operands and room for what lies between them.

        Args:
            op: Name of the op, for errors.
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
        """
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
        comptime if Self.gated:
            expect_size(op, "wg[heads, H] dim heads", wg.dim_size(0), heads)
            expect_size(op, "wg[heads, H] dim H", wg.dim_size(1), hidden_size)
        comptime if Self.qk_norm:
            expect_size(op, "q_norm[D]", q_norm.dim_size(0), head_dim)
            expect_size(op, "k_norm[D]", k_norm.dim_size(0), head_dim)
        comptime if Self.rotates:
            expect_size(op, "table[T, R] dim T", table.dim_size(0), tokens)
        expect_size(
            op, "row_offsets[batch+1]", row_offsets.dim_size(0), batch + 1
        )
        expect_size(
            op, "lookup_table[batch, any]", lookup_table.dim_size(0), batch
        )

        var x = Scratch[DType.float32](tokens * hidden_size)
        var q = Scratch[DType.float32](tokens * heads * head_dim)
        var k = Scratch[DType.float32](tokens * kv_heads * head_dim)
        var v = Scratch[DType.float32](tokens * kv_heads * head_dim)
        var gates = Scratch[DType.float32](tokens * heads)
        var result = Scratch[DType.float32](tokens * hidden_size)

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
        self.tokens = tokens
        self.residual = elements(h.unsafe_ptr())
        self.norm = Norm(
            elements(norm_weight.unsafe_ptr()), hidden_size, eps, norm_offset
        )

        def projection(
            y: Scratch[DType.float32],
            w: InputTensor[dtype=Self.dtype, rank=2, ...],
        ) {imm} -> Linear[Self.dtype]:
            return Linear[Self.dtype](
                y.data,
                y.data,
                x.data,
                elements(w.unsafe_ptr()),
                hidden_size,
                w.dim_size(0),
            )

        self.to_q = projection(q, wq)
        self.to_k = projection(k, wk)
        self.to_v = projection(v, wv)
        self.to_gates = projection(gates, wg)
        self.heads = HeadsPieces[DType.float32, DType.float32, Self.qk_norm](
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
                table.dim_size(1) // 2 if Self.rotates else 0,
            ),
            tokens,
        )
        self.attend = Attend[Self.gated](
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
        self.output = Linear[Self.dtype, adds=True](
            result.data,
            self.residual,
            q.data,
            elements(wo.unsafe_ptr()),
            heads * head_dim,
            hidden_size,
        )
        self.result = result^
        self.x = x^
        self.q = q^
        self.k = k^
        self.v = v^
        self.gates = gates^

    @always_inline
    def phases(self, mut team: Team):
        """Computes the half, in five phases."""
        var tokens = self.tokens
        norm_phase(team, self.norm, self.x.data, self.residual, tokens)

        var panel = Panel(self.norm.width)
        var q_end = self.to_q.pieces(tokens)
        var k_end = q_end + self.to_k.pieces(tokens)
        var v_end = k_end + self.to_v.pieces(tokens)
        var end = v_end
        comptime if Self.gated:
            end += self.to_gates.pieces(tokens)

        def project(piece: Int) {imm}:
            if piece < q_end:
                self.to_q.run_piece(panel, tokens, piece, q_end)
            elif piece < k_end:
                self.to_k.run_piece(panel, tokens, piece - q_end, k_end - q_end)
            elif piece < v_end:
                self.to_v.run_piece(panel, tokens, piece - k_end, v_end - k_end)
            else:
                self.to_gates.run_piece(
                    panel, tokens, piece - v_end, end - v_end
                )

        team.each(end, project)

        var pieces = self.heads.count()

        def head_piece(piece: Int) {imm}:
            self.heads.run(piece, pieces)

        team.each(pieces, head_piece)

        def attend_piece(piece: Int) {imm}:
            self.attend.run_piece(piece)

        team.each(self.attend.pieces(), attend_piece)
        linear_phase(team, self.output, tokens)
