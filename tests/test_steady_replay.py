"""The short way from a captured graph's replay to the next: what the graph then reads is what the step is about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import CPU, Buffer
from max.nn.kv_cache import BatchCharacteristics
from max.pipelines.context import TextContext
from max.pipelines.kv_cache.paged_kv_cache.jenga_cache_manager import JengaKVCacheManager
from max.pipelines.lib.graph_capture import _pack_model_graph_key
from speculation_harness import prompts_of, request
from test_cache_inputs import LONGEST, PAGE_SIZE, new_cache

from step3p5 import replayed_inputs
from step3p5.cache_inputs import Allocation, CacheInputs
from step3p5.model import Step3p5Inputs, cache_leaves
from step3p5.steady_replay import SteadyReplays

BUCKET = 64
"""Captured graphs are for cache lengths up to multiples of it."""


class Engine:
    """Stands for the compiled graph: a replay notes what it reads."""

    def __init__(self) -> None:
        self.read: list[npt.NDArray[Any]] = []
        self.number = -1

    def replay(self, number: int, *inputs: Buffer) -> None:
        CPU().synchronize()
        self.number = number
        self.read = [buffer.to_numpy().copy() for buffer in inputs]


class Runner:
    """Stands for MAX's runner: each batch size and bucket has a graph, captured when it is first asked for.

    Args:
        apart: Whether the graphs read the cache's inputs in memory of their own.
    """

    def __init__(self, apart: bool) -> None:
        self._apart = apart
        self._engine_model, self._signal_buffers = Engine(), [Buffer.from_numpy(np.zeros(1))]
        self._records: dict[BatchCharacteristics, Any] = {}
        self.graph_entries: dict[Any, tuple[tuple[Buffer, ...], Any]] = {}
        self.replays = 0

    def replay(self, *, model_inputs: Any, batch_characteristics: BatchCharacteristics) -> Any:
        self.replays += 1
        # The replicas of a test may have different numbers of requests.
        key = self._records[batch_characteristics] = batch_characteristics, tuple(b.shape for b in model_inputs.buffers)
        if key not in self.graph_entries:
            own = [model_inputs.tokens, *(cache_leaves(model_inputs.kv_cache_inputs) if self._apart else [])]
            memory = {id(buffer): Buffer.from_numpy(np.zeros_like(buffer.to_numpy())) for buffer in own}
            reads = tuple(memory.get(id(buffer), buffer) for buffer in model_inputs.buffers)
            self.graph_entries[key] = reads, SimpleNamespace(of=batch_characteristics)
        reads, outputs = self.graph_entries[key]
        CPU().synchronize()
        for to, source in zip(reads, model_inputs.buffers, strict=True):
            if to is not source:
                to.inplace_copy_from(source)
        self._engine_model.replay(_pack_model_graph_key(key), *reads, *self._signal_buffers)
        return outputs


class Decoding:
    """Requests that decode step by step, each with a token of its own a step.

    Args:
        manager: The cache.
        apart: See `Runner`.
        rng: Of tokens and prompts.
    """

    def __init__(self, manager: JengaKVCacheManager, apart: bool, rng: np.random.Generator) -> None:
        self.manager, self.rng = manager, rng
        self.alloc, self.caches, self.runner = Allocation(manager), CacheInputs(manager), Runner(apart)
        self.replays = SteadyReplays(cast(Any, self.runner), self.caches)
        self.running: list[list[TextContext]] = [[] for _ in range(manager.params.data_parallel_degree)]
        self.before: list[TextContext] = []

    def join(self, replica: int) -> None:
        prompt = prompts_of(self.rng, int(self.rng.integers(1, 40)))[0]
        context = request(prompt, int(self.rng.integers(50, 300)))
        self.manager.claim(context, replica_idx=replica)
        self.alloc(context).synchronize()
        self.caches([[context] if index == replica else [] for index in range(len(self.running))])
        context.update(7)
        self.manager.step(context)
        self.running[replica].append(context)

    def step(self) -> bool:
        """A step of all requests, checked; whether it went the short way."""
        batches = [list(batch) for batch in self.running]
        batch = [context for own in batches for context in own]
        for context in batch:
            self.alloc(context).synchronize()
        tokens = np.array([context.tokens.all[-1] for context in batch], dtype=np.int64)
        outputs = None
        if self.before and all(one is other for one, other in zip(self.before, batch, strict=False)):
            outputs = self.replays.go_on(batches, Buffer.from_numpy(tokens))
        short = outputs is not None
        longest = max(len(context.tokens) for context in batch)
        expected = BatchCharacteristics(max(map(len, batches)), 1, -(-longest // BUCKET) * BUCKET)
        if not short:
            inputs = self.caches(batches, max_cache_length=LONGEST, batch_characteristics=expected)
            model_inputs = Step3p5Inputs(
                tokens=Buffer.from_numpy(tokens),
                input_row_offsets=Buffer.from_numpy(np.arange(len(batch) + 1)),
                return_n_logits=Buffer.from_numpy(np.ones(1)),
                signal_buffers=[],
                kv_cache_inputs=inputs,
            )
            outputs = self.replays(model_inputs=model_inputs, batch_characteristics=expected)
        assert outputs.of == expected  # type: ignore[union-attr]
        assert self.runner._engine_model.number == _pack_model_graph_key(self.runner._records[expected])
        self.check(batches, tokens)
        for context in batch:
            context.update(int(self.rng.integers(100)))
            self.manager.step(context)
        self.before = batch
        return short

    def check(self, batches: list[list[TextContext]], tokens: npt.NDArray[np.int64]) -> None:
        """What the graph read: tokens, lengths and pages."""
        last = self.replays._last
        assert last is not None
        read = dict(zip(map(id, last.given.buffers), self.runner._engine_model.read, strict=False))
        np.testing.assert_array_equal(read[id(last.given.tokens)], tokens)
        kinds: Any = last.given.kv_cache_inputs
        for kind, caches in kinds.items():
            for cache, batch in zip(caches, batches, strict=True):
                lengths = [context.tokens.processed_length for context in batch]
                np.testing.assert_array_equal(read[id(cache.cache_lengths)], lengths)
                for row, context, length in zip(read[id(cache.lookup_table)], batch, lengths, strict=True):
                    own = self.manager.get_req_blocks_per_leaf(context)
                    (leaf,) = [name for name in own if name.startswith(kind)]
                    needed = length // PAGE_SIZE + 1
                    assert row[:needed].tolist() == own[leaf][:needed]


@pytest.mark.parametrize("apart", [False, True], ids=["in MAX's memory", "in memory of its own"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replay_reads_what_its_step_is_about(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, replicas: int, apart: bool
) -> None:
    """Requests come, leave and change places, get pages, and outgrow the graph that was captured for their length."""
    monkeypatch.setattr(replayed_inputs, "stays", lambda _: False)  # here everything lies on the host
    decoding = Decoding(new_cache(replicas, 0), apart, rng)
    steps, short = 400, 0
    for _ in range(steps):
        for replica, running in enumerate(decoding.running):
            for index in reversed(range(len(running))):
                if len(running[index].tokens) + 1 >= running[index].max_length:
                    decoding.manager.release(running.pop(index))
            if not running or (len(running) < 5 and rng.random() < 0.03):
                decoding.join(replica)
                decoding.before, changed = [], True
            elif rng.random() < 0.02:
                running.reverse()
                decoding.before, changed = [], True
            else:
                changed = False
            if changed:
                decoding.replays.forget()
        short += decoding.step()
    assert steps / 2 < short
    assert decoding.runner.replays == steps - short


def test_without_a_replay_before_nothing_is_launched(rng: np.random.Generator) -> None:
    decoding = Decoding(new_cache(1, 0), False, rng)
    decoding.join(0)
    decoding.step()
    assert decoding.step()
    decoding.replays.forget()
    launched = decoding.runner._engine_model.read
    assert decoding.replays.go_on(decoding.running, Buffer.from_numpy(np.zeros(1, np.int64))) is None
    assert decoding.runner._engine_model.read is launched
