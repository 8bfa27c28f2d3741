"""From a captured graph's replay to the next one of the same requests, with what differs between the two and no more.

MAX prepares all inputs of a step anew and copies each to where the captured graph reads it. On several GPUs that takes
longer than the GPUs need for a step of a few requests. But where the same requests go on decoding, only their lengths
and last tokens differ, and now and then a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from max.driver import Buffer, batch_inplace_copy
from max.nn.kv_cache import BatchCharacteristics
from max.pipelines.lib.graph_capture import ServeGraphCaptureRunner, _pack_model_graph_key
from max.pipelines.lib.interfaces import ModelOutputs

from .cache_inputs import Batches, CacheInputs
from .model import Step3p5Inputs, cache_leaves
from .replayed_inputs import elsewhere


@dataclass(frozen=True)
class _Replay:
    """A replay: which graph, and what it was given."""

    number: int
    """By which MAX's engine knows the graph."""

    given: Step3p5Inputs
    reads: tuple[Buffer, ...]
    """What the graph reads, in the order of `given.buffers`."""

    signals: list[Buffer]
    outputs: ModelOutputs

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """What the engine takes."""
        return (*self.reads, *self.signals)

    @cached_property
    def tokens(self) -> Buffer:
        """Where the graph reads the requests' last tokens."""
        return next(to for to, own in zip(self.reads, self.given.buffers, strict=True) if own is self.given.tokens)

    @cached_property
    def elsewhere(self) -> list[tuple[Buffer, Buffer]]:
        """Of the cache's inputs on the devices, those that the graph reads elsewhere: there, and where they are."""
        of_cache = {id(leaf) for leaf in cache_leaves(self.given.kv_cache_inputs)}
        pairs = zip(self.reads, self.given.buffers, strict=True)
        return elsewhere(pair for pair in pairs if id(pair[1]) in of_cache)


class SteadyReplays:
    """A graph runner's `replay`, with a short way to the next step of the same requests.

    Args:
        runner: MAX's, whose graphs are captured.
        caches: Prepares what the cache gives to a step.
    """

    def __init__(self, runner: ServeGraphCaptureRunner, caches: CacheInputs) -> None:
        self._runner, self._caches = runner, caches
        self._replay = runner.replay
        self._last: _Replay | None = None

    def __call__(
        self, *, model_inputs: Any, batch_characteristics: BatchCharacteristics, **debugging: Any
    ) -> ModelOutputs:
        """Replays the graph of `batch_characteristics`: see `ServeGraphCaptureRunner.replay`."""
        self._last = None
        outputs = self._replay(model_inputs=model_inputs, batch_characteristics=batch_characteristics, **debugging)
        key = self._runner._records[batch_characteristics]
        reads, _ = self._runner.graph_entries[key]
        self._last = _Replay(_pack_model_graph_key(key), model_inputs, reads, self._runner._signal_buffers, outputs)
        return outputs

    def forget(self) -> None:
        """Says that the next step does not follow on the last replay."""
        self._last = None

    def go_on(self, batches: Batches, tokens: Buffer) -> ModelOutputs | None:
        """Replays the last graph for the next step of the same requests.

        Args:
            batches: The requests, in the order in which the last replay had them.
            tokens: Their last tokens `[requests]` int64, on the first device.

        Returns:
            What the graph gives; `None`, and nothing is launched, if the step needs another graph or other inputs.
        """
        last = self._last
        if last is None or self._caches.advance(batches) is not last.given.kv_cache_inputs:
            return None
        to, sources = zip((last.tokens, tokens), *last.elsewhere, strict=True)
        batch_inplace_copy(to, sources)
        self._runner._engine_model.replay(last.number, *last.inputs)
        return last.outputs
