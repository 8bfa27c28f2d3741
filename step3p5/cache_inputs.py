"""What a step takes from the cache and leaves there, with less to do than MAX has where requests decode.

MAX writes all pages of all requests anew at each step, in Python, request by request, makes sure of room for each, and
looks for full pages. But a request that decodes gets another page once in a page's worth of tokens. Here a step writes
what differs from the step before, and the lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from max.driver import Buffer
from max.nn.kv_cache import BatchCharacteristics, KVCacheInputs
from max.pipelines.context import TextContext
from max.pipelines.kv_cache.kv_connector import CompletedTransfer, KVTransfer
from max.pipelines.kv_cache.paged_kv_cache._common import KV_CACHE_LENGTHS
from max.pipelines.kv_cache.paged_kv_cache.jenga_cache_manager import JengaKVCacheManager
from max.support.math import ceildiv

Batches: TypeAlias = Sequence[Sequence[TextContext]]
"""Requests by replica."""

Shape: TypeAlias = tuple[tuple[int, ...], int, BatchCharacteristics]
"""What the shapes of a step's inputs depend on: requests of each replica, and what MAX is told of their lengths."""


@dataclass(eq=False)
class _Replica:
    """What the devices of a replica have of the last step's requests."""

    covered: npt.NDArray[np.int64]
    """Positions of each request that its pages in the tables have room for."""

    tables: dict[str, npt.NDArray[np.uint32]]
    """The pages of each request, `[requests, pages]`; 0 where it has none."""

    seen: list[list[Any]]
    """By table, MAX's list of each request's pages. Another request has another one, and MAX makes a new one where it
    changes a page."""

    @classmethod
    def of(cls, requests: int, tables: dict[str, npt.NDArray[np.uint32]]) -> _Replica:
        """Nothing is there of so many requests."""
        return cls(np.zeros(requests, dtype=np.int64), tables, [[None] * requests for _ in tables])


@dataclass(frozen=True)
class _Step:
    """What the devices have, as long as nothing else is sent."""

    shape: Shape
    inputs: KVCacheInputs[Buffer, Buffer]
    replicas: list[_Replica]


@dataclass(frozen=True)
class _Reach:
    """How far requests that decode get in a step."""

    lengths: npt.NDArray[np.int64]
    """Positions in the cache, `[requests]`; with drafts on their way, the most that it can be."""

    widest: int
    """The most tokens that a request reads."""

    ends: npt.NDArray[np.int64]
    """One past the last position that each may write, `[requests]`."""

    @classmethod
    def of(cls, batch: Sequence[TextContext], written_ahead: int) -> _Reach | None:
        """The reach of `batch`, which writes `written_ahead` positions for drafts; `None` if a prompt is among it."""
        tokens = [context.tokens for context in batch]
        if any(own.active_length != 1 for own in tokens):
            return None
        states = [context.spec_decoding_state for context in batch]
        lengths = np.array([own.processed_length for own in tokens], dtype=np.int64)
        lengths += np.array([len(state.maybe_accepted_draft_tokens) for state in states], dtype=np.int64)
        widths = 1 + np.array([len(state.draft_tokens_to_verify) for state in states], dtype=np.int64)
        return cls(lengths, int(widths.max(initial=0)), lengths + widths + written_ahead)


class CacheInputs:
    """A cache manager's `runtime_inputs`, with a short way for a batch of the shape of the one before.

    The short way is for decoding whose greatest lengths are given, as they are where graphs are captured.

    Args:
        manager: The cache.
    """

    def __init__(self, manager: JengaKVCacheManager) -> None:
        self._manager = manager
        self._prepare = manager.runtime_inputs
        self._leaves = list(manager.groups)
        self._last: _Step | None = None

    def __call__(
        self,
        batches: Batches,
        *,
        max_cache_length: int | None = None,
        batch_characteristics: BatchCharacteristics | None = None,
    ) -> KVCacheInputs[Buffer, Buffer]:
        """The cache as a step of `batches` takes it: see `PagedKVCacheManagerInterface.runtime_inputs`."""
        last, self._last = self._last, None  # until all is on its way
        lengths: Any = {"max_cache_length": max_cache_length, "batch_characteristics": batch_characteristics}
        if max_cache_length is None or batch_characteristics is None:
            return self._prepare(batches, **lengths)
        reaches = self._reaches(batches, batch_characteristics)
        if reaches is None:
            return self._prepare(batches, **lengths)
        shape = tuple(map(len, batches)), max_cache_length, batch_characteristics
        if last is not None and last.shape == shape:
            return self._bring_up_to_date(last, batches, reaches)
        inputs = self._prepare(batches, **lengths)
        pages = ceildiv(max_cache_length, self._manager.params.page_size)
        last = _Step(shape, inputs, [_Replica.of(len(batch), self._tables(len(batch), pages)) for batch in batches])
        for replica, batch, reach in zip(last.replicas, batches, reaches, strict=True):
            self._update(replica, batch, reach)
        self._last = last
        return last.inputs

    def advance(self, batches: Batches) -> KVCacheInputs[Buffer, Buffer] | None:
        """What the last call gave, brought up to date for a step of the same shape.

        Returns:
            The same object; `None`, and nothing is sent, if a step of `batches` has another shape.
        """
        if self._last is None or self._last.shape[0] != tuple(map(len, batches)):
            return None
        reaches = self._reaches(batches, self._last.shape[2])
        if reaches is None:
            return None
        last, self._last = self._last, None
        return self._bring_up_to_date(last, batches, reaches)

    def _bring_up_to_date(
        self, last: _Step, batches: Batches, reaches: Sequence[_Reach]
    ) -> KVCacheInputs[Buffer, Buffer]:
        """Makes the inputs of a step of the same shape those of the next one."""
        for replica_idx in range(len(batches)):
            self._manager.offload(replica_idx)
        self._write(last.replicas, batches, reaches)
        self._last = last
        return last.inputs

    def _tables(self, requests: int, pages: int) -> dict[str, npt.NDArray[np.uint32]]:
        """A table for each kind of attention, as wide as MAX makes them."""
        leaves = self._manager.params.leaves()
        shapes = {name: leaves[name].staged_input_shapes(requests, pages)[name][0] for name in self._leaves}
        return {name: np.zeros(shape, dtype=np.uint32) for name, shape in shapes.items()}

    def _reaches(self, batches: Batches, most: BatchCharacteristics) -> list[_Reach] | None:
        """How far the requests get; `None` if one does not decode, or MAX is to refuse the batch."""
        written_ahead = self._manager.params.num_draft_tokens
        reaches = []
        for batch in batches:
            reach = _Reach.of(batch, written_ahead)
            if (
                reach is None
                or reach.widest > most.max_prompt_length
                or reach.ends.max(initial=0) > most.max_cache_valid_length
                or len(batch) > most.batch_size
            ):
                return None
            reaches.append(reach)
        return reaches

    def _write(self, replicas: Sequence[_Replica], batches: Batches, reaches: Sequence[_Reach]) -> None:
        """Sends the lengths, and the tables that differ from what the devices have."""
        with self._manager._stager.stage() as staging:
            for replica_idx, (replica, batch, reach) in enumerate(zip(replicas, batches, reaches, strict=True)):
                host, _ = staging.get(f"{replica_idx}/{KV_CACHE_LENGTHS}", (len(batch),))
                host.to_numpy()[:] = reach.lengths
                if self._update(replica, batch, reach):
                    for leaf, table in replica.tables.items():
                        host, _ = staging.get(f"{replica_idx}/{leaf}", table.shape)
                        host.to_numpy()[:] = table

    def _update(self, replica: _Replica, batch: Sequence[TextContext], reach: _Reach) -> bool:
        """Brings a replica's tables up to date; whether there was anything to do."""
        groups: Mapping[str, Any] = self._manager.groups
        ids = [context.request_id for context in batch]
        now = [list(map(groups[leaf]._bids.get, ids)) for leaf in self._leaves]
        changed = reach.ends > replica.covered
        for before_pages, pages in zip(replica.seen, now, strict=True):
            for place, (one, other) in enumerate(zip(before_pages, pages, strict=True)):
                if one is not other or other is None:
                    changed[place] = True
        places = np.flatnonzero(changed).tolist()
        for place in places:
            context = batch[place]
            required = [self._manager._num_required_blocks(context)]
            for leaf, table, seen in zip(self._leaves, replica.tables.values(), replica.seen, strict=True):
                (pages_of,) = groups[leaf].forward_blocks([context], required)[leaf]
                table[place] = 0
                table[place, : len(pages_of)] = pages_of
                seen[place] = groups[leaf]._bids[context.request_id]
            replica.covered[place] = required[0] * self._manager.params.page_size
        return bool(places)


class Allocation:
    """A cache manager's `alloc`, with a short way for a request whose pages have room for its next step.

    A scheduler asks for room for every request before each step. Requests that decode need a page now and then.

    Args:
        manager: The cache.
    """

    def __init__(self, manager: JengaKVCacheManager) -> None:
        self._manager = manager
        self._alloc = manager.alloc

    def __call__(self, context: TextContext) -> KVTransfer:
        """Gives a request the pages for its next step: see `PagedKVCacheManagerInterface.alloc`."""
        manager = self._manager
        # What has not begun may find pages in the prefix cache; a connector has transfers to look after.
        if context.tokens.processed_length == 0 or manager._connector is not None or any(manager._pending_transfers):
            return self._alloc(context)
        required, request_id = manager._num_required_blocks(context), context.request_id
        for leaf, group in manager.groups.items():
            if len(group.blocks_of(request_id)[leaf]) < required:
                return self._alloc(context)
        manager._metrics.input_tokens += context.tokens.active_length
        return CompletedTransfer()


class Publication:
    """A cache manager's `step`, with a short way for a request that has filled no page since the last one.

    MAX hands full pages to the prefix cache, and frees those that slid out of a window: nothing else changes.

    Args:
        manager: The cache.
    """

    def __init__(self, manager: JengaKVCacheManager) -> None:
        self._manager = manager
        self._step = manager.step
        self._page_size = manager.params.page_size

    def __call__(self, context: TextContext) -> None:
        """Takes note of what a step has written: see `PagedKVCacheManagerInterface.step`."""
        manager = self._manager
        full = context.tokens.processed_length // self._page_size * self._page_size
        if not manager.params.enable_prefix_caching or manager._state_of(context).committed_idx != full:
            self._step(context)


def shorten(manager: Any) -> None:
    """Gives a cache manager the short ways, if it is of the kind that has a table for each kind of attention."""
    if isinstance(manager, JengaKVCacheManager):
        manager.runtime_inputs = CacheInputs(manager)
        manager.alloc = Allocation(manager)
        manager.step = Publication(manager)
