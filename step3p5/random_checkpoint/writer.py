"""Writes a complete random checkpoint, a slab of a tensor at a time, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from step3p5.checkpoint_tensors import CheckpointDtype, TensorSpec, checkpoint_tensors, mtp_tensors
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.hub_config import hub_config, hub_generation_config
from step3p5.random_checkpoint.predictable import RING_TOKENS, TokenRing, make_predictable
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.random_checkpoint.random_values import SLAB_ELEMENTS, quantile_table, random_words, slabs
from step3p5.random_checkpoint.scales import distribution
from step3p5.random_checkpoint.shards import INDEX_NAME, Shard, ShardTensor, index_json, plan_shards
from step3p5.random_checkpoint.tokenizer import CONTROL_TOKENS, tokenizer_files


class RandomCheckpointError(Exception):
    """A random checkpoint cannot be written as asked; the message is one line that says what to change."""


@dataclass(frozen=True)
class CheckpointSummary:
    """What was written: tensors, parameters (MTP included), safetensors files and their bytes."""

    num_tensors: int
    num_parameters: int
    num_shards: int
    num_bytes: int


def write_random_checkpoint(
    out: Path,
    preset: str,
    num_layers: int | None = None,
    dtype: CheckpointDtype = CheckpointDtype.FLOAT32,
    seed: int = 0,
    predictable: float | None = None,
) -> CheckpointSummary:
    """Write a checkpoint of the first `num_layers` layers (default all) of `preset`, with its MTP layers, to `out`.

    With `predictable`, 0 to 1, its next tokens can be predicted, and each MTP layer drafts what the decoder will choose
    at about that rate; how is said in `predictable.py`.


    The same arguments give the same bytes. Values come from `scales`; a bfloat16 checkpoint is the float32 one rounded.
    Everything goes to `<out>.partial` first, which is renamed when complete and removed on any exception.

    Raises:
        RandomCheckpointError: `out` is in use, `num_layers` or `predictable` is out of range, or the disk is too full.
            Nothing is written then.
        OSError: writing failed. What was written is removed.
    """
    shape = PRESETS[preset]
    if num_layers is None:
        num_layers = shape.num_hidden_layers
    if not 1 <= num_layers <= shape.num_hidden_layers:
        raise RandomCheckpointError(
            f"--layers is {num_layers}, but preset {preset} has {shape.num_hidden_layers} layers: "
            f"choose from 1 to {shape.num_hidden_layers}"
        )
    if predictable is not None and not 0 <= predictable <= 1:
        raise RandomCheckpointError(f"--predictable is {predictable}, but it is a rate: choose from 0 to 1")
    out = out.resolve()
    _require_free(out)
    config = hub_config(shape, num_layers, dtype)
    model = parse_model_config(config)
    tensors: Mapping[str, TensorSpec] = checkpoint_tensors(model) | mtp_tensors(model)
    shards = plan_shards(tensors, dtype, shape.shard_bytes)
    texts = {
        "config.json": _json(config),
        "generation_config.json": _json(hub_generation_config(shape)),
        INDEX_NAME: _json(index_json(shards)),
        **tokenizer_files(shape.first_role_token_id, shape.max_position_embeddings),
    }
    num_bytes = sum(shard.num_bytes for shard in shards)
    _require_space(out, num_bytes + sum(len(text.encode()) for text in texts.values()))
    with _staging_folder(out) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        with (
            ThreadPoolExecutor(os.cpu_count()) as executor,
            tqdm(total=num_bytes, unit="B", unit_scale=True, file=sys.stderr, disable=None) as progress,
        ):
            for shard in shards:
                for written in _write_shard(shard, folder, seed, executor):
                    progress.update(written)
        if predictable is not None:
            first = len(CONTROL_TOKENS)
            ring = TokenRing(first, min(shape.first_role_token_id, first + RING_TOKENS))
            make_predictable(folder, shards, ring, predictable, seed)
    return CheckpointSummary(
        num_tensors=len(tensors),
        num_parameters=sum(spec.num_elements for spec in tensors.values()),
        num_shards=len(shards),
        num_bytes=num_bytes,
    )


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _require_free(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise RandomCheckpointError(f"{out} is a folder with files in it: name a new or empty one")
    elif out.exists():
        raise RandomCheckpointError(f"{out} is a file: name a new or empty folder")


def _require_space(out: Path, num_bytes: int) -> None:
    existing = next(folder for folder in out.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise RandomCheckpointError(
            f"the checkpoint takes {num_bytes / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free: "
            "free some space, or choose fewer --layers or --dtype bfloat16"
        )


@contextmanager
def _staging_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` when the block ends, and vanishes if it raises."""
    folder = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        raise RandomCheckpointError(
            f"{folder} exists: another run is writing there, or one was killed; remove it if none is running"
        ) from None
    try:
        yield folder
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_shard(shard: Shard, folder: Path, seed: int, executor: Executor) -> Iterator[int]:
    """Write one file; yields the bytes done since the last yield, `shard.num_bytes` in all."""
    with shard.create(folder).open("r+b") as file:
        yield len(shard.header)
        for tensor in shard.tensors:
            yield from _fill(file.fileno(), tensor, seed, executor)


def _fill(descriptor: int, tensor: ShardTensor, seed: int, executor: Executor) -> Iterator[int]:
    table = quantile_table(distribution(tensor.spec), tensor.dtype)

    def fill_slab(slab: tuple[int, int]) -> int:
        index, length = slab
        values = table.take(random_words(seed, tensor.name, index, length)).view(np.uint8).data
        return _write_at(descriptor, values, tensor.offset + index * SLAB_ELEMENTS * tensor.dtype.itemsize)

    yield from executor.map(fill_slab, slabs(tensor.spec.num_elements))


def _write_at(descriptor: int, data: memoryview, offset: int) -> int:
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
    return written
