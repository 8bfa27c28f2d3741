"""Graphs of a GPU that run again without a host: captured once for each shape, then replayed."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass

from max.driver import Buffer, batch_inplace_copy
from max.engine import Model

from ..replayed_inputs import addresses, elsewhere

logger = logging.getLogger("max.pipelines")


@dataclass
class _Captured:
    """One captured graph: the inputs whose memory it reads, and the outputs that it writes."""

    number: int
    inputs: tuple[Buffer, ...]
    places: tuple[int, ...]
    """The addresses of the inputs that it reads on the device."""

    outputs: list[Buffer]


class CapturedGraph:
    """A compiled graph that is captured for each key and replayed from then on.

    A replay reads the memory of the inputs that were captured, and returns the same outputs each time, which the next
    replay writes again. Inputs on the host must be what they were.

    Args:
        model: The compiled graph.
        name: For the log.
        captures: Whether to capture; if not, or where it fails, the graph is executed.
    """

    def __init__(self, model: Model, name: str, captures: bool) -> None:
        self.captures = captures
        self._model, self._name = model, name
        self._graphs: dict[Hashable, _Captured] = {}
        self._next_number = 1

    def execute(self, *inputs: Buffer) -> list[Buffer]:
        """The outputs for `inputs`, by an ordinary execution."""
        return self._model.execute(*inputs)

    def run(self, key: Hashable, *inputs: Buffer) -> list[Buffer]:
        """The outputs for `inputs`, the shapes of which `key` stands for."""
        if not self.captures:
            return self.execute(*inputs)
        graph = self._graphs.get(key)
        if graph is None:
            try:
                outputs = self._model.capture(self._next_number, *inputs)
                self._model._await_device_graphs()
            except Exception:  # whatever the reason, the graph can be executed
                logger.warning("%s: not captured, so it runs without.", self._name, exc_info=True)
                self.captures = False
                return self.execute(*inputs)
            graph = _Captured(self._next_number, inputs, addresses(inputs), list(outputs))
            self._graphs[key] = graph
            self._next_number += 1
        elif graph.places != addresses(inputs):
            moved = elsewhere(zip(graph.inputs, inputs, strict=True))
            batch_inplace_copy([to for to, _ in moved], [source for _, source in moved])
        self._model.replay(graph.number, *graph.inputs)
        return graph.outputs

    def forget(self, key: Hashable) -> None:
        """Releases what was captured for a key."""
        if (graph := self._graphs.pop(key, None)) is not None:
            graph.outputs.clear()
            self._model.release_captured_graph(graph.number)
