"""Spellings of `config.json`: transformers' and the multimodal wrapper's parse as the hub's, contradictions do not."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from flash_config import LLAMA3, flash_config, transformers_config

from step3p5.config_parser import ConfigError, parse_model_config


def test_transformers_spelling_is_the_same_decoder(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = parse_model_config(transformers_config())
    assert model == replace(parse_model_config(flash_config()), mtp_layers=())
    assert "the MTP layers are left out" in caplog.text


def test_transformers_spelling_with_mtp_entries() -> None:
    hub = flash_config()
    names = ("layer_types", "swiglu_limits", "swiglu_limits_shared")
    config = transformers_config(mlp_layer_types=["dense"] * 3 + ["sparse"] * 42 + ["dense"] * 3)
    model = parse_model_config({**config, **{name: hub[name] for name in names}})
    assert model == parse_model_config(hub)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("num_key_value_heads", "num_attention_groups"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_local_experts", "moe_num_experts"),
        ("num_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_top_k"),
        ("share_expert_dims", "share_expert_dim"),
        ("num_mtp_layers", "num_nextn_predict_layers"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    value = flash_config()[name]
    expected = parse_model_config(flash_config())
    assert parse_model_config(flash_config(**{name: ..., alias: value})) == expected
    assert parse_model_config(flash_config(**{alias: value})) == expected
    with pytest.raises(ConfigError, match=rf"^{alias}: found {value - 1} .*, expected what {name} says .* {value} "):
        parse_model_config(flash_config(**{alias: value - 1}))


def test_both_spellings_at_once_when_they_agree() -> None:
    """An intermediate transformers wrote its own fields beside the hub's, lists within `rope_parameters` included."""
    hub = flash_config(moe_layers_enum=list(range(3, 45)))
    kinds = ("full_attention", "sliding_attention")
    parameters = {kind: {"rope_theta": hub["rope_theta"], "rope_type": "default"} for kind in kinds}
    parameters["full_attention"] |= LLAMA3
    both = hub | {"rope_parameters": parameters, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42}
    assert parse_model_config(both | {"num_experts": 288}) == parse_model_config(hub)


@pytest.mark.parametrize(
    "parameters",
    [
        {**LLAMA3},
        {**LLAMA3, "rope_theta": flash_config()["rope_theta"]},
        {"rope_theta": flash_config()["rope_theta"]},
    ],
)
def test_flat_rope_parameters_respect_yarn_only_types(parameters: dict[str, Any]) -> None:
    assert parse_model_config(flash_config(rope_parameters=parameters)) == parse_model_config(flash_config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_layer_types": ["dense"] * 4 + ["sparse"] * 41}, "mlp_layer_types: found .*what moe_layers_enum says"),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": True}, "num_mtp_layers: found true, .* 1 "),
        ({"mlp_layer_types": ["dense"] * 44}, "mlp_layer_types: found 44 entries, expected 45"),
        ({"mlp_layer_types": ["moe"] * 45}, r"mlp_layer_types\[0\]: found 'moe'"),
        (
            {"num_sliding_attention_heads": 64},
            r"num_sliding_attention_heads: found 64 .*attention_other_setting\.num_at",
        ),
        ({"num_attention_heads_per_layer": [64] * 45}, r"num_attention_heads_per_layer\[1\]: found 64 .*expected 96"),
        ({"rope_parameters": {**LLAMA3, "factor": 4.0}}, "rope_parameters: found scaling .*what rope_scaling"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: found scaling default for layer 0"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: found theta 10000.0 for layer 0.* 5000000.0"),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            r"rope_parameters\.sliding_attention: found factor 0\.5 for layer 1.* 1\.0",
        ),
        (
            {"rope_parameters": {"sliding_attention": LLAMA3}},
            r"rope_parameters\.sliding_attention: found scaling Llama3",
        ),
        ({"rope_parameters": {"full_attention": {}, "linear": {}}}, r"rope_parameters\.linear: found such an entry"),
        ({"rope_parameters": {"full_attention": 3}}, r"rope_parameters\.full_attention: found 3 .*an object"),
        (
            {"text_config": flash_config(), "tie_word_embeddings": True},
            "tie_word_embeddings: found true, .*text_config",
        ),
    ],
)
def test_spellings_that_disagree(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        parse_model_config(flash_config(**changes))


def test_missing_theta_of_one_layer_type() -> None:
    parameters = {"full_attention": {"rope_theta": 5e6}}
    with pytest.raises(ConfigError, match=r"^rope_theta: found none for layer 1, expected a positive"):
        parse_model_config(flash_config(rope_theta=..., rope_parameters=parameters))


def test_text_config_of_a_multimodal_model() -> None:
    text = flash_config(architectures=..., rope_scaling=..., tie_word_embeddings=...)
    wrapper = {"model_type": "step3p7", "hidden_size": 1, "rope_scaling": LLAMA3, "tie_word_embeddings": True}
    model = parse_model_config({**wrapper, "text_config": text, "vision_config": {"hidden_size": 1536}})
    assert model == replace(parse_model_config(flash_config()), tie_word_embeddings=True)


def test_quantisation_beside_text_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^quantization_config\.quant_method: found 'fp8'"):
        parse_model_config({"text_config": flash_config(), "quantization_config": {"quant_method": "fp8"}})
