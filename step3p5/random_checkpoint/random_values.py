"""Fast, reproducible normal random numbers in a checkpoint's storage format.

A 16-bit random word indexes a table of the normal distribution's 65,536 midpoint quantiles, already scaled and rounded
to the storage dtype: one random 64-bit word gives four elements, and bfloat16 costs no conversion. An element depends
on the seed, the tensor's name and its position only, so neither threads nor the order of tensors show in the bytes, and
a bfloat16 tensor is the rounded float32 tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.scales import NormalDistribution

SLAB_ELEMENTS = 1 << 18
"""Elements generated at a time, few enough to stay in cache. Another value gives other bytes for the same seed."""

_WORDS = 1 << 16


@cache
def _normal_quantiles() -> npt.NDArray[np.float64]:
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / _WORDS) for i in range(_WORDS // 2, _WORDS)])
    return np.concatenate([-upper[::-1], upper])


def quantile_table(
    distribution: NormalDistribution, dtype: CheckpointDtype
) -> npt.NDArray[np.float32] | npt.NDArray[np.uint16]:
    """The values that elements of `distribution` can take: `[65536]`, float32 or the bit patterns of bfloat16."""
    values = (distribution.mean + distribution.std * _normal_quantiles()).astype(np.float32)
    return values if dtype is CheckpointDtype.FLOAT32 else bfloat16_bits(values)


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bfloat16 bit patterns nearest to finite float32 `values`, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def slabs(num_elements: int) -> Iterator[tuple[int, int]]:
    """`(index, length)` of each slab of a tensor of `num_elements` elements."""
    for index, start in enumerate(range(0, num_elements, SLAB_ELEMENTS)):
        yield index, min(SLAB_ELEMENTS, num_elements - start)


def random_words(seed: int, tensor: str, slab: int, length: int) -> npt.NDArray[np.uint16]:
    """`[length]` uniform 16-bit words, a function of the arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{tensor}/{slab}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
    words = generator.integers(0, 2**64 - 1, -(-length // 4), dtype=np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view("<u2")[:length]
