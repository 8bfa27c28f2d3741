"""The Mojo kernels of attention as graph functions; `T` are the tokens of a ragged batch."""

from __future__ import annotations

from typing import NamedTuple

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from .custom_ops import custom_op
from .kernels import scalar


class HeadNorm(NamedTuple):
    """`x * rsqrt(mean(x²) + eps) * (offset + weight)` over each head, weights `[head_dim]`."""

    q_weight: TensorValue
    k_weight: TensorValue
    eps: float
    offset: float


def qkv(
    q: TensorValue,
    k: TensorValue,
    v: TensorValue,
    norm: HeadNorm | None,
    rope_table: TensorValue | None,
    input_row_offsets: TensorValue,
    cache: PagedCacheValues,
    cache_layer: TensorValue,
    *,
    leaves_few: bool = False,
    windowed: bool = False,
) -> TensorValue:
    """Norms and rotates queries and keys, and writes keys and values into the paged cache.

    Args:
        q: Projected queries `[T, query heads * head_dim]`.
        k: Projected keys `[T, key heads * head_dim]`.
        v: Projected values, as `k`.
        norm: The RMSNorms of the heads, `None` for none.
        rope_table: `[T, rotary_dim]` float32, see `layers.rope`; `None` rotates nothing.
        input_row_offsets: `[batch + 1]` uint32.
        cache: `[pages, 2, layers, page_size, key heads, head_dim]` and its tables; of the type of `q`.
        cache_layer: The layer within the cache, a uint32 scalar on the host.
        leaves_few: Does nothing where `gated_attention` has a kernel that begins with the projections.
        windowed: Whether its queries see no more than a window.

    Returns:
        Queries `[T, query heads, head_dim]`.
    """
    device, head_dim = q.device, cache.kv_blocks.shape[5]
    unused = ops.constant([0.0], DType.float32, device=device)
    table = ops.unsqueeze(unused, 0) if rope_table is None else rope_table
    q_weight, k_weight, eps, offset = (unused, unused, 0.0, 0.0) if norm is None else norm
    return custom_op(
        "step3p5_qkv",
        device,
        [
            q,
            k,
            v,
            q_weight,
            k_weight,
            scalar(eps),
            scalar(offset),
            table,
            input_row_offsets,
            cache.kv_blocks,
            cache.page_stride,
            cache.cache_lengths,
            cache.lookup_table,
            cache.max_prompt_length,
            cache_layer,
        ],
        [TensorType(q.dtype, (q.shape[0], q.shape[1] // head_dim, head_dim), device)],
        parameters={
            "normalize": norm is not None,
            "rotate": rope_table is not None,
            "leaves_few": leaves_few,
            "windowed": windowed,
        },
    )[0]


def head_gate(x: TensorValue, gate: TensorValue) -> TensorValue:
    """`x * sigmoid(gate)` for every head, multiplied in float32.

    Args:
        x: Heads `[T, N, head_dim]`.
        gate: Logits `[T, N]`, of the type of `x`.

    Returns:
        `[T, N * head_dim]`.
    """
    return custom_op(
        "step3p5_head_gate",
        x.device,
        [x, gate],
        [TensorType(x.dtype, (x.shape[0], x.shape[1] * x.shape[2]), x.device)],
    )[0]


def attend(
    q: TensorValue,
    input_row_offsets: TensorValue,
    cache: PagedCacheValues,
    cache_layer: TensorValue,
    window: int,
    scale: float,
) -> TensorValue:
    """Softmax attention over the paged cache, by a plain kernel for the GPUs that MAX has none for.

    Args:
        q: Queries `[T, query heads, head_dim]`, of at most 256 elements.
        input_row_offsets: `[batch + 1]` uint32.
        cache: As of `qkv`; it holds the keys and values of these tokens.
        cache_layer: The layer within the cache, a uint32 scalar on the host.
        window: Keys that a query sees at most, its own the last; 0 for all.
        scale: Of the scores.

    Returns:
        As `q`.
    """
    return custom_op(
        "step3p5_attend",
        q.device,
        [
            q,
            input_row_offsets,
            cache.kv_blocks,
            cache.page_stride,
            cache.cache_lengths,
            cache.lookup_table,
            cache_layer,
            ops.constant(window, DType.int32, device=DeviceRef.CPU()),
            scalar(scale),
        ],
        [q.type],
    )[0]


def gated_attention(
    q: TensorValue,
    k: TensorValue,
    v: TensorValue,
    gate: TensorValue,
    norm: HeadNorm,
    rope_table: TensorValue,
    input_row_offsets: TensorValue,
    cache: PagedCacheValues,
    cache_layer: TensorValue,
    window: int | None,
    scale: float,
) -> TensorValue:
    """From the projections to the gated heads on a GPU: one launch for few tokens a request, else MAX's attention.

    Args:
        q: See `qkv`.
        k: See `qkv`.
        v: See `qkv`.
        gate: Logits of the heads' gates `[T, query heads]`.
        norm: The RMSNorms of the heads.
        rope_table: See `qkv`.
        input_row_offsets: `[batch + 1]` uint32.
        cache: See `qkv`.
        cache_layer: The layer within the cache, a uint32 scalar on the host.
        window: Keys that a query sees at most, its own the last; `None` for all.
        scale: Of the scores.

    Returns:
        As `q`: `softmax(scale q kᵀ) v * sigmoid(gate)` of normed and rotated queries and keys.

    Raises:
        ValueError: The cache says nothing of how MAX's kernel divides its work.
    """
    dispatch = cache.attention_dispatch_metadata
    if dispatch is None:
        raise ValueError("attention_dispatch_metadata of the cache: found none, expected the one of a GPU's cache")
    windowed = window is not None
    heads = qkv(q, k, v, norm, rope_table, input_row_offsets, cache, cache_layer, leaves_few=True, windowed=windowed)
    return custom_op(
        "step3p5_gated_attention",
        q.device,
        [
            heads,
            q,
            k,
            v,
            gate,
            norm.q_weight,
            norm.k_weight,
            scalar(norm.eps),
            scalar(norm.offset),
            rope_table,
            input_row_offsets,
            *cache.flatten_without_attention_dispatch_metadata(),
            cache_layer,
            scalar(scale),
            dispatch.tensor,
        ],
        [q.type, heads.type],
        {
            # MAX's names.
            "mask": "causal" if window is None else "sliding_window_causal",
            "window": window or -1,
            "half": int(rope_table.shape[1]) // 2,
        },
    )[0]
