"""One decoder layer: pre-norm attention and pre-norm MLP or MoE, each on a residual."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue
from max.nn.kv_cache import KVCacheParams, PagedCacheValues
from max.nn.layer import Module

from ..checkpoint_tensors import TensorRole
from ..layer_config import LayerConfig, ModelConfig, MoEConfig
from ..precision import weight_dtype
from .attention import Attention
from .cpu_layers import AttentionHalf, dense_layer, moe_layer
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm


class DecoderLayer(Module):
    """`h += attention(norm(h))`, then `h += mlp(norm(h))` or `h += experts(norm(h)) + shared_expert(norm(h))`.

    Sub-module names are the checkpoint's, so that its tensors load by name. `experts`: see `MoE`.
    """

    def __init__(
        self,
        config: LayerConfig,
        model: ModelConfig,
        kv_params: KVCacheParams,
        dtype: DType,
        device: DeviceRef,
        experts: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        norm_dtype = weight_dtype(TensorRole.HIDDEN_NORM, dtype, device)
        self.input_layernorm = RMSNorm(model.hidden_size, model, norm_dtype)
        self.self_attn = Attention(config.attention, model, kv_params, dtype, device)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model, norm_dtype)
        if isinstance(config.mlp, MoEConfig):
            self.moe = MoE(config.mlp, model.hidden_size, dtype, device, experts)
            self.share_expert = MLP(config.mlp.shared_expert.intermediate_size, model.hidden_size, dtype, device)
        else:
            self.mlp = MLP(config.mlp.intermediate_size, model.hidden_size, dtype, device)

    def __call__(
        self,
        stream: list[TensorValue],
        cache_layer: TensorValue,
        kv_collection: PagedCacheValues,
        input_row_offsets: TensorValue,
        routed_limit: TensorValue,
        shared_limit: TensorValue,
        rope_table: TensorValue | None = None,
    ) -> list[TensorValue]:
        """Runs the layer; what differs between layers of one shape comes in as a value.

        Args:
            stream: Hidden states `[total_seq_len, hidden_size]`, and behind them what is yet to be added, if anything:
                a GPU adds it in the launch of the norm that follows.
            cache_layer: See `Attention`.
            kv_collection: See `Attention`.
            input_row_offsets: See `Attention`.
            routed_limit: Clamp limit of the routed experts, a float32 scalar on the host; infinite where there is none.
            shared_limit: The same of the shared expert or dense MLP.
            rope_table: See `Attention`.

        Returns:
            The same of the next layer.
        """
        h, *addend = stream
        if h.device.is_cpu():
            half = AttentionHalf(
                self.input_layernorm,
                self.self_attn,
                h,
                cache_layer,
                kv_collection,
                rope_table,
                input_row_offsets,
            )
            if isinstance(self.config.mlp, MoEConfig):
                norm = self.post_attention_layernorm
                return [moe_layer(half, norm, self.moe, self.share_expert, routed_limit, shared_limit)]
            return [dense_layer(half, self.post_attention_layernorm, self.mlp, shared_limit)]
        h, x = self.input_layernorm.of_sum(h, *addend)
        y = self.self_attn(x, cache_layer, kv_collection, rope_table, input_row_offsets)
        h, x = self.post_attention_layernorm.of_sum(h, y)
        if isinstance(self.config.mlp, MoEConfig):
            # In the experts' float32 up to the sum: in bfloat16 each term would be rounded by itself.
            return [h, self.moe.with_shared(x, self.share_expert, routed_limit, shared_limit)]
        return [h, self.mlp(x, shared_limit)]
