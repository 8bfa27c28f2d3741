"""`config.json` into the validated `ModelConfig`: one object a layer, nothing left to look up or check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from step3p5.config_fields import (
    MAX_TOP_K,
    UNSUPPORTED_UNLESS,
    ConfigError,
    ModelFields,
    MoEFields,
    SlidingFields,
    fail,
    mapping,
    one_of,
    read_field,
    read_fields,
    refuse_other_fields,
    shown,
)
from step3p5.config_rope import parse_rope, per_layer
from step3p5.config_spellings import hub_setting, hub_spelling, text_model_config
from step3p5.layer_config import (
    AttentionConfig,
    AttentionKind,
    DenseMLPConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)

__all__ = ["ConfigError", "parse_model_config"]


def parse_model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Parses a checkpoint's `config.json`, in the hub's spelling or transformers', or a multimodal one's `text_config`.

    Layers `0 .. num_hidden_layers - 1` are the decoder's, the next `num_nextn_predict_layers` the MTP layers, which are
    dense. Per-layer lists may be longer than that, never shorter. `moe_layers_enum` absent means every decoder layer
    but 0. A dense layer takes its clamp from `swiglu_limits_shared`, a MoE layer's routed experts theirs from
    `swiglu_limits`. `config` is not changed.

    Raises:
        ConfigError: the first field found missing, mistyped, out of range, unsupported, or at odds with another.
    """
    text = hub_spelling(text_model_config(config))
    _refuse_unsupported(text)
    fields = read_fields(ModelFields, text)
    count = fields.num_hidden_layers + fields.num_nextn_predict_layers
    kinds = per_layer("layer_types", fields.layer_types, count)
    sliding = _sliding_fields(fields)
    ropes = parse_rope(text, kinds, fields.head_dim)
    attention = [_attention(fields, sliding, kind, rope) for kind, rope in zip(kinds, ropes, strict=True)]
    _check_heads_per_layer(fields.num_attention_heads_per_layer, attention[: fields.num_hidden_layers])

    moe_layers = _moe_layers(fields)
    moe = _moe_fields(text) if moe_layers else None
    limits = per_layer("swiglu_limits", fields.swiglu_limits or None, count)
    shared_limits = per_layer("swiglu_limits_shared", fields.swiglu_limits_shared or None, count)
    layers = []
    for index in range(count):
        mlp: DenseMLPConfig | MoEConfig
        if moe is not None and index in moe_layers:
            mlp = _moe(moe, limits[index], shared_limits[index])
        else:
            mlp = DenseMLPConfig(fields.intermediate_size, shared_limits[index])
        layers.append(LayerConfig(index, attention[index], mlp))

    return ModelConfig(
        hidden_size=fields.hidden_size,
        vocab_size=fields.vocab_size,
        rms_norm_eps=fields.rms_norm_eps,
        zero_centered_norm=fields.zero_centered,
        tie_word_embeddings=fields.tie_word_embeddings,
        max_position_embeddings=fields.max_position_embeddings,
        layers=tuple(layers[: fields.num_hidden_layers]),
        mtp_layers=tuple(layers[fields.num_hidden_layers :]),
    )


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    for name, harmless in UNSUPPORTED_UNLESS.items():
        value = text.get(name)
        if value is not None and not (harmless and value in harmless):
            expected = f"{shown(harmless[0])} or no such field" if harmless else "no such field"
            fail(name, shown(value), expected, "This form of the model is not supported.")
    scalar, head_dim = text.get("query_pre_attn_scalar"), text.get("head_dim")
    if scalar is not None and head_dim is not None:
        read_field("query_pre_attn_scalar", one_of(head_dim), scalar)

    quantization = text.get("quantization_config")
    if quantization is not None:
        quantization = read_field("quantization_config", mapping, quantization)
        fail(
            "quantization_config.quant_method",
            shown(quantization.get("quant_method")),
            "no quantization_config (known methods: none; weights are float32 or bfloat16)",
            "Use the unquantised checkpoint.",
        )


def _sliding_fields(fields: ModelFields) -> SlidingFields:
    prefix = "attention_other_setting."
    setting = hub_setting(fields.attention_other_setting, prefix)
    refuse_other_fields(SlidingFields, setting, prefix)
    sliding = read_fields(SlidingFields, setting, prefix)
    if sliding.head_dim not in (None, fields.head_dim):
        fail(
            f"{prefix}head_dim",
            shown(sliding.head_dim),
            f"head_dim, {fields.head_dim}, as on the full layers",
            "Layers with heads of different widths are not supported.",
        )
    return sliding


def _attention(
    fields: ModelFields, sliding: SlidingFields, kind: AttentionKind, rope: RopeConfig | None
) -> AttentionConfig:
    heads, groups, prefix, window = fields.num_attention_heads, fields.num_attention_groups, "", None
    if kind is AttentionKind.SLIDING:
        prefix = "attention_other_setting."
        heads = sliding.num_attention_heads or heads
        groups = sliding.num_attention_groups or groups
        window = fields.sliding_window
        if window is None:
            fail(
                "sliding_window",
                "no such field",
                'a positive integer, since layer_types has "sliding_attention"',
                "Add the field to config.json.",
            )
    if heads % groups:
        fail(f"{prefix}num_attention_heads", shown(heads), f"a multiple of num_attention_groups, {groups}")
    return AttentionConfig(
        kind=kind,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=fields.head_dim,
        sliding_window=window,
        rope=rope,
        head_wise_gate=fields.use_head_wise_attn_gate,
        qk_norm=fields.use_qk_norm,
    )


def _check_heads_per_layer(stated: tuple[int, ...], attention: list[AttentionConfig]) -> None:
    """`num_attention_heads_per_layer` repeats what the other fields say: transformers writes it out."""
    for index, (heads, layer) in enumerate(zip(stated, attention, strict=False)):
        if heads != layer.num_attention_heads:
            fail(
                f"num_attention_heads_per_layer[{index}]",
                shown(heads),
                f"{layer.num_attention_heads}, the heads of a layer of type {layer.kind}",
                "Remove the wrong one of the two.",
            )


def _moe_layers(fields: ModelFields) -> frozenset[int]:
    if fields.moe_layers_enum is None:
        return frozenset(range(1, fields.num_hidden_layers))
    for index in fields.moe_layers_enum:
        if index >= fields.num_hidden_layers:
            fail(
                "moe_layers_enum",
                f"layer {index}",
                f"layers 0 to {fields.num_hidden_layers - 1}, the decoder's (num_hidden_layers "
                f"{fields.num_hidden_layers}; MTP layers are dense)",
            )
    return frozenset(fields.moe_layers_enum)


def _moe_fields(text: Mapping[str, Any]) -> MoEFields:
    fields = read_fields(MoEFields, text)
    limit = min(fields.moe_num_experts, MAX_TOP_K)
    if fields.moe_top_k > limit:
        fail(
            "moe_top_k",
            shown(fields.moe_top_k),
            f"1 to {limit} (moe_num_experts is {fields.moe_num_experts}; the kernels route to at most {MAX_TOP_K})",
        )
    return fields


def _moe(fields: MoEFields, limit: float | None, shared_limit: float | None) -> MoEConfig:
    return MoEConfig(
        num_experts=fields.moe_num_experts,
        top_k=fields.moe_top_k,
        intermediate_size=fields.moe_intermediate_size,
        swiglu_limit=limit,
        shared_expert=DenseMLPConfig(fields.share_expert_dim, shared_limit),
        router_scaling_factor=fields.moe_router_scaling_factor,
        normalize_weights=fields.norm_expert_weight,
        router_bias=fields.use_moe_router_bias,
        fp32_gate=fields.need_fp32_gate,
    )
