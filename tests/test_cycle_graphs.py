"""The small graphs of a cycle, against the same written out request by request in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from acceptance_case import AcceptanceCase
from max.driver import Buffer
from max.dtype import DType
from max.engine import Model
from max.graph import DeviceRef
from small_graphs import BuildGraph

from step3p5.greedy_draw import GreedyDraw
from step3p5.speculation.cycle_graphs import Acceptance, Handover

DEEPEST = (2, 3)
VOCAB, HIDDEN, KNOWN = 40, 35, 36


def traced(part: Acceptance | GreedyDraw | Handover) -> BuildGraph:
    return lambda name, module: part.trace(*part.input_types(), name=name, module=module)


GRAPHS = {
    **{
        f"cycle_acceptance_{deepest}": traced(Acceptance(deepest, HIDDEN, DType.float32, DeviceRef.CPU()))
        for deepest in DEEPEST
    },
    "cycle_draw": traced(GreedyDraw(VOCAB, DeviceRef.CPU())),
    "cycle_handover": traced(Handover(3, DeviceRef.CPU())),
}


@pytest.fixture(scope="module", params=DEEPEST)
def acceptance(request: pytest.FixtureRequest, small_models: Mapping[str, Model]) -> tuple[int, Model]:
    return request.param, small_models[f"cycle_acceptance_{request.param}"]


def test_greedy_draws_have_words(small_models: Mapping[str, Model], rng: np.random.Generator) -> None:
    model = small_models["cycle_draw"]
    logits = rng.standard_normal((7, VOCAB)).astype(np.float32)
    logits[:, KNOWN:] += 100
    (drawn,) = model.execute(Buffer.from_numpy(logits), Buffer.from_numpy(np.array([KNOWN])))
    np.testing.assert_array_equal(drawn.to_numpy(), logits[:, :KNOWN].argmax(-1))


def test_of_equal_logits_the_first_is_drawn_and_nan_never(
    small_models: Mapping[str, Model], rng: np.random.Generator
) -> None:
    logits = rng.integers(-3, 3, size=(40, VOCAB)).astype(np.float32)
    logits[logits == 2] = np.nan
    logits[7] = -np.inf
    logits[8] = np.nan
    (drawn,) = small_models["cycle_draw"].execute(Buffer.from_numpy(logits), Buffer.from_numpy(np.array([VOCAB + 1])))
    expected = np.where(np.isnan(logits), -np.inf, logits).argmax(-1)
    np.testing.assert_array_equal(drawn.to_numpy(), expected)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("rests", [0, 1, 2])
def test_acceptance(acceptance: tuple[int, Model], rng: np.random.Generator, batch: int, rests: int) -> None:
    """All depths draft, or all but the last ones."""
    deepest, model = acceptance
    case = AcceptanceCase.random(rng, batch, deepest, deepest - rests, HIDDEN)
    written = [Buffer.from_numpy(values.copy()) for values in (case.verified, case.kept, case.window)]
    results = model.execute(*map(Buffer.from_numpy, (case.drawn, case.hidden, case.lengths)), *written)
    chosen = rng.integers(100, 200, size=batch)
    found, left = ([buffer.to_numpy() for buffer in buffers] for buffers in (results, written))
    case.check(found, left, chosen)


@pytest.mark.parametrize("depth", range(4))
def test_handover(small_models: Mapping[str, Model], rng: np.random.Generator, depth: int) -> None:
    model, batch = small_models["cycle_handover"], 3
    window = rng.integers(100, size=(batch, 3))
    drafted = rng.integers(100, size=(3, batch))
    verified = Buffer.from_numpy(np.zeros(batch * (depth + 1), dtype=np.int64))
    places = [batch * column + request for request in range(batch) for column in range(depth + 1)]
    model.execute(
        Buffer.from_numpy(window), Buffer.from_numpy(np.array(places)), verified, *map(Buffer.from_numpy, drafted)
    )
    want = np.concatenate([window[:, -1:], drafted[:depth].T], axis=1)
    np.testing.assert_array_equal(verified.to_numpy().reshape(batch, depth + 1), want)
