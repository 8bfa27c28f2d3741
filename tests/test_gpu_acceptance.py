"""A cycle's acceptance on a GPU, against the same written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from acceptance_case import AcceptanceCase, Array
from expert_layer import as_bfloat16
from max.driver import CPU, Accelerator, Buffer, accelerator_count
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef

from step3p5.speculation.cycle_graphs import Acceptance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator_count() == 0, reason="not run: no GPU")]

DEEPEST = 3


@pytest.fixture(scope="module", params=[4096, 35])
def acceptance(request: pytest.FixtureRequest) -> tuple[int, Model]:
    part = Acceptance(DEEPEST, request.param, DType.bfloat16, DeviceRef.GPU())
    graph = part.trace(*part.input_types(), name=f"gpu_acceptance_{request.param}")
    return request.param, InferenceSession(devices=[Accelerator()]).load(graph)


def on_device(values: Array) -> Buffer:
    if values.dtype == np.float32:
        return as_bfloat16(values).to(Accelerator())
    return Buffer.from_numpy(values).to(Accelerator())


def on_host(buffer: Buffer) -> Array:
    host = buffer.to(CPU())
    if host.dtype == DType.bfloat16:
        bits = host.view(DType.uint16, host.shape).to_numpy().astype(np.uint32)
        return (bits << 16).view(np.float32)
    return host.to_numpy()


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("depth", range(DEEPEST + 1))
def test_acceptance(acceptance: tuple[int, Model], rng: np.random.Generator, batch: int, depth: int) -> None:
    hidden_size, model = acceptance
    case = AcceptanceCase.random(rng, batch, DEEPEST, depth, hidden_size)
    written = [on_device(values) for values in (case.verified, case.kept, case.window)]
    results = model.execute(*map(on_device, (case.drawn, case.hidden, case.lengths)), *written)
    case.check(list(map(on_host, results)), list(map(on_host, written)), rng.integers(100, 200, size=batch))
