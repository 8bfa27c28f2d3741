"""Partial rotary embedding: frequencies in Python, once; the per-forward table as a custom op.

A frequency is handed to the kernel as the fraction of a turn that one position advances, in units of 2^-64 turns, so
that `position * frequency` modulo a turn is exact for any context length and no table over positions is kept.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from max.dtype import DType
from max.graph import TensorType, TensorValue, ops

from ..custom_ops import custom_op
from ..layer_config import Llama3Scaling, RopeConfig

ONE_TURN = 1 << 64


def rotary_frequencies(rope: RopeConfig) -> npt.NDArray[np.float64]:
    """Radians a position, `[rotary_dim / 2]` float64: `theta^(-2i / rotary_dim)`, then smoothed."""
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float64) / rope.rotary_dim
    frequencies = rope.theta**-exponents
    return frequencies if rope.scaling is None else llama3_smoothing(frequencies, rope.scaling)


def llama3_smoothing(frequencies: npt.NDArray[np.float64], scaling: Llama3Scaling) -> npt.NDArray[np.float64]:
    """Llama-3's context extension: long wavelengths are slowed by `factor`, short ones kept, the rest blended.

    Source: `rope_type: llama3` of transformers' `modeling_rope_utils`.
    """
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def turns_per_position(rope: RopeConfig) -> npt.NDArray[np.uint64]:
    """The frequencies in units of 2^-64 turns a position, `[rotary_dim / 2]` uint64."""
    turns = rotary_frequencies(rope) / (2 * math.pi)
    return np.array([round(turn * ONE_TURN) % ONE_TURN for turn in turns.tolist()], dtype=np.uint64)


def rope_table(
    rope: RopeConfig, tokens: TensorValue, input_row_offsets: TensorValue, cache_lengths: TensorValue
) -> TensorValue:
    """Cosines and sines of a ragged batch's positions, once per forward and kind of layer.

    Args:
        rope: The layers' rotary embedding.
        tokens: `[total_seq_len]`, for its length only.
        input_row_offsets: `[batch + 1]` uint32.
        cache_lengths: `[batch]` uint32; a request's first token stands at this position.

    Returns:
        `[total_seq_len, rotary_dim]` float32: the cosines, then the sines, of `rotary_dim / 2` angles.
    """
    device = tokens.device
    turns = ops.constant(turns_per_position(rope), DType.uint64, device=device)
    table_type = TensorType(DType.float32, (tokens.shape[0], rope.rotary_dim), device)
    return custom_op("step3p5_rope_table", device, [input_row_offsets, cache_lengths, turns], [table_type])[0]
