"""The small graphs of a cycle, against the same written out request by request in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from max.driver import Buffer
from max.dtype import DType
from max.engine import Model
from max.graph import DeviceRef
from small_graphs import BuildGraph

from step3p5.greedy_draw import GreedyDraw
from step3p5.speculation.cycle_graphs import Acceptance, Handover

DEEPEST = (2, 3)
VOCAB, HIDDEN, KNOWN = 40, 8, 36


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
    depth, keep = deepest - rests, deepest - 1
    rows = keep + depth + 1
    right = rng.integers(depth + 1, size=batch)
    drawn = rng.integers(KNOWN, size=(batch, depth + 1))
    verified = rng.integers(KNOWN, size=(batch, depth + 1))
    for request, count in enumerate(right):
        verified[request, 1 : count + 1] = drawn[request, :count]
        if count < depth:
            verified[request, count + 1] = (drawn[request, count] + 1) % KNOWN
    hidden = rng.standard_normal((batch, depth + 1, HIDDEN)).astype(np.float32)
    kept = rng.standard_normal((batch, keep, HIDDEN)).astype(np.float32)
    window = rng.integers(KNOWN, size=(batch, keep + 1))
    lengths = rng.integers(10, 50, size=batch).astype(np.uint32)

    new_kept, new_window = Buffer.from_numpy(kept.copy()), Buffer.from_numpy(window.copy())
    found = model.execute(
        Buffer.from_numpy(drawn),
        Buffer.from_numpy(hidden),
        Buffer.from_numpy(verified),
        Buffer.from_numpy(lengths),
        Buffer.from_numpy(np.array([0, 1, 2][:depth] + [depth] * rests)),
        Buffer.from_numpy(rows * np.arange(batch)),
        Buffer.from_numpy(np.arange(batch * rows).reshape(batch, rows)),
        Buffer.from_numpy(np.arange(batch * rows, batch * rows + batch)),
        new_kept,
        new_window,
    )
    previous, tokens, following, last_rows, draft_lengths, result = (buffer.to_numpy() for buffer in found)

    np.testing.assert_array_equal(result, np.concatenate([drawn, right[:, None]], axis=1))
    np.testing.assert_array_equal(draft_lengths, lengths - keep)
    chosen = rng.integers(100, 200, size=batch)
    next_tokens = np.concatenate([tokens, chosen])[following].reshape(batch, rows)
    for request, count in enumerate(right):
        last = keep + count
        assert last_rows[request] == request * rows + last
        states = np.concatenate([kept[request], hidden[request]])
        np.testing.assert_array_equal(previous.reshape(batch, rows, HIDDEN)[request], states)
        sequence = [*window[request], *drawn[request]]
        assert tokens.reshape(batch, rows)[request].tolist() == sequence[1:]
        assert next_tokens[request, : last + 1].tolist() == [*sequence[2 : last + 2], chosen[request]]
        np.testing.assert_array_equal(new_kept.to_numpy()[request], states[count + 1 : count + 1 + keep])
        assert new_window.to_numpy()[request].tolist() == sequence[count + 1 : count + 2 + keep]


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
