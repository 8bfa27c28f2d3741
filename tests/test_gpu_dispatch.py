"""Tokens to the experts of other GPUs and back: the kernels, on one GPU that is several devices at once.

What is sent and received is what several GPUs would; waiting for another GPU is not among it, since all that is waited
for was enqueued before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from expert_layer import Array, as_bfloat16, rounded
from gpu_ops import TOP_K, dispatch, dispatch_inputs
from max.driver import CPU, Accelerator, Buffer, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import Graph
from test_gpu import as_float32
from test_parallel_plan import FLASH

from step3p5.mailbox_size import HEADER_BYTES, mailbox_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

HIDDEN, EXPERTS = FLASH.hidden_size, 288
DEVICES = (2, 4, 8)
MOST_TOKENS = 1100
LENGTHS: dict[int, list[tuple[int, ...]]] = {
    2: [(1, 1), (0, 3), (1100, 7)],
    4: [(1, 1, 1, 1), (64, 0, 1, 300)],
    8: [(1,) * 8, (16,) * 8, (0, 0, 0, 0, 0, 0, 0, 5), (1, 600, 2, 3, 513, 64, 0, 9)],
}
"""Own tokens of the devices."""


class Devices:
    """Devices whose mailboxes lie on one GPU; what no round has written yet is NaN."""

    def __init__(self, count: int) -> None:
        with Graph(f"dispatch_{count}", input_types=dispatch_inputs(count)) as graph:
            graph.output(*dispatch(graph.inputs, count, EXPERTS))
        self.count = count
        self.model: Model = InferenceSession(devices=[Accelerator()]).load(graph)
        empty = np.full(mailbox_bytes(FLASH, count, MOST_TOKENS, itemsize=2), 0xFF, np.uint8)
        empty[:HEADER_BYTES] = 0
        self.mailboxes = [Buffer.from_numpy(empty).to(Accelerator()) for _ in range(count)]
        self.addresses = np.array([box._data_ptr() for box in self.mailboxes], np.int64)

    def __call__(self, tokens: list[Tokens]) -> list[Array]:
        """Every device's own results."""
        bounds = np.cumsum([0, *(len(own.x) for own in tokens)])
        operands = [
            buffer.to(Accelerator())
            for own in tokens
            for buffer in (as_bfloat16(own.x), Buffer.from_numpy(own.ids), Buffer.from_numpy(own.weights))
        ]
        on_host = (Buffer.from_numpy(values) for values in (bounds, self.addresses))
        results = self.model.execute(next(on_host), *self.mailboxes, next(on_host), *operands)
        return [as_float32(result.to(CPU())) for result in results]


@dataclass
class Tokens:
    """A device's own, in bfloat16, with distinct experts each."""

    x: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def random(cls, rng: np.random.Generator, count: int, experts: int = EXPERTS) -> Tokens:
        ids = rng.permuted(np.tile(np.arange(experts), (count, 1)), axis=1)[:, :TOP_K]
        x = rounded(rng.normal(size=(count, HIDDEN)).astype(np.float32), DType.bfloat16)
        return cls(x, ids.astype(np.int32), rng.uniform(0.1, 1, (count, TOP_K)).astype(np.float32))


@pytest.fixture(scope="module", params=DEVICES)
def devices(request: pytest.FixtureRequest) -> Devices:
    return Devices(request.param)


def check(tokens: list[Tokens], found: list[Array]) -> None:
    for own, y in zip(tokens, found, strict=True):
        want = own.x.astype(np.float64) * own.weights.astype(np.float64).sum(axis=1, keepdims=True)
        assert y.shape == want.shape
        np.testing.assert_allclose(y, want, rtol=0, atol=2.0**-7 * np.abs(want).max(initial=1.0))


def test_every_token_comes_back_with_the_sums_of_its_experts(devices: Devices, rng: np.random.Generator) -> None:
    for lengths in LENGTHS[devices.count] * 2:
        tokens = [Tokens.random(rng, length) for length in lengths]
        check(tokens, devices(tokens))


def test_a_device_without_chosen_experts_is_left_out(devices: Devices, rng: np.random.Generator) -> None:
    tokens = [Tokens.random(rng, 20, EXPERTS // devices.count) for _ in range(devices.count)]
    check(tokens, devices(tokens))


def test_the_same_tokens_give_the_same_bits(devices: Devices, rng: np.random.Generator) -> None:
    tokens = [Tokens.random(rng, 50) for _ in range(devices.count)]
    for first, second in zip(devices(tokens), devices(tokens), strict=True):
        assert first.tobytes() == second.tobytes()


def test_nan_stays_in_its_token(devices: Devices, rng: np.random.Generator) -> None:
    tokens = [Tokens.random(rng, 50) for _ in range(devices.count)]
    clean = devices(tokens)
    tokens[0].x[7, 100] = np.nan
    broken = devices(tokens)
    assert np.isnan(broken[0][7]).any()
    broken[0][7] = clean[0][7]
    for before, after in zip(clean, broken, strict=True):
        assert before.tobytes() == after.tobytes()
