"""From a checkpoint's tensors to the graph's weights: one table of renames, cast only where the type must change."""

from __future__ import annotations

import logging
import math
from typing import Any

from max.driver import Buffer
from max.graph.weights import WeightData, Weights
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.config.model_config import _select_quantization_encoding
from max.pipelines.modeling.config_enums import supported_encoding_dtype
from transformers import AutoConfig

from . import huge_pages
from .checkpoint_files import StoredTensor, check_specs, check_tensors, decoder_tensors, layer_tensors, rename
from .checkpoint_tensors import checkpoint_tensors, mtp_layer_tensors
from .mapped_files import MappedFiles
from .model_config import Step3p5Config, device_refs
from .precision import weight_dtype
from .pretrained_config import as_step3p5_config
from .progress import with_progress
from .speculation.depth import drafting_layers

logger = logging.getLogger("max.pipelines")

GRAPH_PREFIXES = (("model.", ""),)
"""Checkpoint name to graph name."""


def convert_safetensor_state_dict(
    state_dict: dict[str, Weights],
    huggingface_config: AutoConfig,
    pipeline_config: PipelineConfig,
    **_: Any,
) -> dict[str, WeightData]:
    """Checks and renames a checkpoint's tensors; the data stays mapped from the files unless its type must change.

    Args:
        state_dict: The checkpoint's tensors by hub name.
        huggingface_config: The checkpoint's configuration.
        pipeline_config: Says in which encoding to run.

    Returns:
        The weights by graph name: the decoder's, and those of the MTP layers that draft.

    Raises:
        CheckpointError: If a tensor is missing, unknown, or of another shape or type than the configuration says.
    """
    model = as_step3p5_config(huggingface_config).model_config
    weights = {name: weight.data() for name, weight in decoder_tensors(state_dict, model).items()}
    check_tensors({name: _stored(data) for name, data in weights.items()}, model)
    specs = checkpoint_tensors(model)
    for layer in drafting_layers(pipeline_config, model):
        own = {name: weight.data() for name, weight in layer_tensors(state_dict, layer).items()}
        check_specs({name: _stored(data) for name, data in own.items()}, mtp_layer_tensors(model, layer))
        weights |= own
        specs |= mtp_layer_tensors(model, layer)
    encoding = _select_quantization_encoding(pipeline_config.model, Step3p5Config.DEFAULT_ENCODING)
    device = device_refs(pipeline_config.model)[0]
    dtypes = {name: weight_dtype(specs[name].role, supported_encoding_dtype(encoding), device) for name in weights}
    casts = [name for name, data in weights.items() if data.dtype != dtypes[name]]
    if casts:
        logger.info("Casting %d of %d tensors to run in %s.", len(casts), len(weights), encoding)
    files = MappedFiles()
    for name in with_progress(casts, lambda name: _num_bytes(weights[name]), f"Casting to {encoding}"):
        stored, weights[name] = weights[name], weights[name].astype(dtypes[name])
        files.release(host_buffer(stored))
    if device.is_cpu():
        huge_pages.collapse(host_buffer(weights[name]) for name in casts)
    return {rename(name, GRAPH_PREFIXES): data for name, data in weights.items()}


def host_buffer(data: WeightData) -> Buffer:
    """The tensor's memory on the host."""
    return data.data if isinstance(data.data, Buffer) else Buffer.from_dlpack(data.data)


def _stored(data: WeightData) -> StoredTensor:
    return StoredTensor(tuple(int(dim) for dim in data.shape), data.dtype.name)


def _num_bytes(data: WeightData) -> int:
    return math.prod(_stored(data).shape) * data.dtype.size_in_bytes
