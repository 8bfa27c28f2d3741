"""`parse_model_config`: the public configuration, absent fields, both spellings, one clear error for each mistake."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
from flash_config import LLAMA3, flash_config, transformers_config
from hypothesis import example, given
from hypothesis import strategies as st

from step3p5.config_parser import ConfigError, parse_model_config
from step3p5.layer_config import (
    AttentionConfig,
    AttentionKind,
    DenseMLPConfig,
    LayerConfig,
    Llama3Scaling,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)

SCALING = Llama3Scaling(2.0, 1.0, 32.0, 131072)
FULL = AttentionConfig(AttentionKind.FULL, 64, 8, 128, None, RopeConfig(5e6, 64, SCALING), True, True)
SLIDING = AttentionConfig(AttentionKind.SLIDING, 96, 8, 128, 512, RopeConfig(1e4, 128, None), True, True)


def moe(limit: float | None = None, shared_limit: float | None = None) -> MoEConfig:
    return MoEConfig(288, 8, 1280, limit, DenseMLPConfig(1280, shared_limit), 3.0, True, True, True)


def rope(model: ModelConfig, index: int) -> RopeConfig:
    """The rotary embedding of a layer that has one, MTP layers counted on."""
    found = (*model.layers, *model.mtp_layers)[index].attention.rope
    assert found is not None
    return found


def test_public_configuration() -> None:
    model = parse_model_config(flash_config())

    dense = DenseMLPConfig(11264, None)
    mlps = [dense] * 3 + [moe()] * 40 + [moe(7.0), moe(7.0, 16.0)]
    attentions = [FULL if i % 4 == 0 else SLIDING for i in range(45)]
    assert model == ModelConfig(
        hidden_size=4096,
        vocab_size=128896,
        rms_norm_eps=1e-5,
        zero_centered_norm=True,
        tie_word_embeddings=False,
        max_position_embeddings=262144,
        layers=tuple(LayerConfig(i, attentions[i], mlps[i]) for i in range(45)),
        mtp_layers=tuple(LayerConfig(i, SLIDING, dense) for i in (45, 46, 47)),
    )


def test_parsing_leaves_the_config_alone() -> None:
    for config in (
        flash_config(),
        transformers_config(),
        {"text_config": flash_config(), "tie_word_embeddings": False},
    ):
        before = copy.deepcopy(config)
        parse_model_config(config)
        assert config == before


HARMLESS = ["hidden_act", "model_type", "norm_expert_weight", "tie_word_embeddings", "use_qk_norm", "use_rope_layers"]


@pytest.mark.parametrize("name", [*HARMLESS, "zero_centered"])
@pytest.mark.parametrize("absence", [..., None])
def test_absence_of_these_means_the_public_value(name: str, absence: Any) -> None:
    assert parse_model_config(flash_config(**{name: absence})) == parse_model_config(flash_config())


@pytest.mark.parametrize("absence", [..., None])
def test_other_absent_fields(absence: Any) -> None:
    def parsed(name: str) -> ModelConfig:
        return parse_model_config(flash_config(**{name: absence}))

    assert parsed("num_nextn_predict_layers").mtp_layers == ()
    assert parsed("attention_other_setting").layers[1].attention == replace(SLIDING, num_attention_heads=64)
    assert rope(parsed("partial_rotary_factors"), 0).rotary_dim == 128
    assert all(rope(parsed("rope_scaling"), i).scaling is None for i in range(48))
    assert all(rope(parsed("yarn_only_types"), i).scaling == SCALING for i in range(48))
    assert parsed("swiglu_limits").layers[44].mlp == moe(None, 16.0)
    assert parsed("swiglu_limits_shared").layers[44].mlp == moe(7.0, None)
    kinds = [type(layer.mlp) for layer in parsed("moe_layers_enum").layers]
    assert kinds == [DenseMLPConfig] + [MoEConfig] * 44


@pytest.mark.parametrize("name", ["swiglu_limits", "swiglu_limits_shared", "partial_rotary_factors", "yarn_only_types"])
def test_an_empty_list_is_as_none(name: str) -> None:
    assert parse_model_config(flash_config(**{name: []})) == parse_model_config(flash_config(**{name: ...}))


def test_a_dense_model_needs_no_moe_fields() -> None:
    names = ("moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim", "moe_router_activation")
    empties: list[Any] = ["", []]
    for empty in empties:
        model = parse_model_config(flash_config(moe_layers_enum=empty, **dict.fromkeys(names, ...)))
        assert model.layers[44].mlp == DenseMLPConfig(11264, 16.0)


def test_a_model_of_full_layers_needs_no_window() -> None:
    model = parse_model_config(flash_config(layer_types=["full_attention"] * 48, sliding_window=...))
    assert {layer.attention.sliding_window for layer in model.layers} == {None}


@pytest.mark.parametrize("listed", [[3, 44], (3, 44), "3,44", " 3 , 44 "])
def test_moe_layers_as_string_and_list(listed: Any) -> None:
    model = parse_model_config(flash_config(moe_layers_enum=listed))
    assert [layer.index for layer in model.layers if isinstance(layer.mlp, MoEConfig)] == [3, 44]


def test_one_number_holds_on_every_layer() -> None:
    model = parse_model_config(flash_config(rope_theta=20_000, partial_rotary_factors=0.25, rope_scaling=None))
    assert [rope(model, i) for i in range(48)] == [RopeConfig(20_000.0, 32, None)] * 48


@pytest.mark.parametrize(("on", "off"), [(True, False), (1, 0), (1, None)])
def test_layers_without_rope(on: Any, off: Any) -> None:
    model = parse_model_config(flash_config(use_rope_layers=[off, on] * 24))
    assert [layer.attention.rope is None for layer in model.layers] == [True, False] * 22 + [True]
    assert rope(model, 1) == SLIDING.rope


def test_null_entries_mean_none() -> None:
    model = parse_model_config(
        flash_config(swiglu_limits=[None] * 48, swiglu_limits_shared=[None] * 48, partial_rotary_factors=[None] * 48)
    )
    assert model.layers[44].mlp == moe()
    assert rope(model, 0).rotary_dim == 128


def test_dense_layers_are_clamped_by_the_shared_limits() -> None:
    limits, shared = [float(i + 1) for i in range(48)], [float(i + 101) for i in range(48)]
    model = parse_model_config(flash_config(swiglu_limits=limits, swiglu_limits_shared=shared))
    assert model.layers[2].mlp == DenseMLPConfig(11264, 103.0)
    assert model.layers[3].mlp == moe(4.0, 104.0)
    assert model.mtp_layers[2].mlp == DenseMLPConfig(11264, 148.0)


def test_entries_beyond_the_layers_are_left_over() -> None:
    model = parse_model_config(flash_config(num_nextn_predict_layers=1))
    assert model.mtp_layers == parse_model_config(flash_config()).mtp_layers[:1]


@pytest.mark.parametrize("spelling", [{"rope_type": "default"}, {"type": "default"}])
def test_default_scaling_is_none(spelling: dict[str, str]) -> None:
    assert rope(parse_model_config(flash_config(rope_scaling=spelling)), 0).scaling is None


def test_older_spelling_of_rope_type() -> None:
    older = {("type" if name == "rope_type" else name): value for name, value in LLAMA3.items()}
    assert rope(parse_model_config(flash_config(rope_scaling=older)), 0).scaling == SCALING


REQUIRED = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "num_attention_heads",
    "num_attention_groups",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_theta",
    "use_head_wise_attn_gate",
    "moe_num_experts",
    "moe_top_k",
    "moe_intermediate_size",
    "share_expert_dim",
    "moe_router_activation",
    "moe_router_scaling_factor",
    "use_moe_router_bias",
    "need_fp32_gate",
]


@pytest.mark.parametrize("absence", [..., None])
@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field(name: str, absence: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: found .*, expected .*\. Add the field to config\.json\.$"):
        parse_model_config(flash_config(**{name: absence}))


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_missing_scaling_field(name: str) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != name}
    with pytest.raises(ConfigError, match=rf"^rope_scaling\.{name}: found no such field, expected "):
        parse_model_config(flash_config(rope_scaling=scaling))


INTEGERS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_attention_groups",
    "head_dim",
    "sliding_window",
    "moe_num_experts",
    "moe_top_k",
    "moe_intermediate_size",
    "share_expert_dim",
]
FLAGS = [
    "tie_word_embeddings",
    "zero_centered",
    "use_head_wise_attn_gate",
    "use_qk_norm",
    "use_moe_router_bias",
    "need_fp32_gate",
    "norm_expert_weight",
]
LISTS = ["layer_types", "swiglu_limits", "swiglu_limits_shared", "use_rope_layers", "yarn_only_types"]
OBJECTS = ["attention_other_setting", "rope_scaling", "rope_parameters", "text_config", "quantization_config"]


NUMBERS = ["rms_norm_eps", "moe_router_scaling_factor"]
NAN, INF = float("nan"), float("inf")
WRONG_VALUES: dict[str, list[Any]] = {
    **{name: ["8", 8.0, True, 0, -8, [8]] for name in INTEGERS},
    **{name: ["1", True, 0, -1.0, NAN, INF] for name in NUMBERS},
    **{name: [1, 0, "true", []] for name in FLAGS},
    **{name: [5, "full_attention", {"0": 0}, True] for name in LISTS},
    **{name: [5, "llama3", [1], False] for name in OBJECTS},
    "num_nextn_predict_layers": ["3", 3.0, True, -1],
    "rope_theta": ["1e4", True, 0, -1.0, NAN, INF, {}],
    "partial_rotary_factors": ["0.5", True, 0, -0.5, 1.5, NAN],
    "moe_layers_enum": [3, "3;4", "3,,4", "-3", "3.0", "a", True, {"3": True}],
    "hidden_act": ["gelu", 1],
    "model_type": ["llama"],
    "moe_router_activation": ["softmax", True],
    "att_impl_type": ["MLA"],
    "attention_bias": [True],
    "attn_logit_softcapping": [30.0],
    "fp32_residual_connection": [True],
    "mlp_bias": [True],
    "query_pre_attn_scalar": [256],
    "sink": [True],
    "use_bidirectional_attention": [True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG_VALUES for value in WRONG_VALUES[name]])
def test_mistyped_and_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: found .+, expected .+\. \w.*\.$"):
        parse_model_config(flash_config(**{name: value}))


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("layer_types", ["chunked_attention", None, 1]),
        ("rope_theta", [None, "1e4", True, 0, -1.0, float("inf")]),
        ("partial_rotary_factors", ["0.5", True, 0, 1.01, float("nan")]),
        ("swiglu_limits", ["7", True, -7.0, float("nan"), float("inf")]),
        ("swiglu_limits_shared", ["16", False, -1, float("nan"), float("-inf")]),
        ("use_rope_layers", ["true", 2, 1.0]),
        ("moe_layers_enum", ["3", 3.0, True, -1, None]),
    ],
)
def test_wrong_entry_of_a_list(name: str, entries: list[Any]) -> None:
    good = flash_config(use_rope_layers=[True] * 48, moe_layers_enum=list(range(3, 45)))[name]
    for wrong in entries:
        with pytest.raises(ConfigError, match=rf"^{name}\[20\]: found .+, expected .+\."):
            parse_model_config(flash_config(**{name: [*good[:20], wrong, *good[21:]]}))


@pytest.mark.parametrize(
    "name",
    ["layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared", "use_rope_layers"],
)
def test_list_too_short(name: str) -> None:
    entries = flash_config(use_rope_layers=[True] * 48)[name][:47]
    with pytest.raises(
        ConfigError, match=rf"^{name}: found 47 entries, expected 48, one for each of num_hidden_layers"
    ):
        parse_model_config(flash_config(**{name: entries}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_top_k": 9, "moe_num_experts": 8}, "moe_top_k: found 9 .*, expected 1 to 8 .moe_num_experts is 8"),
        ({"moe_top_k": 17}, "moe_top_k: found 17 .*, expected 1 to 16 .*kernels route to at most 16"),
        (
            {"num_attention_heads": 60},
            "num_attention_heads: found 60 .* a multiple of num_attention_groups, 8",
        ),
        (
            {"attention_other_setting": {"num_attention_heads": 90}},
            r"attention_other_setting\.num_attention_heads: found 90 .* a multiple of num_attention_groups, 8",
        ),
        ({"attention_other_setting": {"num_attention_heads": "96"}}, r"attention_other_setting\.num_attention_heads: "),
        ({"attention_other_setting": {"head_dim": 64}}, r"attention_other_setting\.head_dim: found 64 .*head_dim, 128"),
        ({"attention_other_setting": {"attention_type": "full_attention"}}, r"attention_other_setting\.attention_type"),
        ({"attention_other_setting": {"window": 3}}, r"attention_other_setting\.window: found 3 .*Remove"),
        (
            {"head_dim": 6, "attention_other_setting": ...},
            "partial_rotary_factors: found 0.5 for layer 0, 3.0 of head_dim 6 .*even number",
        ),
        ({"partial_rotary_factors": 0.3}, "partial_rotary_factors: found 0.3 for layer 0, 38.4 of head_dim 128"),
        ({"moe_layers_enum": "3,45"}, "moe_layers_enum: found layer 45, expected layers 0 to 44"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_scaling\.rope_type: found 'yarn' .*'llama3'"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling\.rope_type: found no such field"),
        ({"rope_scaling": {**LLAMA3, "type": "default"}}, r"rope_scaling\.type: found 'default' .*'llama3'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"rope_scaling\.factor: found 2\.0 .*Remove"),
        ({"rope_scaling": {**LLAMA3, "beta_fast": 32}}, r"rope_scaling\.beta_fast: found 32 .*Remove"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, r"rope_scaling\.high_freq_factor: found 1\.0 .*above"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config\.quant_method: found 'fp8' .*known"),
        ({"quantization_config": {}}, r"quantization_config\.quant_method: found null"),
        ({"num_hidden_layers": 46}, "layer_types: found 48 entries, expected 49"),
    ],
)
def test_contradictory_and_unsupported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        parse_model_config(flash_config(**changes))
    assert "\n" not in str(caught.value)


def test_the_error_survives_a_process_boundary() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_model_config({})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@st.composite
def hub_configs(draw: st.DrawFn) -> dict[str, Any]:
    layers, mtp, extra = draw(st.integers(1, 9)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
    count = layers + mtp + extra

    def entries(*values: Any) -> list[Any]:
        return draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))

    groups, sliding_groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return flash_config(
        num_hidden_layers=layers,
        num_nextn_predict_layers=mtp,
        layer_types=entries("full_attention", "sliding_attention"),
        num_attention_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 4)),
        attention_other_setting={
            "num_attention_groups": sliding_groups,
            "num_attention_heads": sliding_groups * draw(st.integers(1, 4)),
        },
        rope_theta=entries(1e4, 5e6, 1),
        partial_rotary_factors=entries(0.25, 0.5, 1, None),
        yarn_only_types=draw(st.lists(st.sampled_from(["full_attention", "sliding_attention"]), unique=True)),
        use_rope_layers=draw(st.just([]) | st.builds(lambda: entries(True, False))),
        moe_layers_enum=draw(st.lists(st.integers(0, layers - 1))),
        swiglu_limits=entries(None, 0, 0.0, 7, 16.5),
        swiglu_limits_shared=entries(None, 0, 0.0, 7, 16.5),
    )


@given(hub_configs())
def test_each_layer_takes_its_own_entries(config: dict[str, Any]) -> None:
    model = parse_model_config(config)
    layers = (*model.layers, *model.mtp_layers)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert (len(model.layers), len(model.mtp_layers)) == (
        config["num_hidden_layers"],
        config["num_nextn_predict_layers"],
    )
    for i, layer in enumerate(layers):
        kind = config["layer_types"][i]
        heads = config["attention_other_setting"] if kind == "sliding_attention" else config
        assert layer.attention.kind == kind
        assert layer.attention.num_attention_heads == heads["num_attention_heads"]
        assert layer.attention.num_key_value_heads == heads["num_attention_groups"]
        assert layer.attention.sliding_window == (512 if kind == "sliding_attention" else None)
        if config["use_rope_layers"] and not config["use_rope_layers"][i]:
            assert layer.attention.rope is None
        else:
            rotary_dim = int(128 * (config["partial_rotary_factors"][i] or 1))
            scaled = kind in (config["yarn_only_types"] or [kind])
            assert layer.attention.rope == RopeConfig(config["rope_theta"][i], rotary_dim, SCALING if scaled else None)
        limit, shared = config["swiglu_limits"][i] or None, config["swiglu_limits_shared"][i] or None
        is_moe = i in config["moe_layers_enum"]
        assert layer.mlp == (moe(limit, shared) if is_moe else DenseMLPConfig(11264, shared))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@example(name="attention_other_setting", value={":": False}, hub=True)
@example(name="attention_other_setting", value={"\n": 1}, hub=False)
@given(st.sampled_from(sorted({*flash_config(), *transformers_config()})), JUNK, st.booleans())
def test_any_value_in_any_field_parses_or_is_a_config_error(name: str, value: Any, hub: bool) -> None:
    config = flash_config(**{name: value}) if hub else transformers_config(**{name: value})
    try:
        parsed: object = parse_model_config(config)
    except ConfigError as error:
        parsed = str(error)
    assert isinstance(parsed, ModelConfig) or re.fullmatch(r"[\w.]+(\[.+\])*: found .+, expected .+", str(parsed))
