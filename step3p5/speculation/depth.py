"""How deep a checkpoint can draft."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from max.pipelines.lib import PipelineConfig
from max.pipelines.speculative.config import SpeculativeConfig
from transformers import PreTrainedConfig

from ..checkpoint_files import check_specs, layer_tensors, read_headers
from ..checkpoint_tensors import mtp_layer_tensors
from ..config_fields import ConfigError
from ..layer_config import LayerConfig, ModelConfig
from ..pretrained_config import as_step3p5_config

logger = logging.getLogger("max.pipelines")

UNSUPPORTED: Mapping[str, Callable[[SpeculativeConfig], object]] = {
    "use-relaxed-acceptance-for-thinking": lambda config: config.use_relaxed_acceptance_for_thinking or None,
    "synthetic-acceptance-rate": lambda config: config.synthetic_acceptance_rate,
    "draft-proposal": lambda config: config.draft_proposal if config.draft_proposal != "argmax" else None,
}
"""Flags of MAX's that are refused, and what was given for them."""


def requested_depth(speculative: SpeculativeConfig, huggingface_config: PreTrainedConfig, _draft: Any = None) -> int:
    """`--num-speculative-tokens` as far as the checkpoint has MTP layers; all of them where it is not given.

    Raises:
        ConfigError: An option is set that would change what is generated, or that this speculation does not have.
    """
    for flag, found in UNSUPPORTED.items():
        if (value := found(speculative)) is not None:
            raise ConfigError(
                f"--{flag}: found {value}, expected it unset: with --speculative-method mtp this model emits what it "
                "would have emitted without, and drafts greedily. Remove the flag."
            )
    layers = len(as_step3p5_config(huggingface_config).model_config.mtp_layers)
    asked = speculative.num_speculative_tokens
    if asked is None or "num_speculative_tokens" not in speculative.model_fields_set:
        return layers
    if layers and asked > layers:  # without any, the model says so once it knows its tensors
        logger.warning(
            "--num-speculative-tokens: found %d, but config.json names %d MTP layers (num_nextn_predict_layers). "
            "Drafting %d deep.",
            asked,
            layers,
            layers,
        )
    return min(asked, layers)


def drafting_layers(pipeline_config: PipelineConfig, model: ModelConfig) -> tuple[LayerConfig, ...]:
    """The MTP layers that draft under `pipeline_config`: the first ones, as many as asked for and complete.

    Raises:
        CheckpointError: a local checkpoint holds such a layer, but not in the shape that its configuration says.
    """
    speculative = pipeline_config.speculative
    if speculative is None or not speculative.is_mtp():
        return ()
    layers = model.mtp_layers[: speculative.num_speculative_tokens]
    config = pipeline_config.model
    if config.weight_path and config.huggingface_weight_repo.repo_type == "local":
        layers = stored_layers(read_headers(config.resolved_weight_paths()), model, layers)
    return layers


def stored_layers(
    tensors: Mapping[str, Any], model: ModelConfig, layers: Sequence[LayerConfig]
) -> tuple[LayerConfig, ...]:
    """Those of `layers` before the first of which `tensors`, by their names in the files, holds nothing.

    Raises:
        CheckpointError: a layer is there in part, or its tensors are not of the shape and type to be expected.
    """
    found = []
    for layer in layers:
        own = layer_tensors(tensors, layer)
        if not own:
            break
        check_specs(own, mtp_layer_tensors(model, layer))
        found.append(layer)
    return tuple(found)
