"""Gated attention over the paged cache on a GPU: ours for few new tokens a request, MAX's for prompts."""

import extensibility
from builtin_kernels.attention import Struct_mha_ragged_paged_scalar_args
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .attend_few_gpu import attend_few, few_fit, half_fits
from .attend_gpu import Queries
from .few_tokens_gpu import FewTokens
from .head_gate_gpu import head_gate_gpu
from .heads import HeadForm, PagedCache, paged_cache
from .key_tiles_gpu import HEAD_DIM
from .operands import Elements, elements, expect_size

comptime bfloats = rebind[Elements[DType.bfloat16]]


@extensibility.register("step3p5_gated_attention")
struct Step3p5GatedAttention:
    """`softmax(scale q k^T) v * sigmoid(gate)` over the paged cache, on a GPU for which MAX has an attention kernel.
    """

    @staticmethod
    def execute[
        dtype: DType,
        weight_dtype: DType,
        //,
        target: StaticString,
        mask: StaticString,
        window: Int,
        half: Int,
    ](
        result: OutputTensor[dtype=dtype, rank=2, ...],
        attended: OutputTensor[dtype=dtype, rank=3, ...],
        heads: InputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=2, ...],
        k: InputTensor[dtype=dtype, rank=2, ...],
        v: InputTensor[dtype=dtype, rank=2, ...],
        gate: InputTensor[dtype=dtype, rank=2, ...],
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
        max_cache_length: InputTensor[dtype=DType.uint32, rank=1, ...],
        layer: UInt32,
        scale: Float32,
        dispatch: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Attends with every token to the keys of its request, up to its own.

        Parameters:
            dtype: Type of projections, cache and results.
            weight_dtype: Type of the norms' weights.
            target: Kind of device; a GPU.
            mask: MAX's name for the keys that a query sees.
            window: Keys that a query sees at most, its own the last; -1: all.
            half: Columns from one that is rotated to its partner.

        Args:
            result: `[T, query heads * head_dim]`.
            attended: Room for the results before the gates `[T, query heads, head_dim]`.
            heads: Queries, as `attended`, from `step3p5_qkv`, which leaves few tokens a request to this op (`few_fit`):
                then nothing is in them.
            q: Projected queries, as `result`.
            k: Projected keys `[T, key heads * head_dim]`.
            v: Projected values, as `k`.
            gate: Logits of the gates `[T, query heads]`.
            q_weight: Norm weights of the queries `[head_dim]`.
            k_weight: Norm weights of the keys `[head_dim]`.
            eps: Added to the mean square.
            offset: Added to the weights.
            table: Rope table `[T, 2 * half]`: cosines, then sines.
            row_offsets: First row of every request, and the end `[R + 1]`.
            kv_blocks: The cache `[pages, 2, layers, page_size, key heads, head_dim]`.
            page_stride: Elements from page to page, on the host `[1]`; -1 where they are packed.
            cache_lengths: Tokens of every request before this step `[R]`.
            lookup_table: Every request's pages in order of position `[R, …]`.
            max_prompt_length: Most tokens of a request in this step, on the host `[1]`.
            max_cache_length: Most tokens of a request in the cache, on the host `[1]`.
            layer: Layer within the cache.
            scale: Of the scores.
            dispatch: How MAX's kernel divides its work, on the host.
            ctx: The device.
        """
        comptime op = "step3p5_gated_attention"
        var tokens = heads.dim_size(0)
        var query_heads = heads.dim_size(1)
        var head_dim = heads.dim_size(2)
        expect_size(op, "q[T, N] dim N", q.dim_size(1), query_heads * head_dim)
        expect_size(op, "gate[T, N] dim N", gate.dim_size(1), query_heads)
        expect_size(op, "table[T, 2 * half]", table.dim_size(1), 2 * half)
        if tokens == 0:
            return
        comptime if dtype == DType.bfloat16 and half_fits(half):
            comptime if ctx.default_device_info.api == "cuda":
                if few_fit[window > 0](
                    query_heads,
                    kv_blocks.dim_size(4),
                    head_dim,
                    half,
                    kv_blocks.dim_size(3),
                    cache_lengths.dim_size(0),
                    Int(max_prompt_length[0]),
                    ctx,
                ):
                    return attend_few[half](
                        FewTokens(
                            Queries(
                                bfloats(elements(result.unsafe_ptr())),
                                bfloats(elements(q.unsafe_ptr())),
                                rebind[PagedCache[DType.bfloat16]](
                                    paged_cache(
                                        kv_blocks,
                                        page_stride,
                                        lookup_table,
                                        layer,
                                    )
                                ),
                                elements(row_offsets.unsafe_ptr()),
                                elements(cache_lengths.unsafe_ptr()),
                                cache_lengths.dim_size(0),
                                query_heads,
                                kv_blocks.dim_size(4),
                                HEAD_DIM,
                                max(window, 0),
                                scale,
                            ),
                            bfloats(elements(k.unsafe_ptr())),
                            bfloats(elements(v.unsafe_ptr())),
                            bfloats(elements(gate.unsafe_ptr())),
                            HeadForm(
                                elements(q_weight.unsafe_ptr()),
                                elements(k_weight.unsafe_ptr()),
                                eps,
                                offset,
                                elements(table.unsafe_ptr()),
                                half,
                            ),
                        ),
                        Int(max_prompt_length[0]),
                        ctx,
                    )
        Struct_mha_ragged_paged_scalar_args.execute[
            target=target, mask_str=mask, local_window_size=window
        ](
            attended,
            heads,
            row_offsets,
            kv_blocks,
            page_stride,
            cache_lengths,
            lookup_table,
            max_prompt_length,
            max_cache_length,
            layer,
            scale,
            dispatch,
            ctx,
        )
        head_gate_gpu(
            elements(result.unsafe_ptr()),
            elements(attended.unsafe_ptr()),
            elements(gate.unsafe_ptr()),
            tokens * query_heads,
            head_dim,
            ctx,
        )
