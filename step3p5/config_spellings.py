"""From the spellings of `config.json` that are in use to one: the hub's.

The checkpoint on the hub and transformers' own text config (`Step3p7TextConfig`, also of model type `step3p5`) name
several fields differently; transformers also nests the text model of Step-3.7 under `text_config`. A configuration that
gives one field in two spellings with two values is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from step3p5.config_fields import (
    ConfigError,
    fail,
    layer_indices,
    list_of,
    mapping,
    natural_int,
    one_of,
    positive_int,
    read_field,
    shown,
)

logger = logging.getLogger(__name__)

ALIASES: dict[str, str] = {
    "num_key_value_heads": "num_attention_groups",
    "n_routed_experts": "moe_num_experts",
    "num_experts": "moe_num_experts",
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "share_expert_dims": "share_expert_dim",
    "num_mtp_layers": "num_nextn_predict_layers",
    "partial_rotary_factor": "partial_rotary_factors",
}
"""Other names of fields that differ in nothing but the name, and the hub's name."""

TRANSLATED = ("mlp_layer_types", "num_sliding_attention_heads")
"""Fields of transformers' that say in another form what a field of the hub's says."""

SHARED_WITH_WRAPPER = ("quantization_config", "rope_scaling", "tie_word_embeddings")
"""Fields of the text model that a multimodal config.json may hold beside `text_config` instead of in it."""


def text_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's fields: those under `text_config` where `config` is that of a multimodal model, else `config`.

    Raises:
        ConfigError: `text_config` is no object, or contradicts the fields beside it.
    """
    if config.get("text_config") is None:
        return dict(config)
    text = dict(read_field("text_config", mapping, config["text_config"]))
    for name in SHARED_WITH_WRAPPER:
        if config.get(name) is not None:
            _state(text, name, config[name], stated_by=name, prefix="text_config.")
    return text


def hub_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (of a text model) with every field but `rope_parameters` in the hub's spelling.

    transformers drops the MTP entries of every per-layer list and keeps `num_nextn_predict_layers`: a config written by
    it (told by a `mlp_layer_types` as long as the decoder, beside such a `layer_types`) describes no MTP layer, so the
    number becomes 0.

    Raises:
        ConfigError: two spellings of a field disagree, or a field of transformers' is mistyped.
    """
    hub = {name: value for name, value in config.items() if name not in ALIASES and name not in TRANSLATED}
    for alias, name in ALIASES.items():
        if config.get(alias) is not None:
            _state(hub, name, config[alias], stated_by=alias)

    if config.get("num_sliding_attention_heads") is not None:
        heads = read_field("num_sliding_attention_heads", positive_int, config["num_sliding_attention_heads"])
        setting = read_field("attention_other_setting", mapping, hub.get("attention_other_setting") or {})
        hub["attention_other_setting"] = setting = dict(setting)
        _state(
            setting,
            "num_attention_heads",
            heads,
            stated_by="num_sliding_attention_heads",
            prefix="attention_other_setting.",
        )

    if config.get("mlp_layer_types") is not None:
        kinds = read_field("mlp_layer_types", list_of(one_of("sparse", "dense")), config["mlp_layer_types"])
        _translate_mlp_layer_types(hub, kinds)
    return hub


def hub_setting(setting: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """An object of the config with the renamed entries in the hub's spelling."""
    hub = {name: value for name, value in setting.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if setting.get(alias) is not None:
            _state(hub, name, setting[alias], stated_by=prefix + alias, prefix=prefix)
    return hub


def _translate_mlp_layer_types(hub: dict[str, Any], kinds: tuple[str, ...]) -> None:
    num_hidden_layers = read_field("num_hidden_layers", positive_int, hub.get("num_hidden_layers"))
    if len(kinds) < num_hidden_layers:
        fail(
            "mlp_layer_types",
            f"{len(kinds)} entries",
            f"{num_hidden_layers}, one for each of num_hidden_layers",
            "Complete the list.",
        )
    sparse = [index for index, kind in enumerate(kinds) if kind == "sparse"]
    listed = hub.get("moe_layers_enum")
    if listed is None:
        hub["moe_layers_enum"] = sparse
    elif _layer_set(listed) != set(sparse):
        _contradiction("mlp_layer_types", f'"sparse" at layers {shown(sparse)}', "moe_layers_enum", listed)

    layer_types, mtp_layers = hub.get("layer_types"), hub.get("num_nextn_predict_layers")
    written_by_transformers = (
        isinstance(layer_types, list | tuple) and len(layer_types) == len(kinds) == num_hidden_layers
    )
    if written_by_transformers and mtp_layers is not None:
        if read_field("num_nextn_predict_layers", natural_int, mtp_layers):
            logger.warning(
                "config.json has num_nextn_predict_layers %d but per-layer lists for the %d decoder layers only, as "
                "transformers writes them: the MTP layers are left out.",
                mtp_layers,
                num_hidden_layers,
            )
        hub["num_nextn_predict_layers"] = 0


def _layer_set(value: object) -> set[int]:
    return set(read_field("moe_layers_enum", layer_indices, value))


def _state(config: dict[str, Any], name: str, value: object, *, stated_by: str, prefix: str = "") -> None:
    """Sets `name` to what the spelling `stated_by` says of it, unless `config` says so already."""
    stated = config.get(name)
    if stated is None:
        config[name] = value
    elif stated != value or isinstance(stated, bool) != isinstance(value, bool):
        _contradiction(stated_by, shown(value), prefix + name, stated)


def _contradiction(name: str, found: str, other: str, stated: object) -> None:
    raise ConfigError(
        f"{name}: found {found}, expected what {other} says of the same, {shown(stated)}. "
        "Remove the wrong one of the two."
    )
