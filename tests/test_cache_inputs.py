"""The short ways of the cache: tables, lengths and pages are what its own books say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from max.driver import CPU
from max.dtype import DType
from max.graph import DeviceRef
from max.nn.kv_cache import BatchCharacteristics, MHAKVCacheParams, MultiKVCacheParams
from max.pipelines.context import TextContext
from max.pipelines.kv_cache.paged_kv_cache.jenga_cache_manager import JengaKVCacheManager
from speculation_harness import prompts_of, request

from step3p5.cache_inputs import Allocation, CacheInputs, shorten

LONGEST = 512
PAGE_SIZE = 16
REQUESTS = 6
"""The most of a replica."""


def new_cache(replicas: int, drafts: int, enable_prefix_caching: bool = True) -> JengaKVCacheManager:
    """A cache of two kinds of attention, one of them with a window."""
    common: Any = {
        "dtype": DType.float32,
        "n_kv_heads": 1,
        "head_dim": 16,
        "num_layers": 1,
        "devices": [DeviceRef.CPU()] * replicas,
        "page_size": PAGE_SIZE,
        "data_parallel_degree": replicas,
        "enable_prefix_caching": enable_prefix_caching,
        "speculative_method": "mtp" if drafts else None,
        "num_draft_tokens": drafts,
    }
    kinds = {"full": MHAKVCacheParams(**common), "sliding": MHAKVCacheParams(**common, window_size=3 * PAGE_SIZE)}
    return JengaKVCacheManager.create(
        params=MultiKVCacheParams.from_params(kinds), available_bytes=32 << 20, max_batch_size=16, max_seq_len=LONGEST
    )


@pytest.fixture(params=[(1, 3), (2, 0)], ids=["one replica that drafts", "two replicas"])
def manager(request: pytest.FixtureRequest) -> JengaKVCacheManager:
    return new_cache(*request.param)


class Counted:
    """A function with its calls counted."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        return self.function(*arguments, **options)


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
        self.drafts = manager.params.num_draft_tokens
        self.running: list[list[TextContext]] = [[] for _ in range(manager.params.data_parallel_degree)]
        self.prompt = prompts_of(rng, 20)[0]
        self.tokens = 0
        """That were asked room for."""

    def join(self, replica: int) -> None:
        """A new request reads its prompt; half of them the same one, whose pages the cache then shares."""
        prompt = self.prompt if self.rng.random() < 0.5 else prompts_of(self.rng, int(self.rng.integers(1, 40)))[0]
        context = request(prompt, int(self.rng.integers(50, 400)))
        self.manager.claim(context, replica_idx=replica)
        self.make_room(context)
        self.inputs([[context] if index == replica else [] for index in range(len(self.running))])
        self.go_on(context)
        self.running[replica].append(context)

    def leave(self, replica: int, index: int) -> None:
        """A request is done."""
        self.manager.release(self.running[replica].pop(index))

    def make_room(self, context: TextContext) -> None:
        """What a scheduler does before each step."""
        self.alloc(context).synchronize()
        self.tokens += context.tokens.active_length

    def go_on(self, context: TextContext, tokens: int = 1) -> None:
        """A request gets tokens, as a step would give them."""
        for _ in range(tokens):
            context.update(7)
        self.manager.step(context)

    def check(self, batches: list[list[TextContext]]) -> None:
        """A step of `batches` takes the pages and lengths that it should."""
        width = int(self.rng.integers(self.drafts + 1))
        for context in (context for batch in batches for context in batch):
            state = context.spec_decoding_state
            state.draft_tokens_to_verify = [0] * width
            state.maybe_accepted_draft_tokens = [0] * int(self.rng.integers(self.drafts + 1))
            self.make_room(context)
        most = BatchCharacteristics(max(map(len, batches)), self.drafts + 1, LONGEST)
        found: Any = self.inputs(batches, max_cache_length=LONGEST, batch_characteristics=most)
        CPU().synchronize()
        for replica, batch in enumerate(batches):
            self.check_replica({kind: caches[replica] for kind, caches in found.items()}, batch, width)
        for context in (context for batch in batches for context in batch):
            self.go_on(context, int(self.rng.integers(1, width + 2)))

    def check_replica(self, caches: dict[str, Any], batch: list[TextContext], width: int) -> None:
        """The pages of `batch` as far as it reads and writes them, and its lengths."""
        states = [context.spec_decoding_state for context in batch]
        lengths = [
            context.tokens.processed_length + len(state.maybe_accepted_draft_tokens)
            for context, state in zip(batch, states, strict=True)
        ]
        blocks = [self.manager.get_req_blocks_per_leaf(context) for context in batch]
        assert len(caches) == 2
        for kind, cache in caches.items():
            np.testing.assert_array_equal(cache.cache_lengths.to_numpy(), lengths)
            for row, own, length in zip(cache.lookup_table.to_numpy(), blocks, lengths, strict=True):
                (leaf,) = [name for name in own if name.startswith(kind)]
                needed = -(-(length + 1 + width) // PAGE_SIZE)
                assert row[:needed].tolist() == own[leaf][:needed]


def test_the_short_ways_follow_the_cache(manager: JengaKVCacheManager, rng: np.random.Generator) -> None:
    """Requests come, leave, are left out of steps, change places, get pages, lose those behind a window, share them;
    now and then a replica has none.
    """
    books = Books(manager, rng)
    steps, decodes = 800, 0
    for _ in range(steps):
        for replica, running in enumerate(books.running):
            for index in reversed(range(len(running))):
                if len(running[index].tokens) + books.drafts + 1 >= running[index].max_length:
                    books.leave(replica, index)
            if len(running) < REQUESTS and rng.random() < (0.05 if running else 0.2):
                books.join(replica)
            elif running and rng.random() < 0.02:
                books.leave(replica, int(rng.integers(len(running))))
        if not any(books.running):
            books.join(0)
        batches = [list(running) for running in books.running]
        if rng.random() < 0.05:
            batches[0].reverse()
        if rng.random() < 0.05:
            batches[0] = batches[0][1:] or batches[0]
        books.check(batches)
        decodes += sum(map(len, batches))
    assert books.prepared.calls < steps / 2
    assert books.allocated.calls < decodes / 4
    assert manager.metrics.input_tokens == books.tokens


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_pages_are_given_shared_and_freed_as_max_does(rng: np.random.Generator, enable_prefix_caching: bool) -> None:
    """Two caches side by side, one with the short ways: every request has the same pages in both after every step."""
    caches = [new_cache(1, 3, enable_prefix_caching) for _ in range(2)]
    shorten(caches[0])
    shared = prompts_of(rng, 50)[0]
    running: list[list[TextContext]] = []
    for _ in range(400):
        if len(running) < REQUESTS and rng.random() < 0.1:
            own = prompts_of(rng, int(rng.integers(1, 60)))[0]
            prompt, new_tokens = shared if rng.random() < 0.5 else own, int(rng.integers(20, 300))
            running.append([request(prompt, new_tokens) for _ in caches])
            for cache, context in zip(caches, running[-1], strict=True):
                cache.claim(context, replica_idx=0)
        for index in reversed(range(len(running))):
            if len(running[index][0].tokens) + 4 >= running[index][0].max_length or rng.random() < 0.01:
                for cache, context in zip(caches, running.pop(index), strict=True):
                    cache.release(context)
        gained = rng.integers(1, 5, size=len(running)).tolist()
        for cache, contexts in zip(caches, zip(*running, strict=True), strict=False):
            for context, tokens in zip(contexts, gained, strict=True):
                cache.alloc(context).synchronize()
                for token in range(tokens):
                    context.update(token % 2)
                cache.step(context)
        for both in running:
            pages = [cache.get_req_blocks_per_leaf(context) for cache, context in zip(caches, both, strict=True)]
            assert pages[0] == pages[1]
        assert caches[0].little_block_count() == caches[1].little_block_count()
    assert caches[0].metrics == caches[1].metrics
