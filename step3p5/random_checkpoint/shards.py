"""Sharded safetensors files laid out before a single value exists, so that tensors can be filled in any order.

Format: https://github.com/huggingface/safetensors#format — eight bytes of header length, a JSON header padded with
spaces, then the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from step3p5.checkpoint_tensors import CheckpointDtype, TensorSpec

INDEX_NAME = "model.safetensors.index.json"

_DTYPE_CODES = {CheckpointDtype.FLOAT32: "F32", CheckpointDtype.BFLOAT16: "BF16"}
_HEADER_ALIGNMENT = 64


@dataclass(frozen=True)
class ShardTensor:
    """One tensor of a shard; `offset` is its first byte in the file."""

    name: str
    spec: TensorSpec
    dtype: CheckpointDtype
    offset: int


@dataclass(frozen=True)
class Shard:
    """One file: its complete header (length prefix included) and where each tensor goes."""

    file_name: str
    header: bytes
    tensors: tuple[ShardTensor, ...]
    num_bytes: int

    def create(self, folder: Path) -> Path:
        """Write the header to a new file of full length in `folder`; the tensors' bytes are zero until filled."""
        path = folder / self.file_name
        with path.open("xb") as file:
            file.write(self.header)
            file.truncate(self.num_bytes)
        return path


def plan_shards(tensors: Mapping[str, TensorSpec], dtype: CheckpointDtype, max_shard_bytes: int) -> tuple[Shard, ...]:
    """Split `tensors` in order into shards of at most `max_shard_bytes` of data; a larger tensor is a shard alone."""
    groups: list[dict[str, TensorSpec]] = [{}]
    room = max_shard_bytes
    for name, spec in tensors.items():
        size = spec.num_bytes(dtype)
        if groups[-1] and size > room:
            groups.append({})
            room = max_shard_bytes
        groups[-1][name] = spec
        room -= size
    return tuple(
        _lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, dtype)
        for number, group in enumerate(groups, start=1)
    )


def index_json(shards: tuple[Shard, ...]) -> dict[str, object]:
    """The contents of `model.safetensors.index.json`."""
    placed = [(shard.file_name, tensor) for shard in shards for tensor in shard.tensors]
    return {
        "metadata": {"total_size": sum(tensor.spec.num_elements * tensor.dtype.itemsize for _, tensor in placed)},
        "weight_map": {tensor.name: file_name for file_name, tensor in placed},
    }


def _lay_out(file_name: str, tensors: Mapping[str, TensorSpec], dtype: CheckpointDtype) -> Shard:
    # Wider elements first keeps every tensor aligned to its own element size.
    in_order = sorted(tensors.items(), key=lambda item: -item[1].dtype(dtype).itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: list[int] = []
    end = 0
    for name, spec in in_order:
        begins.append(end)
        end += spec.num_bytes(dtype)
        entries[name] = {
            "dtype": _DTYPE_CODES[spec.dtype(dtype)],
            "shape": list(spec.shape),
            "data_offsets": [begins[-1], end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _HEADER_ALIGNMENT)
    header = struct.pack("<Q", len(header)) + header
    placed = tuple(
        ShardTensor(name, spec, spec.dtype(dtype), len(header) + begin)
        for (name, spec), begin in zip(in_order, begins, strict=True)
    )
    return Shard(file_name, header, placed, len(header) + end)
