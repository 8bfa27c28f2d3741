"""A decoder layer as one op, for a CPU.

Launching an op costs a CPU as much as reading a megabyte of weights, and a layer of single ops has two dozen of them. A
GPU's launches overlap, so there every step is an op of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorType, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from ..custom_ops import custom_op
from .attention import Attention
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm


@dataclass(frozen=True)
class AttentionHalf:
    """`m = h + attention(norm(h))`; operands as of `Attention`, `h [total_seq_len, hidden_size]` float32."""

    norm: RMSNorm
    attention: Attention
    h: TensorValue
    cache_layer: TensorValue
    kv_collection: PagedCacheValues
    rope_table: TensorValue | None
    input_row_offsets: TensorValue

    def operands(self) -> list[TensorValue | BufferValue]:
        """What every layer's op takes first."""
        attention, norm = self.attention, self.norm
        config = attention.config
        q_norm, k_norm = (attention.q_norm, attention.k_norm) if config.qk_norm else (norm, norm)
        return [
            self.h,
            norm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
            attention.g_proj.weight if config.head_wise_gate else attention.k_proj.weight,
            q_norm.weight,
            k_norm.weight,
            self.h if self.rope_table is None else self.rope_table,
            self.input_row_offsets,
            self.kv_collection.kv_blocks,
            self.kv_collection.page_stride,
            self.kv_collection.cache_lengths,
            self.kv_collection.lookup_table,
            self.cache_layer,
            _constant(norm.eps),
            _constant(norm.weight_offset),
            ops.constant(config.sliding_window or 0, DType.uint32, device=DeviceRef.CPU()),
        ]

    def parameters(self) -> dict[str, bool]:
        """What every layer's op is compiled for."""
        config = self.attention.config
        return {
            "qk_norm": config.qk_norm,
            "rotates": self.rope_table is not None,
            "gated": config.head_wise_gate,
        }


def dense_layer(half: AttentionHalf, norm: RMSNorm, mlp: MLP, limit: TensorValue) -> TensorValue:
    """`m + mlp(norm(m))`, `[total_seq_len, hidden_size]` float32; `limit` as of `MLP`."""
    return custom_op(
        "step3p5_dense_layer",
        half.h.device,
        [*half.operands(), norm.weight, *_projections(mlp), limit],
        [TensorType(half.h.dtype, half.h.shape, half.h.device)],
        parameters=half.parameters(),
    )[0]


def moe_layer(
    half: AttentionHalf, norm: RMSNorm, moe: MoE, shared: MLP, limit: TensorValue, shared_limit: TensorValue
) -> TensorValue:
    """`m + moe(norm(m)) + shared(norm(m))`, `[total_seq_len, hidden_size]` float32; limits as of `MoE` and `MLP`."""
    config = moe.config
    return custom_op(
        "step3p5_moe_layer",
        half.h.device,
        [
            *half.operands(),
            norm.weight,
            moe.gate.weight,
            moe.bias(),
            moe.gate_proj(),
            moe.up_proj(),
            moe.down_proj(),
            *_projections(shared),
            _constant(config.router_scaling_factor),
            limit,
            shared_limit,
        ],
        [TensorType(half.h.dtype, half.h.shape, half.h.device)],
        parameters={**half.parameters(), "top_k": config.top_k, "normalize": config.normalize_weights},
    )[0]


def _projections(mlp: MLP) -> list[TensorValue]:
    return [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]


def _constant(value: float) -> TensorValue:
    return ops.constant(value, DType.float32, device=DeviceRef.CPU())
