"""From projections to attention's inputs: one op for the norms, rotations and stores of queries, keys and values."""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext
from std.math import sqrt
from std.sys import size_of

from .attend_few_gpu import few_fit
from .dot_tile import LANES, Lanes, load_row
from .heads import HeadForm, Heads, paged_cache
from .operands import Elements, elements, expect_size
from .qkv_gpu import qkv_gpu
from .tasks import piece_count, share
from .team import Team, on_team


def head_cpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](
    y: Elements[dtype],
    x: Elements[dtype],
    weight: Elements[weight_dtype],
    angles: Elements[DType.float32],
    head_dim: Int,
    form: HeadForm[weight_dtype],
):
    """Norms and rotates one head, in place where `y` is `x`."""
    var scale = Float32(1)
    comptime if normalize:
        var lanes = Lanes(0)
        for c in range(head_dim // LANES):
            var values = load_row(x.unsafe_offset(c * LANES))
            lanes += values * values
        var squares = lanes.reduce_add()
        for i in range(head_dim // LANES * LANES, head_dim):
            var value = x[unsafe_offset=i].cast[DType.float32]()
            squares += value * value
        scale = 1 / sqrt(squares / Float32(head_dim) + form.eps)

    @always_inline
    def normed(i: Int) {imm} -> Float32:
        var value = x[unsafe_offset=i].cast[DType.float32]()
        comptime if normalize:
            var w = weight[unsafe_offset=i].cast[DType.float32]()
            value *= scale * (form.offset + w)
        return value

    var half = form.half
    for i in range(half):
        var a = normed(i)
        var b = normed(i + half)
        var c = angles[unsafe_offset=i]
        var s = angles[unsafe_offset=half + i]
        y[unsafe_offset=i] = (a * c - b * s).cast[dtype]()
        y[unsafe_offset=i + half] = (b * c + a * s).cast[dtype]()
    for i in range(2 * half, head_dim):
        y[unsafe_offset=i] = normed(i).cast[dtype]()


@fieldwise_init
struct HeadsPieces[dtype: DType, weight_dtype: DType, normalize: Bool](
    ImplicitlyCopyable
):
    """The work on all heads, cut into pieces of whole tokens."""

    var heads: Heads[Self.dtype]
    var form: HeadForm[Self.weight_dtype]
    var tokens: Int

    def count(self) -> Int:
        """Number of pieces."""
        # Norming and rotating an element costs about as much as reading 8.
        var elements = self.heads.count() * self.heads.head_dim
        var bytes = self.tokens * elements * size_of[Self.dtype]() * 8
        return piece_count(self.tokens, bytes, 1)

    def run(self, piece: Int, pieces: Int):
        """Norms, rotates and stores the heads of one piece."""
        ref heads = self.heads
        ref form = self.form
        var first, last = share(self.tokens, piece, pieces)
        for token in range(first, last):
            var request = heads.request(token)
            var angles = form.angles.unsafe_offset(token * 2 * form.half)
            for head in range(heads.count()):
                var y = heads.target(token, head, request)
                var x = heads.source(token, head)
                if head < heads.query_heads:
                    head_cpu[Self.normalize](
                        y, x, form.q_weight, angles, heads.head_dim, form
                    )
                elif head < heads.query_heads + heads.key_heads:
                    head_cpu[Self.normalize](
                        y, x, form.k_weight, angles, heads.head_dim, form
                    )
                else:
                    for i in range(heads.head_dim):
                        y[unsafe_offset=i] = x[unsafe_offset=i]


def qkv_cpu[
    dtype: DType, weight_dtype: DType, //, normalize: Bool
](heads: Heads[dtype], form: HeadForm[weight_dtype], tokens: Int):
    """All tokens, on a team of its own."""
    var work_of = HeadsPieces[dtype, weight_dtype, normalize](
        heads, form, tokens
    )
    var pieces = work_of.count()

    def piece(index: Int) {imm}:
        work_of.run(index, pieces)

    def work(mut team: Team) {imm}:
        team.each(pieces, piece)

    on_team(work)


@extensibility.register("step3p5_qkv")
struct Step3p5Qkv:
    """Queries normed and rotated; keys likewise, and values, written to the paged cache.
    """

    @staticmethod
    def execute[
        dtype: DType,
        weight_dtype: DType,
        //,
        target: StaticString,
        normalize: Bool,
        rotate: Bool,
        leaves_few: Bool,
        windowed: Bool,
    ](
        result: OutputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=2, ...],
        k: InputTensor[dtype=dtype, rank=2, ...],
        v: InputTensor[dtype=dtype, rank=2, ...],
        q_weight: InputTensor[dtype=weight_dtype, rank=1, ...],
        k_weight: InputTensor[dtype=weight_dtype, rank=1, ...],
        eps: Float32,
        offset: Float32,
        table: InputTensor[dtype=DType.float32, rank=2, ...],
        row_offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        kv_blocks: MutableInputTensor[dtype=dtype, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        cache_lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        lookup_table: InputTensor[dtype=DType.uint32, rank=2, ...],
        max_prompt_length: InputTensor[dtype=DType.uint32, rank=1, ...],
        layer: UInt32,
        ctx: DeviceContext,
    ) raises:
        """Places the heads of every token.

        Parameters:
            dtype: Type of projections, queries and cache; float32 on a CPU.
            weight_dtype: Type of the norms' weights.
            target: Kind of device.
            normalize: Whether queries and keys are normed; the weights are not looked at otherwise.
            rotate: Whether they are rotated; the table is not looked at otherwise.
            leaves_few: Whether few tokens a request, as `few_fit` says, are left to `step3p5_gated_attention`.
            windowed: Whether that op's queries see no more than a window.

        Args:
            result: Queries `[T, query heads, head_dim]`.
            q: Projected queries `[T, query heads * head_dim]`.
            k: Projected keys `[T, key heads * head_dim]`.
            v: Projected values, as `k`.
            q_weight: Norm weights of the queries `[head_dim]`.
            k_weight: Norm weights of the keys `[head_dim]`.
            eps: Added to the mean square.
            offset: Added to the weights.
            table: Rope table `[T, rotary_dim]`: cosines, then sines.
            row_offsets: First row of every request, and the end `[R + 1]`.
            kv_blocks: The cache `[pages, 2, layers, page_size, key heads, head_dim]`.
            page_stride: Elements from page to page, on the host `[1]`; -1 where they are packed.
            cache_lengths: Tokens of every request before this step `[R]`.
            lookup_table: Every request's pages in order of position `[R, …]`.
            max_prompt_length: Most tokens of a request in this step, on the host `[1]`.
            layer: Layer within the cache.
            ctx: The device.
        """
        comptime op = "step3p5_qkv"
        var key_heads = kv_blocks.dim_size(4)
        var head_dim = kv_blocks.dim_size(5)
        var tokens = result.dim_size(0)
        var row_size = key_heads * head_dim
        expect_size(op, "result dim head_dim", result.dim_size(2), head_dim)
        expect_size(op, "q[T, N] dim T", q.dim_size(0), tokens)
        expect_size(
            op, "q[T, N] dim N", q.dim_size(1), result.dim_size(1) * head_dim
        )
        expect_size(op, "k[T, N] dim T", k.dim_size(0), tokens)
        expect_size(op, "k[T, N] dim N", k.dim_size(1), row_size)
        expect_size(op, "v[T, N] dim T", v.dim_size(0), tokens)
        expect_size(op, "v[T, N] dim N", v.dim_size(1), row_size)
        expect_size(
            op,
            "row_offsets[R + 1]",
            row_offsets.dim_size(0),
            cache_lengths.dim_size(0) + 1,
        )
        if table.dim_size(1) > head_dim:
            raise Error(
                op,
                ": a rope table of ",
                table.dim_size(1),
                " columns, expected at most ",
                head_dim,
            )
        if tokens == 0:
            return
        comptime if leaves_few and dtype == DType.bfloat16 and target == "gpu":
            comptime if ctx.default_device_info.api == "cuda":
                if few_fit[windowed](
                    result.dim_size(1),
                    key_heads,
                    head_dim,
                    table.dim_size(1) // 2,
                    kv_blocks.dim_size(3),
                    cache_lengths.dim_size(0),
                    Int(max_prompt_length[0]),
                    ctx,
                ):
                    return
        var heads = Heads(
            elements(result.unsafe_ptr()),
            elements(q.unsafe_ptr()),
            elements(k.unsafe_ptr()),
            elements(v.unsafe_ptr()),
            result.dim_size(1),
            key_heads,
            head_dim,
            paged_cache(kv_blocks, page_stride, lookup_table, layer),
            elements(row_offsets.unsafe_ptr()),
            elements(cache_lengths.unsafe_ptr()),
            cache_lengths.dim_size(0),
        )
        var form = HeadForm(
            elements(q_weight.unsafe_ptr()),
            elements(k_weight.unsafe_ptr()),
            eps,
            offset,
            elements(table.unsafe_ptr()),
            table.dim_size(1) // 2 if rotate else 0,
        )
        comptime if target == "cpu":
            qkv_cpu[normalize](heads, form, tokens)
        else:
            qkv_gpu[normalize](heads, form, tokens, ctx)
