"""`config.json` and `generation_config.json` of a preset, in the spelling of the public checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import AttentionKind
from step3p5.random_checkpoint.presets import Preset
from step3p5.random_checkpoint.tokenizer import BOS_ID, EOS_ID, PAD_ID, RoleToken, role_token_id

NUM_MTP_LAYERS = 3
FULL_ATTENTION_PERIOD = 4
TRANSFORMERS_VERSION = "5.12.1"
"""The release whose file forms are written; without it transformers suspects large tokenizers of a Mistral defect."""

ROPE_THETA = {AttentionKind.FULL: 5_000_000.0, AttentionKind.SLIDING: 10_000.0}
PARTIAL_ROTARY_FACTOR = {AttentionKind.FULL: 0.5, AttentionKind.SLIDING: 1.0}


def hub_config(preset: Preset, num_layers: int, dtype: CheckpointDtype) -> dict[str, object]:
    """The `config.json` of the first `num_layers` layers of `preset`, followed by its MTP layers.

    Every per-layer list has `num_layers + 3` entries: whatever `num_layers` is, the MTP layers are sliding, dense and
    unclamped.
    """
    kinds = [AttentionKind.SLIDING if i % FULL_ATTENTION_PERIOD else AttentionKind.FULL for i in range(num_layers)]
    kinds += [AttentionKind.SLIDING] * NUM_MTP_LAYERS
    moe_layers = range(preset.first_moe_layer, num_layers)
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": dtype.value,
        "transformers_version": TRANSFORMERS_VERSION,
        "vocab_size": preset.vocab_size,
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": NUM_MTP_LAYERS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "zero_centered": True,
        "tie_word_embeddings": False,
        "layer_types": [kind.value for kind in kinds],
        "num_attention_heads": preset.num_attention_heads,
        "num_attention_groups": preset.num_attention_groups,
        "head_dim": preset.head_dim,
        "attention_other_setting": {
            "attention_type": AttentionKind.SLIDING.value,
            "num_attention_heads": preset.sliding_num_attention_heads,
            "num_attention_groups": preset.num_attention_groups,
            "head_dim": preset.head_dim,
        },
        "sliding_window": preset.sliding_window,
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "max_position_embeddings": preset.max_position_embeddings,
        "rope_theta": [ROPE_THETA[kind] for kind in kinds],
        "partial_rotary_factors": [PARTIAL_ROTARY_FACTOR[kind] for kind in kinds],
        "rope_scaling": {"rope_type": "llama3", **asdict(preset.rope_scaling)},
        "yarn_only_types": [AttentionKind.FULL.value],
        "use_rope_layers": [],
        "moe_layers_enum": ",".join(map(str, moe_layers)),
        "moe_num_experts": preset.moe_num_experts,
        "moe_top_k": preset.moe_top_k,
        "moe_intermediate_size": preset.moe_intermediate_size,
        "share_expert_dim": preset.share_expert_dim,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "swiglu_limits": _per_layer(preset.swiglu_limits, num_layers),
        "swiglu_limits_shared": _per_layer(preset.swiglu_limits_shared, num_layers),
        **_token_ids(preset),
    }


def hub_generation_config(preset: Preset) -> dict[str, object]:
    """The `generation_config.json`: token ids only, so that nothing overrides a caller's sampling."""
    return _token_ids(preset)


def _per_layer(limits: Mapping[int, float], num_layers: int) -> list[float]:
    return [limits.get(i, 0.0) for i in range(num_layers)] + [0.0] * NUM_MTP_LAYERS


def _token_ids(preset: Preset) -> dict[str, object]:
    end_of_turn = role_token_id(RoleToken.IM_END, preset.first_role_token_id)
    return {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, PAD_ID, end_of_turn], "pad_token_id": PAD_ID}
