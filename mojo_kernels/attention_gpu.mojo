"""Attention over the paged cache on a GPU: ours for few new tokens a request, MAX's for prompts."""

import extensibility
from builtin_kernels.attention import Struct_mha_ragged_paged_scalar_args
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.gpu.host import DeviceContext

from .attend_few_gpu import attend_few, few_fit
from .attend_gpu import Queries
from .heads import PagedCache, paged_cache
from .key_tiles_gpu import HEAD_DIM
from .operands import Elements, elements

comptime FEWEST_TOKENS = 2
"""Of the request with the most new tokens, from which on our kernel is the faster one (on an H200)."""

comptime bfloats = rebind[Elements[DType.bfloat16]]


@extensibility.register("step3p5_attention")
struct Step3p5Attention:
    """`softmax(scale q k^T) v` over the paged cache, on a GPU for which MAX has an attention kernel.
    """

    @staticmethod
    def execute[
        dtype: DType, //, target: StaticString, mask: StaticString, window: Int
    ](
        result: OutputTensor[dtype=dtype, rank=3, ...],
        q: InputTensor[dtype=dtype, rank=3, ...],
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
            dtype: Type of queries, cache and results.
            target: Kind of device; a GPU.
            mask: MAX's name for the keys that a query sees.
            window: Keys that a query sees at most, its own the last; -1: all.

        Args:
            result: `[T, query heads, head_dim]`.
            q: Queries, as `result`.
            row_offsets: First row of every request, and the end `[R + 1]`.
            kv_blocks: The cache `[pages, 2, layers, page_size, key heads, head_dim]`; it holds these tokens' keys.
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
        comptime if dtype == DType.bfloat16 and target == "gpu":
            comptime if ctx.default_device_info.api == "cuda":
                var tokens = q.dim_size(0)
                var most_tokens = Int(max_prompt_length[0])
                if (
                    tokens > 0
                    and most_tokens >= FEWEST_TOKENS
                    and few_fit(
                        q.dim_size(1),
                        kv_blocks.dim_size(4),
                        kv_blocks.dim_size(5),
                        kv_blocks.dim_size(3),
                        most_tokens,
                    )
                ):
                    return attend_few(
                        Queries(
                            bfloats(elements(result.unsafe_ptr())),
                            bfloats(elements(q.unsafe_ptr())),
                            rebind[PagedCache[DType.bfloat16]](
                                paged_cache(
                                    kv_blocks, page_stride, lookup_table, layer
                                )
                            ),
                            elements(row_offsets.unsafe_ptr()),
                            elements(cache_lengths.unsafe_ptr()),
                            cache_lengths.dim_size(0),
                            q.dim_size(1),
                            kv_blocks.dim_size(4),
                            HEAD_DIM,
                            max(window, 0),
                            scale,
                        ),
                        tokens,
                        most_tokens,
                        ctx,
                    )
        Struct_mha_ragged_paged_scalar_args.execute[
            target=target, mask_str=mask, local_window_size=window
        ](
            result,
            q,
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
