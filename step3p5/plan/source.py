"""The model that a plan is made for: `config.json` and tensor headers of a folder, or the released shape."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step3p5.checkpoint_files import HUB_PREFIXES, StoredTensor, read_headers, rename
from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors, mtp_tensors
from step3p5.config_fields import ConfigError
from step3p5.config_parser import parse_model_config
from step3p5.config_spellings import text_model_config
from step3p5.layer_config import ModelConfig
from step3p5.plan.weight_formats import FORMATS, WeightFormat, stored_format
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS

RELEASED = "step3p5"
"""The name of the released model; `$STEP3P5_MODEL` may say where it lies, and without it its shape is known."""


@dataclass(frozen=True)
class ModelSource:
    """A model and how its weights are stored."""

    name: str
    model: ModelConfig
    weights: WeightFormat


def read_model(name: str, dtype: str | None) -> ModelSource:
    """Reads a folder's `config.json` and the headers of its safetensors files, if it has any.

    Args:
        name: The folder, or `RELEASED`.
        dtype: A name of `FORMATS` that takes the place of what the headers say; bf16 where neither says anything.

    Raises:
        ConfigError: The folder has no usable `config.json`.
        CheckpointError: Its safetensors files are damaged.
    """
    chosen = FORMATS[dtype] if dtype is not None else None
    folder = os.environ.get("STEP3P5_MODEL") if name == RELEASED else name
    if folder is None:
        flash = PRESETS["flash"]
        model = parse_model_config(hub_config(flash, flash.num_hidden_layers, CheckpointDtype.BFLOAT16))
        return ModelSource("Step-3.5-Flash as released", model, chosen or FORMATS["bf16"])
    model = parse_model_config(_without_quantisation(_read_config(Path(folder))))
    if chosen is None:
        headers = _headers(Path(folder))
        chosen = stored_format(checkpoint_tensors(model) | mtp_tensors(model), headers)
    return ModelSource(folder, model, chosen)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model: found no readable {path} ({error}), expected a checkpoint's folder, or {RELEASED!r} for the "
            "released model. Change the flag."
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: found no JSON object, expected a checkpoint's configuration. Change --model.")
    return config


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's shape is the same whatever its weights are stored in."""
    return {name: value for name, value in text_model_config(config).items() if name != "quantization_config"}


def _headers(folder: Path) -> dict[str, StoredTensor]:
    headers = read_headers(sorted(folder.glob("*.safetensors")))
    return {rename(name, HUB_PREFIXES): tensor for name, tensor in headers.items()}
