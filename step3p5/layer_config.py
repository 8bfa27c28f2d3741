"""The model's shape as validated objects, one per layer: the only form in which the package sees a configuration.

`pretrained_config.py` keeps a checkpoint's `config.json` as it was written; `parse_model_config` turns it into a
`ModelConfig` once. Nothing downstream indexes a per-layer list or asks whether a field exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class AttentionKind(StrEnum):
    """A layer's attention pattern, spelled as in `layer_types`."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3 frequency smoothing of the rotary embedding (`rope_scaling` with `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one layer: dim `i` pairs with `i + rotary_dim / 2`; dims from `rotary_dim` on pass."""

    theta: float
    rotary_dim: int
    scaling: Llama3Scaling | None


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of one layer.

    `sliding_window` is `None` on full layers; else a query sees itself and the `sliding_window - 1` keys before it.
    `rope` is `None` where `use_rope_layers` switches it off.
    """

    kind: AttentionKind
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None
    rope: RopeConfig | None
    head_wise_gate: bool
    qk_norm: bool


@dataclass(frozen=True)
class DenseMLPConfig:
    """A dense gated MLP; `swiglu_limit` is `None` where nothing is clamped."""

    intermediate_size: int
    swiglu_limit: float | None


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts with a shared expert beside them; a limit is `None` where nothing is clamped."""

    num_experts: int
    top_k: int
    intermediate_size: int
    swiglu_limit: float | None
    shared_expert: DenseMLPConfig
    router_scaling_factor: float
    normalize_weights: bool
    router_bias: bool
    fp32_gate: bool


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer, `index` as in the checkpoint's tensor names."""

    index: int
    attention: AttentionConfig
    mlp: DenseMLPConfig | MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """The whole model: `layers` are the decoder's, `mtp_layers` the multi-token-prediction tail, never run by it."""

    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    zero_centered_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    mtp_layers: tuple[LayerConfig, ...]
