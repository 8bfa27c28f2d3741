"""From a checkpoint's tensors to the graph's weights: one table of renames, one check against the table of shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from max.dtype import DType
from max.graph.weights import WeightData, Weights
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.config.model_config import _select_quantization_encoding
from max.pipelines.modeling.config_enums import supported_encoding_dtype
from transformers import AutoConfig

from .checkpoint_tensors import CheckpointDtype, TensorSpec, checkpoint_tensors
from .config_fields import ConfigError
from .layer_config import ModelConfig
from .model_config import Step3p5Config
from .pretrained_config import as_step3p5_config

HUB_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
"""Where multimodal checkpoints keep the text model, and where this model's own tensors would stand."""

GRAPH_PREFIXES = (("model.", ""),)
"""Checkpoint name to graph name."""

STORED_DTYPES = {DType.float32: CheckpointDtype.FLOAT32, DType.bfloat16: CheckpointDtype.BFLOAT16}


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
        The decoder's weights by graph name. MTP tensors are left out.

    Raises:
        ConfigError: If a tensor is missing, unknown, or of another shape or type than the configuration says.
    """
    model = as_step3p5_config(huggingface_config).model_config
    tensors = {_rename(name, HUB_PREFIXES): weight.data() for name, weight in state_dict.items()}
    expected = checkpoint_tensors(model)
    decoder = {name: data for name, data in tensors.items() if not _is_mtp(name, model)}
    check_tensors(decoder, expected)
    encoding = _select_quantization_encoding(pipeline_config.model, Step3p5Config.DEFAULT_ENCODING)
    run_dtype = STORED_DTYPES[supported_encoding_dtype(encoding)]
    return {_rename(name, GRAPH_PREFIXES): _cast(data, expected[name], run_dtype) for name, data in decoder.items()}


def check_tensors(tensors: Mapping[str, WeightData], expected: Mapping[str, TensorSpec]) -> None:
    """Holds a checkpoint's tensors against the table of shapes; the first fault raises `ConfigError`."""
    for name in expected.keys() - tensors.keys():
        raise ConfigError(
            f"tensor {name}: missing from the checkpoint, expected shape {list(expected[name].shape)} "
            f"({len(expected.keys() - tensors.keys())} missing in all); check that every shard of the index is there"
        )
    for name in tensors.keys() - expected.keys():
        raise ConfigError(
            f"tensor {name}: found in the checkpoint, but config.json describes no such tensor "
            f"({len(tensors.keys() - expected.keys())} unknown in all); check num_hidden_layers, moe_layers_enum and "
            "the switches of config.json"
        )
    for name, spec in expected.items():
        data = tensors[name]
        shape = tuple(int(dim) for dim in data.shape)
        if shape != spec.shape:
            raise ConfigError(
                f"tensor {name}: found shape {list(shape)}, expected {list(spec.shape)} from config.json; check that "
                "config.json belongs to these weights"
            )
        if data.dtype not in STORED_DTYPES:
            raise ConfigError(
                f"tensor {name}: found dtype {data.dtype.name}, expected one of "
                f"{', '.join(sorted(dtype.name for dtype in STORED_DTYPES))}; convert the checkpoint"
            )


def _cast(data: WeightData, spec: TensorSpec, run_dtype: CheckpointDtype) -> WeightData:
    dtype = DType[spec.dtype(run_dtype).value]
    return data if data.dtype == dtype else data.astype(dtype)


def _is_mtp(name: str, model: ModelConfig) -> bool:
    return any(name.startswith(f"model.layers.{layer.index}.") for layer in model.mtp_layers)


def _rename(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for before, after in prefixes:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name
