"""Attention's first products on a GPU, of which those that WGMMA takes are one launch, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from expert_layer import Array, as_bfloat16, rounded
from max.driver import Accelerator, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType
from test_gpu import TOLERANCE, execute

from step3p5 import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

TOKENS = (1, 32, 33, 48, 49, 64, 65, 127, 192, 255, 256, 300, 1000)
"""On each side of every choice between paths, tiles and splits."""

SIZES = {
    "flash": (4096, (8192, 1024, 1024, 64)),
    "flash on two GPUs": (4096, (4096, 512, 512, 32)),
    "three": (4096, (512, 320, 8, 0)),
    "two": (512, (384, 3, 256, 5)),
    "four": (520, (264, 8, 136, 648)),
}
"""Depth and rows of each matrix: narrow ones, such as no tile divides, and such as WGMMA cannot take."""


@pytest.fixture(scope="module")
def linear4_op() -> Model:
    gpu = DeviceRef.GPU()
    types = [TensorType(DType.bfloat16, (rows, "K"), gpu) for rows in ("T", "N0", "N1", "N2", "N3")]
    with Graph("gpu_linear4", input_types=types) as graph:
        x, w0, w1, w2, w3 = (value.tensor for value in graph.inputs)
        graph.output(*kernels.linear4(x, w0, w1, w2, w3))
    return InferenceSession(devices=[Accelerator()]).load(graph)


class Products:
    """Random tokens and matrices, and what a GPU makes of them."""

    def __init__(self, rng: np.random.Generator, tokens: int, size: tuple[int, tuple[int, ...]]) -> None:
        depth, features = size
        self.x = rounded(rng.standard_normal((tokens, depth), np.float32), DType.bfloat16)
        self.matrices = [rounded(rng.standard_normal((n, depth), np.float32), DType.bfloat16) for n in features]

    def run(self, model: Model) -> list[Array]:
        """Executes on freed memory full of NaN."""
        for x in (np.full_like(self.x, np.nan), self.x):
            results = execute(model, [as_bfloat16(values) for values in (x, *self.matrices)])
        return results


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_four_products_equal_float64(
    linear4_op: Model, rng: np.random.Generator, tokens: int, size: tuple[int, tuple[int, ...]]
) -> None:
    products = Products(rng, tokens, size)
    results = products.run(linear4_op)
    for found, w in zip(results, products.matrices, strict=True):
        expected = products.x.astype(np.float64) @ w.astype(np.float64).T
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(initial=0))
    for first, again in zip(results, products.run(linear4_op), strict=True):
        assert again.tobytes() == first.tobytes()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_nan_stays_in_its_token(
    linear4_op: Model, rng: np.random.Generator, tokens: int, size: tuple[int, tuple[int, ...]]
) -> None:
    products = Products(rng, tokens, size)
    results = products.run(linear4_op)
    broken = int(rng.integers(tokens))
    products.x[broken, rng.integers(size[0])] = np.nan
    others = np.arange(tokens) != broken
    for clean, found in zip(results, products.run(linear4_op), strict=True):
        assert np.isnan(found[broken]).all()
        assert found[others].tobytes() == clean[others].tobytes()
