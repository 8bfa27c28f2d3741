"""The Mojo ops around attention against numpy in float64: four projections, and heads on their way into the cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import Buffer
from max.dtype import DType
from max.engine import Model
from max.graph import BufferType, DeviceRef, TensorType, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues
from small_graphs import Ops, graph_of

from step3p5 import attention_kernels, kernels

Array = npt.NDArray[Any]
HEAD_DIM, QUERY_HEADS, KEY_HEADS, PAGE_SIZE, LAYERS, ROTARY_DIM = 10, 6, 2, 4, 3, 6
EPS = 1e-5


def tensor(*shape: str | int, dtype: DType = DType.float32) -> TensorType:
    return TensorType(dtype, shape, DeviceRef.CPU())


QKV_CASES = {"all": (True, True), "no_norm": (False, True), "no_rope": (True, False)}
"""Whether queries and keys are normed, and whether they are rotated."""


def linear4_types() -> list[TensorType | BufferType]:
    return [tensor("T", "K"), *(tensor(f"N{i}", f"K{i}") for i in range(4))]


def heads_types() -> list[TensorType | BufferType]:
    query, key = QUERY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM
    return [
        *(tensor("T", size) for size in (query, key, key)),
        *(tensor(HEAD_DIM) for _ in range(2)),
        tensor("T", ROTARY_DIM),
        tensor("R1", dtype=DType.uint32),
        BufferType(DType.float32, ["P", 2, LAYERS, PAGE_SIZE, KEY_HEADS, HEAD_DIM], DeviceRef.CPU()),
        tensor(1, dtype=DType.int64),
        tensor("R", dtype=DType.uint32),
        tensor("R", "M", dtype=DType.uint32),
        tensor(dtype=DType.uint32),
    ]


def heads(*values: Any, normalize: bool, rotate: bool) -> list[TensorValue]:
    q, k, v, q_weight, k_weight, table, offsets, blocks, stride, lengths, lookup, layer = values
    most = ops.constant([1], DType.uint32, device=DeviceRef.CPU())
    cache = PagedCacheValues(
        kv_blocks=blocks,
        cache_lengths=lengths,
        lookup_table=lookup,
        max_prompt_length=most,
        max_cache_length=most,
        page_stride=stride,
    )
    norm = attention_kernels.HeadNorm(q_weight, k_weight, EPS, 1.0) if normalize else None
    return [attention_kernels.qkv(q, k, v, norm, table if rotate else None, offsets, cache, layer)]


GRAPHS = {
    "attention_linear4": graph_of(kernels.linear4, linear4_types()),
    **{
        f"attention_{name}": graph_of(partial(heads, normalize=normalize, rotate=rotate), heads_types())
        for name, (normalize, rotate) in QKV_CASES.items()
    },
}


@pytest.fixture(scope="session")
def compiled(small_models: Mapping[str, Model]) -> Ops:
    return Ops(small_models, "attention")


@pytest.mark.parametrize("tokens", [1, 7, 8, 100])
@pytest.mark.parametrize("sizes", [(48, 8, 8, 3), (1, 1, 1, 1), (7, 300, 13, 64)])
def test_four_matrices_at_once(compiled: Ops, tokens: int, sizes: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.standard_normal((tokens, 37), np.float32)
    matrices = [rng.standard_normal((size, 37), np.float32) for size in sizes]
    for found, w in zip(compiled.run("linear4", x, *matrices), matrices, strict=True):
        np.testing.assert_allclose(found, x.astype(np.float64) @ w.T, rtol=0, atol=1e-5)


def test_a_matrix_of_another_depth_is_named(compiled: Ops) -> None:
    x, fits, misfit = np.zeros((1, 5), np.float32), np.zeros((2, 5), np.float32), np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"w2\[N, K\] dim K is 4, the other operands imply 5"):
        compiled.run("linear4", x, fits, fits, misfit, fits)


def normed(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (1 + weight)


def rotated(x: Array, table: Array) -> Array:
    half = table.shape[1] // 2
    cosines, sines = table[:, None, :half], table[:, None, half:]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines, rest], -1)


@pytest.mark.parametrize("name", QKV_CASES)
def test_heads_are_normed_rotated_and_stored(compiled: Ops, name: str, rng: np.random.Generator) -> None:
    normalize, rotate = QKV_CASES[name]
    lengths, new, layer = [0, 5, 11], [3, 1, 6], 1
    tokens = sum(new)
    q, k, v = (
        rng.standard_normal((tokens, heads * HEAD_DIM), np.float32) for heads in (QUERY_HEADS, KEY_HEADS, KEY_HEADS)
    )
    weights = rng.standard_normal((2, HEAD_DIM), np.float32)
    table = rng.standard_normal((tokens, ROTARY_DIM), np.float32)
    lookup = rng.permutation(15).reshape(3, 5).astype(np.uint32)
    before = rng.standard_normal((15, 2, LAYERS, PAGE_SIZE, KEY_HEADS, HEAD_DIM), np.float32)
    blocks = Buffer.from_numpy(before.copy())
    offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.uint32)
    (result,) = compiled.execute(
        name,
        *(q, k, v, *weights, table, offsets, blocks),
        *(np.array([-1]), np.array(lengths, np.uint32), lookup, np.array(layer, np.uint32)),
    )

    def formed(x: Array, weight: Array) -> Array:
        heads = x.astype(np.float64).reshape(tokens, -1, HEAD_DIM)
        heads = normed(heads, weight) if normalize else heads
        return rotated(heads, table) if rotate else heads

    np.testing.assert_allclose(result, formed(q, weights[0]), rtol=0, atol=1e-5)
    expected = before.astype(np.float64)
    keys, values = formed(k, weights[1]), v.reshape(tokens, KEY_HEADS, HEAD_DIM)
    for request, (length, count) in enumerate(zip(lengths, new, strict=True)):
        for i in range(count):
            position, token = length + i, offsets[request] + i
            page = lookup[request, position // PAGE_SIZE]
            expected[page, :, layer, position % PAGE_SIZE] = keys[token], values[token]
    np.testing.assert_allclose(blocks.to_numpy(), expected, rtol=0, atol=1e-5)
