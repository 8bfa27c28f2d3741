"""The public checkpoint's `config.json` (stepfun-ai/Step-3.5-Flash), and the same model as transformers writes it."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "original_max_position_embeddings": 131072,
    "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
}


def flash_config(**changes: Any) -> dict[str, Any]:
    """The hub's `config.json`: lists of 45 decoder and 3 MTP entries. `changes` replace fields, `...` removes one."""
    full = [i < 45 and i % 4 == 0 for i in range(48)]
    config: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "auto_map": {
            "AutoConfig": "configuration_step3p5.Step3p5Config",
            "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
        },
        "torch_dtype": "bfloat16",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "num_nextn_predict_layers": 3,
        "layer_types": ["full_attention" if f else "sliding_attention" for f in full],
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 96,
            "num_attention_groups": 8,
            "head_dim": 128,
        },
        "head_dim": 128,
        "sliding_window": 512,
        "rope_theta": [5_000_000.0 if f else 10_000.0 for f in full],
        "partial_rotary_factors": [0.5 if f else 1.0 for f in full],
        "rope_scaling": dict(LLAMA3),
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "max_position_embeddings": 262144,
        "moe_layers_enum": ",".join(str(i) for i in range(3, 45)),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
        "use_head_wise_attn_gate": True,
        "use_qk_norm": True,
        "zero_centered": True,
        "swiglu_limits": [0.0] * 43 + [7, 7, None, None, None],
        "swiglu_limits_shared": [0.0] * 44 + [16, 0.0, 0.0, 0.0],
        "vocab_size": 128896,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 128007],
    }
    config.update(changes)
    return {name: value for name, value in config.items() if value is not ...}


def transformers_config(**changes: Any) -> dict[str, Any]:
    """The same model's decoder in transformers' spelling: lists cut to 45, RoPE by layer type, MTP number kept."""
    hub = flash_config(
        attention_other_setting=...,
        auto_map=...,
        moe_layers_enum=...,
        moe_num_experts=...,
        moe_top_k=...,
        num_attention_groups=...,
        partial_rotary_factors=...,
        rope_scaling=...,
        rope_theta=...,
        use_rope_layers=None,
        yarn_only_types=None,
    )
    for name in ("layer_types", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = hub[name][:45]
    config = {
        **hub,
        "num_key_value_heads": 8,
        "num_sliding_attention_heads": 96,
        "num_attention_heads_per_layer": [64 if i % 4 == 0 else 96 for i in range(45)],
        "n_routed_experts": 288,
        "num_experts_per_tok": 8,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42,
        "rope_parameters": {
            "full_attention": {"rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5, **LLAMA3},
            "sliding_attention": {"rope_theta": 10_000.0, "partial_rotary_factor": 1.0, "rope_type": "default"},
        },
        "query_pre_attn_scalar": 128,
        "attention_bias": False,
    }
    config.update(changes)
    return {name: value for name, value in config.items() if value is not ...}
