"""Grouped-query attention of one layer: QK norm, partial RoPE, causal or sliding softmax, head-wise sigmoid gate."""

from __future__ import annotations

from max.driver import accelerator_api, accelerator_architecture_name
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged
from max.nn.kv_cache import KVCacheParams, PagedCacheValues
from max.nn.layer import Module

from .. import attention_kernels, kernels
from ..checkpoint_tensors import TensorRole
from ..layer_config import AttentionConfig, ModelConfig
from ..precision import weight_dtype
from .linear import Linear
from .norm import RMSNorm


class Attention(Module):
    """`o_proj( softmax(q kᵀ / √head_dim) v * sigmoid(x Wg) )` over the paged cache of the layer's own kind.

    Args:
        config: The layer's heads, window, rotary embedding and switches.
        model: Hidden size and norm constants.
        kv_params: The cache that holds this kind of layer.
        dtype: Storage type of the weights.
        device: Where the layer runs.
    """

    def __init__(
        self, config: AttentionConfig, model: ModelConfig, kv_params: KVCacheParams, dtype: DType, device: DeviceRef
    ) -> None:
        super().__init__()
        hidden_size, head_dim = model.hidden_size, config.head_dim
        query_size = config.num_attention_heads * head_dim
        key_size = config.num_key_value_heads * head_dim
        self.config = config
        self.kv_params = kv_params
        self.q_proj = Linear(hidden_size, query_size, dtype, device)
        self.k_proj = Linear(hidden_size, key_size, dtype, device)
        self.v_proj = Linear(hidden_size, key_size, dtype, device)
        self.o_proj = Linear(query_size, hidden_size, dtype, device)
        if config.head_wise_gate:
            self.g_proj = Linear(hidden_size, config.num_attention_heads, dtype, device)
        if config.qk_norm:
            norm_dtype = weight_dtype(TensorRole.QK_NORM, dtype, device)
            self.q_norm = RMSNorm(head_dim, model, norm_dtype)
            self.k_norm = RMSNorm(head_dim, model, norm_dtype)
        self.mask = (
            MHAMaskVariant.CAUSAL_MASK if config.sliding_window is None else MHAMaskVariant.SLIDING_WINDOW_CAUSAL_MASK
        )

    def __call__(
        self,
        x: TensorValue,
        cache_layer: TensorValue,
        kv_collection: PagedCacheValues,
        rope_table: TensorValue | None,
        input_row_offsets: TensorValue,
    ) -> TensorValue:
        """Attends within each request of a ragged batch.

        Args:
            x: Normed hidden states, `[total_seq_len, hidden_size]`.
            cache_layer: This layer's index within its own cache, a uint32 scalar on the host.
            kv_collection: The paged cache; the new keys and values are written into it.
            rope_table: See `rope.rope_table`; `None` where the layer does not rotate.
            input_row_offsets: `[batch + 1]` uint32.

        Returns:
            `[total_seq_len, hidden_size]`.
        """
        config = self.config
        gate = None
        if config.head_wise_gate:
            q, k, v, gate = kernels.linear4(
                x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.g_proj.weight
            )
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        norm, scale, window = self._norm(x.device), config.head_dim**-0.5, config.sliding_window
        place = input_row_offsets, kv_collection, cache_layer
        lacks_flash = lacks_flash_attention(x.device)
        if gate is not None and norm is not None and rope_table is not None and x.device.is_gpu() and not lacks_flash:
            out = attention_kernels.gated_attention(q, k, v, gate, norm, rope_table, *place, window, scale)
            return self.o_proj(out)
        q = attention_kernels.qkv(q, k, v, norm, rope_table, *place)
        if lacks_flash:
            out = attention_kernels.attend(q, *place, window or 0, scale)
        else:
            out = flash_attention_ragged(
                self.kv_params, q, *place, self.mask, scale=scale, local_window_size=window or -1
            )
        if gate is not None:
            return self.o_proj(attention_kernels.head_gate(out, gate))
        return self.o_proj(ops.reshape(out, (x.shape[0], config.num_attention_heads * config.head_dim)))

    def _norm(self, device: DeviceRef) -> attention_kernels.HeadNorm | None:
        if not self.config.qk_norm:
            return None
        q, k = self.q_norm, self.k_norm
        return attention_kernels.HeadNorm(q.weight.to(device), k.weight.to(device), q.eps, q.weight_offset)


def lacks_flash_attention(device: DeviceRef) -> bool:
    """Whether MAX's attention does not compile for the GPU: on AMD it needs instructions that gfx942 (MI300) lacks."""
    return device.is_gpu() and accelerator_api() == "hip" and accelerator_architecture_name().startswith("gfx94")
