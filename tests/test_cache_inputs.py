"""The short way to a step's cache inputs: tables and lengths are what the cache's own books say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import SEED
from max.driver import CPU
from max.nn.kv_cache import BatchCharacteristics
from max.pipelines.context import TextContext
from max.pipelines.kv_cache.paged_kv_cache.jenga_cache_manager import JengaKVCacheManager
from speculation_harness import load, prompts_of, request

from step3p5.cache_inputs import Allocation, CacheInputs
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint

LONGEST = 1024
REQUESTS = 6

DEPTH = 3


class Counted:
    """A function with its calls counted."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JengaKVCacheManager]:
    """A cache of two kinds of attention, one of them with a window of less than a page."""
    folder = tmp_path_factory.mktemp("cache_inputs") / "tiny"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.FLOAT32, SEED)
    with load(folder, DEPTH, enable_prefix_caching=True) as model:
        pipeline: Any = model.pipeline
        yield pipeline.kv_manager


class Books:
    """Requests of a cache that decode, without a model: every token is 7.

    Args:
        manager: The cache.
        rng: Of prompts, and of who comes and leaves.
    """

    def __init__(self, manager: JengaKVCacheManager, rng: np.random.Generator) -> None:
        self.manager, self.rng = manager, rng
        self.prepared, self.allocated = Counted(manager.runtime_inputs), Counted(manager.alloc)
        manager.runtime_inputs, manager.alloc = self.prepared, self.allocated
        self.inputs, self.alloc = CacheInputs(manager), Allocation(manager)
        manager.runtime_inputs, manager.alloc = self.prepared.function, self.allocated.function
        self.prompt = prompts_of(rng, 120)[0]
        self.running: list[TextContext] = []
        self.prompt_tokens = 0

    def join(self) -> None:
        """A new request reads its prompt; half of them the same one, whose pages the cache then shares."""
        prompt = self.prompt if self.rng.random() < 0.5 else prompts_of(self.rng, int(self.rng.integers(1, 140)))[0]
        context = request(prompt, LONGEST - 200)
        self.prompt_tokens += len(prompt)
        self.manager.claim(context, replica_idx=0)
        self.alloc(context).synchronize()
        self.inputs([[context]])
        self.go_on(context)
        self.running.append(context)

    def leave(self) -> None:
        """Some request is done."""
        self.manager.release(self.running.pop(int(self.rng.integers(len(self.running)))))

    def go_on(self, context: TextContext, tokens: int = 1) -> None:
        """A request gets tokens, as a step would give them."""
        for _ in range(tokens):
            context.update(7)
        self.manager.step(context)

    def check(self, batch: list[TextContext]) -> None:
        """A step of `batch` takes the pages and lengths that it should."""
        drafts = int(self.rng.integers(DEPTH + 1))
        for context in batch:
            context.spec_decoding_state.draft_tokens_to_verify = [0] * drafts
            context.spec_decoding_state.maybe_accepted_draft_tokens = [0] * int(self.rng.integers(DEPTH + 1))
            self.alloc(context).synchronize()
        found: Any = self.inputs(
            [batch],
            max_cache_length=LONGEST,
            batch_characteristics=BatchCharacteristics(len(batch), DEPTH + 1, LONGEST),
        )
        CPU().synchronize()
        states = [context.spec_decoding_state for context in batch]
        lengths = [
            context.tokens.processed_length + len(state.maybe_accepted_draft_tokens)
            for context, state in zip(batch, states, strict=True)
        ]
        blocks = [self.manager.get_req_blocks_per_leaf(context) for context in batch]
        page_size = self.manager.params.page_size
        assert len(found) == len(blocks[0]) == 2
        for kind, (cache,) in found.items():
            (leaf,) = [name for name in blocks[0] if name.startswith(kind)]
            np.testing.assert_array_equal(cache.cache_lengths.to_numpy(), lengths)
            table = cache.lookup_table.to_numpy()
            for row, own, length in zip(table, blocks, lengths, strict=True):
                needed = -(-(length + 1 + drafts) // page_size)
                assert row[:needed].tolist() == own[leaf][:needed]
        for context in batch:
            self.go_on(context, int(self.rng.integers(1, drafts + 2)))


def test_tables_and_lengths_follow_the_cache(manager: JengaKVCacheManager, rng: np.random.Generator) -> None:
    """Requests come, leave, are left out of steps, change places, get pages, lose those behind a window, share them."""
    books = Books(manager, rng)
    steps, decodes, counted = 600, 0, manager.metrics.input_tokens
    for _ in range(steps):
        books.running = [context for context in books.running if len(context.tokens) < context.max_length - 8]
        if len(books.running) < REQUESTS and (not books.running or rng.random() < 0.1):
            books.join()
        elif len(books.running) > 1 and rng.random() < 0.02:
            books.leave()
        batch = list(books.running)
        if rng.random() < 0.05:
            rng.shuffle(batch)
        if rng.random() < 0.05:
            batch = batch[1:] or batch
        books.check(batch)
        decodes += len(batch)
    assert books.prepared.calls < steps / 2
    assert books.allocated.calls < decodes / 10
    assert manager.metrics.input_tokens - counted == decodes + books.prompt_tokens
    while books.running:
        books.leave()
