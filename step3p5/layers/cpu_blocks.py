"""The two halves of a decoder layer as one op each, for a CPU.

Launching an op costs a CPU as much as reading a few hundred kilobytes of weights, and a layer of single ops has two
dozen of them. A GPU's launches overlap, so there every step is an op of its own.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from ..custom_ops import custom_op
from .attention import Attention
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm


def attention_block(
    norm: RMSNorm,
    attention: Attention,
    h: TensorValue,
    cache_layer: TensorValue,
    kv_collection: PagedCacheValues,
    rope_table: TensorValue | None,
    input_row_offsets: TensorValue,
) -> TensorValue:
    """`h + attention(norm(h))`; arguments as of `Attention`, `h [total_seq_len, hidden_size]` float32."""
    config = attention.config
    q_norm, k_norm = (attention.q_norm, attention.k_norm) if config.qk_norm else (norm, norm)
    return custom_op(
        "step3p5_attention_block",
        h.device,
        [
            h,
            norm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
            attention.g_proj.weight if config.head_wise_gate else attention.k_proj.weight,
            q_norm.weight,
            k_norm.weight,
            h if rope_table is None else rope_table,
            input_row_offsets,
            kv_collection.kv_blocks,
            kv_collection.page_stride,
            kv_collection.cache_lengths,
            kv_collection.lookup_table,
            cache_layer,
            *_norm_constants(norm),
            ops.constant(config.sliding_window or 0, DType.uint32, device=DeviceRef.CPU()),
        ],
        [TensorType(h.dtype, h.shape, h.device)],
        parameters={
            "qk_norm": config.qk_norm,
            "rotates": rope_table is not None,
            "gated": config.head_wise_gate,
        },
    )[0]


def mlp_block(norm: RMSNorm, mlp: MLP, h: TensorValue, limit: TensorValue) -> TensorValue:
    """`h + mlp(norm(h))`, `h [tokens, hidden_size]` float32; `limit` as of `MLP`."""
    return custom_op(
        "step3p5_mlp_block",
        h.device,
        [h, norm.weight, *_projections(mlp), *_norm_constants(norm), limit],
        [TensorType(h.dtype, h.shape, h.device)],
    )[0]


def moe_block(
    norm: RMSNorm, moe: MoE, shared: MLP, h: TensorValue, limit: TensorValue, shared_limit: TensorValue
) -> TensorValue:
    """`h + moe(norm(h)) + shared(norm(h))`, `h [tokens, hidden_size]` float32; limits as of `MoE` and `MLP`."""
    config = moe.config
    return custom_op(
        "step3p5_moe_block",
        h.device,
        [
            h,
            norm.weight,
            moe.gate.weight,
            moe.bias(),
            moe.gate_proj(),
            moe.up_proj(),
            moe.down_proj(),
            *_projections(shared),
            *_norm_constants(norm),
            ops.constant(config.router_scaling_factor, DType.float32, device=DeviceRef.CPU()),
            limit,
            shared_limit,
        ],
        [TensorType(h.dtype, h.shape, h.device)],
        parameters={"top_k": config.top_k, "normalize": config.normalize_weights},
    )[0]


def _projections(mlp: MLP) -> list[TensorValue]:
    return [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]


def _norm_constants(norm: RMSNorm) -> list[TensorValue]:
    """`eps` and what is added to the weights."""
    return [ops.constant(value, DType.float32, device=DeviceRef.CPU()) for value in (norm.eps, norm.weight_offset)]
