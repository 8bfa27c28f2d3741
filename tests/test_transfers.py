"""The small inputs of a graph in one copy, and drafts that are read late: what can be seen without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import CPU, Buffer
from max.dtype import DType

from step3p5.speculation.drafted import DraftReader, Drafts
from step3p5.speculation.rows import ragged_range
from step3p5.speculation.transfers import ALIGNMENT, OneCopy, placed, taken_apart
from step3p5.speculation.verified_tokens import tokens_to_verify


def test_packed_arrays_come_out_as_they_went_in(rng: np.random.Generator) -> None:
    arrays: list[npt.NDArray[Any]] = [
        rng.integers(0, 100, size=7),
        np.empty(0, dtype=np.uint32),
        rng.integers(0, 100, size=(3, 50)).astype(np.uint32),
        rng.standard_normal((2, 2)).astype(np.float32),
    ]
    places, size = placed(arrays)
    assert all(place % ALIGNMENT == 0 for place in places)
    packed = Buffer(DType.uint8, [size], CPU())
    for array, place in zip(arrays, places, strict=True):
        packed.to_numpy()[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    for found, array in zip(taken_apart(packed, arrays, places), arrays, strict=True):
        assert found.to_numpy().dtype == array.dtype
        assert np.array_equal(found.to_numpy(), array)
    for found, array in zip(OneCopy(CPU()).send(*arrays), arrays, strict=True):
        assert np.array_equal(found.to_numpy(), array)


def test_ranges_one_after_the_other() -> None:
    assert ragged_range(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ragged_range(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)).tolist() == []


def test_the_device_takes_the_drafts_that_the_host_would_have_sent(rng: np.random.Generator) -> None:
    made = DraftReader(CPU()).start([Buffer.from_numpy(rng.integers(100, 200, size=3)) for _ in range(2)])
    active = [np.array([7]), np.array([1, 2, 3]), np.array([8]), np.array([9])]
    drafts = [Drafts(made, 2, 2), [], Drafts(made, 0, 2).first(1), Drafts(made, 1, 2).first(-1)]
    host, device = (tokens_to_verify(active, drafts, stays) for stays in (False, True))
    assert host.made is None
    assert device.made is made
    assert host.known.tolist() == [7, *made.read()[:, 2], 1, 2, 3, 8, made.read()[0, 0], 9]
    together = np.concatenate([device.known, *(depth.to_numpy() for depth in made.by_depth)])
    assert together[device.places].tolist() == host.known.tolist()
    assert host.input_row_offsets.tolist() == device.input_row_offsets.tolist() == [0, 3, 6, 8, 9]
    assert host.logit_rows.tolist() == [0, 1, 2, 5, 6, 7, 8]


def test_drafts_of_two_passes_go_through_the_host(rng: np.random.Generator) -> None:
    reader = DraftReader(CPU())
    first, second = (reader.start([Buffer.from_numpy(rng.integers(100, size=1))]) for _ in range(2))
    plan = tokens_to_verify([np.array([7]), np.array([8])], [Drafts(first, 0, 1), Drafts(second, 0, 1)], True)
    assert plan.made is None
    assert plan.known.tolist() == [7, first.read()[0, 0], 8, second.read()[0, 0]]
