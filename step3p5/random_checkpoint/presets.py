"""The model shapes that a random checkpoint can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from step3p5.layer_config import Llama3Scaling


@dataclass(frozen=True)
class Preset:
    """One shape. What no preset varies (thetas, router activation, flags) is written once, in `hub_config`.

    Layers `first_moe_layer` on are mixture-of-experts. The two limit tables name the clamped layers.
    The tokenizer's role tokens start at id `first_role_token_id`; every id below it is a token as well.
    `shard_bytes` bounds a shard unless one tensor alone is larger.
    """

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_hidden_layers: int
    first_moe_layer: int
    num_attention_heads: int
    sliding_num_attention_heads: int
    num_attention_groups: int
    head_dim: int
    sliding_window: int
    moe_num_experts: int
    moe_top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    max_position_embeddings: int
    rope_scaling: Llama3Scaling
    first_role_token_id: int
    shard_bytes: int
    swiglu_limits: Mapping[int, float] = field(default_factory=dict)
    swiglu_limits_shared: Mapping[int, float] = field(default_factory=dict)


def _scaling(factor: float, original_max_position_embeddings: int) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=32.0,
        original_max_position_embeddings=original_max_position_embeddings,
    )


PRESETS: Mapping[str, Preset] = {
    # Every kind of layer in six: full and sliding, dense and MoE, each clamp alone and both together, with limits that
    # differ so that a swap shows. The window is the smallest that the CPU attention kernel takes, and the scaling's
    # original length is short enough to change every frequency but the fastest. Expert matrices are whole 128 x 128
    # quantisation blocks, and the shared expert is wider than the routed ones.
    "tiny": Preset(
        hidden_size=256,
        intermediate_size=512,
        vocab_size=512,
        num_hidden_layers=6,
        first_moe_layer=2,
        num_attention_heads=4,
        sliding_num_attention_heads=6,
        num_attention_groups=2,
        head_dim=64,
        sliding_window=128,
        moe_num_experts=16,
        moe_top_k=4,
        moe_intermediate_size=128,
        share_expert_dim=256,
        max_position_embeddings=4096,
        rope_scaling=_scaling(factor=8.0, original_max_position_embeddings=512),
        first_role_token_id=500,
        shard_bytes=16_000_000,
        swiglu_limits={3: 7.0, 5: 5.0},
        swiglu_limits_shared={1: 16.0, 5: 12.0},
    ),
    # The released model at a quarter of its width: 659 M decoder parameters, 155 M of them active a token.
    "mid": Preset(
        hidden_size=1024,
        intermediate_size=2816,
        vocab_size=8192,
        num_hidden_layers=12,
        first_moe_layer=3,
        num_attention_heads=16,
        sliding_num_attention_heads=24,
        num_attention_groups=4,
        head_dim=64,
        sliding_window=512,
        moe_num_experts=64,
        moe_top_k=8,
        moe_intermediate_size=320,
        share_expert_dim=320,
        max_position_embeddings=32768,
        rope_scaling=_scaling(factor=2.0, original_max_position_embeddings=16384),
        first_role_token_id=8180,
        shard_bytes=1_000_000_000,
        swiglu_limits={10: 7.0, 11: 7.0},
        swiglu_limits_shared={11: 16.0},
    ),
    # The shape of the released Step-3.5-Flash.
    "flash": Preset(
        hidden_size=4096,
        intermediate_size=11264,
        vocab_size=128896,
        num_hidden_layers=45,
        first_moe_layer=3,
        num_attention_heads=64,
        sliding_num_attention_heads=96,
        num_attention_groups=8,
        head_dim=128,
        sliding_window=512,
        moe_num_experts=288,
        moe_top_k=8,
        moe_intermediate_size=1280,
        share_expert_dim=1280,
        max_position_embeddings=262144,
        rope_scaling=_scaling(factor=2.0, original_max_position_embeddings=131072),
        first_role_token_id=128006,
        shard_bytes=4_000_000_000,
        swiglu_limits={43: 7.0, 44: 7.0},
        swiglu_limits_shared={44: 16.0},
    ),
}
"""The presets by the name that `--preset` takes."""
