"""`Step3p5PretrainedConfig`: a checkpoint's `config.json` as transformers and MAX's own code read it, file form kept.

Importing this module makes it transformers' class for model type `step3p5`. transformers prefers a class that others
registered over a checkpoint's `auto_map`, so no remote code is fetched or run whatever `trust_remote_code` says.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .config_fields import UNSUPPORTED_UNLESS, ConfigError, ModelFields, MoEFields, RopeFields
from .config_parser import parse_model_config
from .config_spellings import ALIASES, TRANSLATED
from .layer_config import AttentionKind, ModelConfig

MODEL_TYPE = "step3p5"

_ROPE_NAMES = {row.name for row in fields(RopeFields)}
_SHAPE_NAMES = {row.name for table in (ModelFields, MoEFields) for row in fields(table)} - {"model_type"}
_SHAPE_NAMES |= {*ALIASES, *TRANSLATED, *UNSUPPORTED_UNLESS, "query_pre_attn_scalar"}
_SUB_CONFIGS = {"text_config", "vision_config"}
_LOADER_NAMES = {"_commit_hash", "_from_auto", "attn_implementation", "experts_implementation", "name_or_path"}


class Step3p5PretrainedConfig(PreTrainedConfig):
    """The configuration of a Step-3.5 checkpoint for code that expects transformers' names.

    `model_config` is what the package itself reads. The attributes are a view of it for code that knows one value for
    all layers: the full attention layers' heads and RoPE (`rope_theta`, a number; `rope_parameters` and `rope_scaling`,
    flat), `layer_types` without the MTP layers. Every other field of the file is an attribute under its own name.

    Attributes that determine the model's shape are read-only; to change one, pass it to `from_pretrained`.
    `save_pretrained` writes back the fields that were loaded, MTP entries included.

    Raises:
        ConfigError: The fields are no valid configuration.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(self, **kwargs: Any) -> None:
        source = {name: copy.deepcopy(value) for name, value in kwargs.items() if name not in _LOADER_NAMES}
        model = parse_model_config(source)
        view = _uniform_view(model)
        flat = {**source, **(source.get("text_config") or {})}
        hidden = view.keys() | _ROPE_NAMES | _SUB_CONFIGS | {"model_type"}
        visible = {name: value for name, value in flat.items() if name not in hidden}
        loader = {name: kwargs[name] for name in _LOADER_NAMES & kwargs.keys()}
        super().__init__(**visible, **view, **loader)
        self.rope_parameters = _rope_parameters(model)
        self.rope_theta = self.rope_parameters["rope_theta"]
        self._source = source
        self._model_config = model

    @property
    def model_config(self) -> ModelConfig:
        """The parsed configuration, one validated object a layer."""
        return self._model_config

    @property
    def source(self) -> Mapping[str, Any]:
        """The fields as `config.json` has them, read-only; `from_pretrained`'s overrides are in it."""
        return MappingProxyType(self._source)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' `from_dict`, with overrides applied before the configuration is parsed instead of after."""
        overrides = {name: kwargs.pop(name) for name in kwargs.keys() & (_SHAPE_NAMES | _ROPE_NAMES)}
        if isinstance(config_dict.get("text_config"), Mapping):
            text_config = {**config_dict["text_config"], **overrides}
            return super().from_dict({**config_dict, "text_config": text_config}, **kwargs)
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they were loaded, with later changes to those that may change, and transformers' own."""
        output: dict[str, Any] = super().to_dict()
        for name in ("_source", "_model_config", *_SHAPE_NAMES, *_ROPE_NAMES):
            output.pop(name, None)
        for name, value in self._source.items():
            if name not in output:
                output[name] = copy.deepcopy(value)
        if "torch_dtype" in self._source:
            output["torch_dtype"] = output["dtype"]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, less transformers' own fields at their defaults; what `save_pretrained` writes."""
        output: dict[str, Any] = super().to_diff_dict()
        complete = self.to_dict()
        return output | {name: complete[name] for name in self._source.keys() - output.keys()}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SHAPE_NAMES and "_model_config" in self.__dict__:
            raise ConfigError(
                f"{name}: cannot be set to {value!r} on a loaded configuration, of which every layer is parsed and "
                f"checked. Pass it when loading: AutoConfig.from_pretrained(path, {name}={value!r})."
            )
        super().__setattr__(name, value)


def register_pretrained_config() -> None:
    """Makes `Step3p5PretrainedConfig` transformers' class for `step3p5`, in place of any that is registered.

    MAX registers its own, over whatever is there, when `max.pipelines` is first imported: that has to come first.
    """
    import_module("max.pipelines.architectures.hf_config_shims")
    AutoConfig.register(MODEL_TYPE, Step3p5PretrainedConfig, exist_ok=True)


def as_step3p5_config(config: PreTrainedConfig | AutoConfig) -> Step3p5PretrainedConfig:
    """`config`, read again from its checkpoint if another class has read it.

    MAX reads a checkpoint's configuration with its own class before it imports custom architectures.

    Raises:
        ConfigError: The checkpoint is no Step-3.5 checkpoint, or its configuration is not valid.
    """
    if isinstance(config, Step3p5PretrainedConfig):
        return config
    assert isinstance(config, PreTrainedConfig)  # what AutoConfig loads
    if config.model_type != MODEL_TYPE:
        raise ConfigError(f"model_type: found {config.model_type!r}, expected {MODEL_TYPE!r}. Check --model.")
    reread = AutoConfig.from_pretrained(str(config.name_or_path))
    assert isinstance(reread, Step3p5PretrainedConfig)
    return reread


def _uniform_view(model: ModelConfig) -> dict[str, Any]:
    """transformers' common names for what is the same on all layers, or else as it is on the full attention layers."""
    attentions = [layer.attention for layer in model.layers]
    full = next((attention for attention in attentions if attention.kind is AttentionKind.FULL), attentions[0])
    return {
        "head_dim": full.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "layer_types": [str(attention.kind) for attention in attentions],
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": full.num_attention_heads,
        "num_hidden_layers": len(model.layers),
        "num_key_value_heads": full.num_key_value_heads,
        "num_nextn_predict_layers": len(model.mtp_layers),
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "vocab_size": model.vocab_size,
    }


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The full attention layers' RoPE, or else the first layer's that has one, as transformers' flat object."""
    attentions = sorted((layer.attention for layer in model.layers), key=lambda a: a.kind is not AttentionKind.FULL)
    rope = next((attention.rope for attention in attentions if attention.rope is not None), None)
    if rope is None:
        return {"rope_type": "default", "rope_theta": None}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is not None:
        parameters["rope_type"] = "llama3"
        parameters |= {row.name: getattr(rope.scaling, row.name) for row in fields(rope.scaling)}
    return parameters


register_pretrained_config()
