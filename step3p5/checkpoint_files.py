"""What a checkpoint's safetensors files hold, from their headers alone, against what `config.json` says they should.

Format: https://github.com/huggingface/safetensors#format: eight bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from step3p5.checkpoint_tensors import CheckpointDtype, TensorSpec, checkpoint_tensors
from step3p5.layer_config import LayerConfig, ModelConfig

INDEX_NAME = "model.safetensors.index.json"

MAX_HEADER_BYTES = 100_000_000
"""The most that the format allows; a text file's first bytes read as a far larger number."""

HUB_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)
"""Where multimodal checkpoints keep the text model, and where this model's own tensors would stand."""

_DTYPES = {"F32": CheckpointDtype.FLOAT32, "BF16": CheckpointDtype.BFLOAT16}

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint's weights are not what its `config.json` says; the message names file or tensor and the remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor as stored; the dtype spelled as in `torch_dtype` where the model can use it."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the safetensors files `paths` by its name in the file; no tensor data is read.

    Raises:
        CheckpointError: a file that the index beside it names is missing, a file is truncated or no safetensors file,
            or two files hold the same tensor.
    """
    for folder in sorted({path.parent for path in paths}):
        _check_index(folder, {path.name for path in paths if path.parent == folder})
    tensors: dict[str, StoredTensor] = {}
    holders: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _read_header(path).items():
            if name in holders:
                _fail(
                    f"tensor {name}",
                    f"one in {holders[name].name} and one in {path.name}",
                    "one in all",
                    "Remove the wrong file, or name the right ones with --weight-path.",
                )
            tensors[name], holders[name] = tensor, path
    return tensors


def decoder_tensors(tensors: Mapping[str, T], model: ModelConfig) -> dict[str, T]:
    """`tensors` by this model's hub names: multimodal prefixes removed, MTP layers left out."""
    mtp = tuple(f"model.layers.{layer.index}." for layer in model.mtp_layers)
    return {name: tensor for name, tensor in _hub_names(tensors).items() if not name.startswith(mtp)}


def layer_tensors(tensors: Mapping[str, T], layer: LayerConfig) -> dict[str, T]:
    """Those of `tensors` that belong to `layer`, by hub name."""
    prefix = f"model.layers.{layer.index}."
    return {name: tensor for name, tensor in _hub_names(tensors).items() if name.startswith(prefix)}


def check_tensors(decoder: Mapping[str, StoredTensor], model: ModelConfig) -> None:
    """Holds the decoder's stored tensors, by hub name, to what `model` needs.

    Raises:
        CheckpointError: the first tensor found missing, unknown, misshapen or of a dtype that the model cannot use.
    """
    check_specs(decoder, checkpoint_tensors(model))


def check_specs(tensors: Mapping[str, StoredTensor], expected: Mapping[str, TensorSpec]) -> None:
    """Holds stored `tensors`, by hub name, to the `expected` ones.

    Raises:
        CheckpointError: the first tensor found missing, unknown, misshapen or of a dtype that the model cannot use.
    """
    missing = [name for name in expected if name not in tensors]
    if missing:
        _fail(
            f"tensor {missing[0]}",
            f"none of that name in the checkpoint ({len(missing)} missing in all)",
            f"shape {list(expected[missing[0]].shape)}",
            "Complete the checkpoint, or correct config.json if it belongs to other weights.",
        )
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        _fail(
            f"tensor {unknown[0]}",
            f"one of that name in the checkpoint ({len(unknown)} unknown in all)",
            "none from config.json",
            "Check that config.json belongs to these weights: num_hidden_layers, moe_layers_enum, use_qk_norm, ...",
        )
    for name, spec in expected.items():
        stored = tensors[name]
        if stored.shape != spec.shape:
            _fail(
                f"tensor {name}",
                f"shape {list(stored.shape)}",
                f"{list(spec.shape)} from config.json",
                "Check that config.json belongs to these weights.",
            )
        if stored.dtype not in set(CheckpointDtype):
            _fail(
                f"tensor {name}",
                f"dtype {stored.dtype}",
                " or ".join(CheckpointDtype),
                "Use the unquantised checkpoint.",
            )


def _hub_names(tensors: Mapping[str, T]) -> dict[str, T]:
    return {rename(name, HUB_PREFIXES): tensor for name, tensor in tensors.items()}


def rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """`name` with the first of `prefixes` (before, after) that it starts with replaced."""
    for before, after in prefixes:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _check_index(folder: Path, given: set[str]) -> None:
    """Every shard of the folder's index must be there, if the files `given` are shards of it."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return
    try:
        shards = set(json.loads(path.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        _fail(str(path), "no weight_map", "a JSON object that has it", "Download the file again.")
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing and not shards.isdisjoint(given):
        _fail(
            str(path),
            f"shard {missing[0]} missing from the folder ({len(missing)} missing in all)",
            f"all {len(shards)} shards beside it",
            "Download the missing ones.",
        )


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > MAX_HEADER_BYTES:
            _fail(
                str(path),
                f"a file that begins with {prefix!r}",
                "a safetensors file",
                "Download the file again (a Git LFS pointer: run `git lfs pull`).",
            )
        header = file.read(header_bytes)
    if len(prefix) < 8 or len(header) < header_bytes:
        _fail_truncated(path, size, f"at least {8 + header_bytes} bytes")
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(tuple(map(int, entry["shape"])), _DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in entries.items()
        }
        data_bytes = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        _fail(str(path), "a damaged header", "a safetensors file", "Download the file again.")
    if size != 8 + header_bytes + data_bytes:
        _fail_truncated(path, size, f"{8 + header_bytes + data_bytes} bytes by its header")
    return tensors


def _fail_truncated(path: Path, size: int, expected: str) -> NoReturn:
    _fail(str(path), f"{size} bytes", expected, "Download the file again.")


def _fail(name: str, found: str, expected: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{name}: found {found}, expected {expected}. {remedy}")
