"""Turns a random checkpoint into one whose next token can be predicted, by the target and by its MTP layers alike.

The first text tokens (those behind the control tokens, `RING_TOKENS` at most: a text has but a part of a large
vocabulary) form one ring: after a token comes the one `stride` places on. The
target's head gets, as its row for a token, the embedding of the token before it on the ring. The last token's
embedding is still the largest part of the final hidden state, random layers or not, so that row wins: the target
follows the ring. `eh_proj` passes the next token's embedding on unchanged, beside the random image of the hidden
state, and every depth's own head gets the same rows, so the drafts follow the ring too. Except that each depth keeps
the random row for a share of `1 - agreement` of the tokens, drawn independently for each depth: there its draft is a
token of chance. Along the ring a draft of any depth, given that those before it were right, is therefore right at the
rate `agreement`. Attention, router and experts stay random and do their full work.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole
from step3p5.random_checkpoint.random_values import bfloat16_bits, random_words
from step3p5.random_checkpoint.scales import distribution
from step3p5.random_checkpoint.shards import Shard, ShardTensor

EMBEDDING = "model.embed_tokens.weight"
TARGET_HEAD = "lm_head.weight"
RING_STRENGTH = 0.5
"""Size of a ring row beside a random one: the ring decides nearly every greedy choice, but does not make it certain."""

RING_TOKENS = 8192
"""Most tokens of the ring, and of those that a text has."""

_ROWS_AT_A_TIME = 512
_GOLDEN_RATIO = 0.618


class TokenRing:
    """The tokens `first … end - 1` in the order in which they follow one another."""

    def __init__(self, first: int, end: int) -> None:
        self.first, self.size = first, end - first
        stride = max(1, int(_GOLDEN_RATIO * self.size))
        while math.gcd(stride, self.size) != 1:
            stride += 1
        self.stride = stride

    def following(self, token: int) -> int:
        """The token after `token`."""
        return self.first + (token - self.first + self.stride) % self.size

    def preceding(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The token before each of `tokens`."""
        return self.first + (tokens - self.first - self.stride) % self.size


def make_predictable(folder: Path, shards: Sequence[Shard], ring: TokenRing, agreement: float, seed: int) -> None:
    """Overwrites heads and MTP projections of the complete shards in `folder`.

    Args:
        folder: Holds the shards' files, filled with random values.
        shards: Their layout.
        ring: Which token follows which.
        agreement: The share of tokens for which each depth drafts what the target will choose, 0 to 1.
        seed: Chooses the other tokens.
    """
    placed = {tensor.name: (folder / shard.file_name, tensor) for shard in shards for tensor in shard.tensors}
    embedding = _read_matrix(*placed[EMBEDDING])
    for name, (path, tensor) in placed.items():
        if tensor.spec.role is TensorRole.LM_HEAD:
            tokens = np.arange(ring.first, ring.first + ring.size)
            if name != TARGET_HEAD:
                tokens = tokens[_uniform(seed, name, len(tokens)) < agreement]
            _write_rows(path, tensor, tokens, embedding, ring)
        elif tensor.spec.role is TensorRole.MTP_PROJECTION:
            _write_identity(path, tensor)


def _uniform(seed: int, tensor: str, length: int) -> npt.NDArray[np.float64]:
    return random_words(seed, f"{tensor}/agreement", 0, length) / (1 << 16)


def _read_matrix(path: Path, tensor: ShardTensor) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    element = np.float32 if tensor.dtype is CheckpointDtype.FLOAT32 else np.uint16
    return np.memmap(path, dtype=element, mode="r", offset=tensor.offset, shape=tensor.spec.shape)


def _write_rows(
    path: Path,
    tensor: ShardTensor,
    tokens: npt.NDArray[np.int64],
    embedding: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    ring: TokenRing,
) -> None:
    """Gives the head's rows of `tokens`, ascending, the embedding of the tokens before them at the head's own scale."""
    # The embedding has unit variance.
    scale = np.float32(RING_STRENGTH * distribution(tensor.spec).std)
    row_bytes = tensor.spec.shape[1] * tensor.dtype.itemsize
    scaled = _scaled_bits(scale)

    def write_block(block: npt.NDArray[np.int64]) -> None:
        stored = embedding.take(ring.preceding(block), axis=0)
        rows = stored * scale if tensor.dtype is CheckpointDtype.FLOAT32 else scaled.take(stored.astype(np.intp))
        ends = [*(np.flatnonzero(np.diff(block) != 1) + 1), len(block)]
        for start, end in zip([0, *ends], ends, strict=False):
            os.pwrite(file.fileno(), rows[start:end].data, tensor.offset + int(block[start]) * row_bytes)

    with path.open("r+b") as file, ThreadPoolExecutor(os.cpu_count()) as executor:
        blocks = [tokens[start : start + _ROWS_AT_A_TIME] for start in range(0, len(tokens), _ROWS_AT_A_TIME)]
        deque(executor.map(write_block, blocks), maxlen=0)


def _scaled_bits(scale: np.float32) -> npt.NDArray[np.uint16]:
    """What each of the 65536 bfloat16 bit patterns becomes when it is multiplied by `scale`."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bfloat16_bits((np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32) * scale)


def _write_identity(path: Path, tensor: ShardTensor) -> None:
    """Makes the left half of `[hidden_size, 2 hidden_size]`, which reads the token's embedding, the identity."""
    hidden_size, width = tensor.spec.shape
    row_bytes = width * tensor.dtype.itemsize
    with path.open("r+b") as file:
        for index in range(hidden_size):
            unit = np.zeros(hidden_size, dtype=np.float32)
            unit[index] = 1.0
            os.pwrite(file.fileno(), _encode(unit, tensor.dtype).tobytes(), tensor.offset + index * row_bytes)


def _encode(
    values: npt.NDArray[np.float32], dtype: CheckpointDtype
) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    return values if dtype is CheckpointDtype.FLOAT32 else bfloat16_bits(np.ascontiguousarray(values))
