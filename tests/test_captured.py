"""When a graph is captured, replayed or executed; a stand-in takes the place of the compiled graph and its GPU."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from max.driver import Buffer

from step3p5 import replayed_inputs
from step3p5.speculation.captured import CapturedGraph


class Doubling:
    """A compiled graph that doubles its input, captured as a GPU's would be: replays read and write the same memory."""

    def __init__(self, *, can_be_captured: bool = True) -> None:
        self.can_be_captured, self.calls = can_be_captured, list[str]()
        self.memory: dict[int, tuple[Buffer, Buffer]] = {}

    def execute(self, x: Buffer) -> list[Buffer]:
        self.calls.append("execute")
        return [Buffer.from_numpy(2 * x.to_numpy())]

    def capture(self, number: int, x: Buffer) -> list[Buffer]:
        self.calls.append("capture")
        if not self.can_be_captured:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.memory[number] = (x, Buffer.from_numpy(np.zeros_like(x.to_numpy())))
        return [self.memory[number][1]]

    def replay(self, number: int, x: Buffer) -> None:
        self.calls.append("replay")
        source, to = self.memory[number]
        assert x is source
        to.to_numpy()[:] = 2 * source.to_numpy()

    def release_captured_graph(self, number: int) -> None:
        del self.memory[number]

    def _await_device_graphs(self) -> None:
        pass


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's inputs lie in a host's memory and are treated as a GPU's."""
    monkeypatch.setattr(replayed_inputs, "stays", lambda buffer: False)


def graph_of(model: Doubling, *, captures: bool = True) -> CapturedGraph:
    return CapturedGraph(cast(Any, model), "doubling", captures)


def of(*values: int) -> Buffer:
    return Buffer.from_numpy(np.array(values))


def test_a_graph_is_captured_once_for_each_key() -> None:
    model = Doubling()
    graph, x, other = graph_of(model), of(1, 2), of(5)
    for value in (1, 7):
        x.to_numpy()[:] = value
        (y,) = graph.run("two", x)
        assert y.to_numpy().tolist() == [2 * value, 2 * value]
    (z,) = graph.run("one", other)
    assert z.to_numpy().tolist() == [10]
    assert model.calls == ["capture", "replay", "replay", "capture", "replay"]


def test_inputs_elsewhere_are_copied_to_where_the_graph_reads() -> None:
    model = Doubling()
    graph = graph_of(model)
    graph.run("key", of(1, 2))
    (y,) = graph.run("key", of(30, 40))
    assert y.to_numpy().tolist() == [60, 80]


def test_what_cannot_be_captured_is_executed_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Doubling(can_be_captured=False)
    graph = graph_of(model)
    with caplog.at_level("WARNING", logger="max.pipelines"):
        results = [graph.run("key", of(value))[0].to_numpy().tolist() for value in (3, 4)]
    assert results == [[6], [8]]
    assert model.calls == ["capture", "execute", "execute"]
    assert [record.message for record in caplog.records] == ["doubling: not captured, so it runs without."]


def test_nothing_is_captured_where_it_must_not_be() -> None:
    model = Doubling()
    graph_of(model, captures=False).run("key", of(1))
    assert model.calls == ["execute"]


def test_what_is_forgotten_is_released_and_captured_anew() -> None:
    model = Doubling()
    graph = graph_of(model)
    graph.run("key", of(1))
    graph.forget("key")
    graph.forget("another")
    assert not model.memory
    assert graph.run("key", of(4))[0].to_numpy().tolist() == [8]
