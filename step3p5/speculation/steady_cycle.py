"""A cycle of requests that only decode: verification and drafting launched at once, without the host between them.

Each batch size and depth has cycles of its own, down to depth 0, which is plain decoding.

Everything that goes from a cycle to the next stays on the device in memory of the batch size's own, so that all graphs
can be captured. The host learns what was drawn and accepted while the depths draft.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, DeviceEvent, Usage, batch_inplace_copy
from max.dtype import DType
from max.nn.kv_cache import KVCacheInputsPerDevice

from ..model import cache_leaves
from ..mtp import UNKNOWN_TOKEN
from .captured import CapturedGraph
from .drafted import Drafted, DraftReader
from .host_rows import rows_to_host
from .kept_rows import DeviceRows, KeptRows, Rows, split_rows
from .row_copies import copies_of_rows, copies_to_places
from .rows import Int64
from .transfers import OneCopy

Cache: TypeAlias = KVCacheInputsPerDevice[Buffer, Buffer]

Caches: TypeAlias = Mapping[str, Sequence[Cache]]
"""The cache of each kind, on the one device."""

Sampler: TypeAlias = Callable[[Buffer], Buffer]
"""Draws a token for each row of logits `[rows, vocab_size]`, `[rows]` int64, all on the device."""

SETTLED = 2
"""Cycles of a batch size and depth that are executed before its graphs are captured: many last no longer."""

MOST_CAPTURED_ROWS = 2048
"""Verified tokens of all captured batch sizes together; a token's logits take 0.8 MB."""


@dataclass(frozen=True)
class DepthInputs:
    """What a depth takes besides a cycle's own: its kind of cache, its scalars, and what its head takes."""

    kind: str
    scalars: tuple[Buffer, Buffer]
    head: Callable[[], tuple[Buffer, ...]]


@dataclass(frozen=True)
class CycleGraphs:
    """The compiled graphs of a cycle, and what they are fed with."""

    verify: CapturedGraph
    draw: CapturedGraph
    """Draws greedily."""

    accept: CapturedGraph
    depths: Sequence[CapturedGraph]
    hand_over: CapturedGraph
    depth_inputs: Sequence[DepthInputs]
    refresh_heads: Callable[[], None]
    """Brings what the depths' heads score up to date."""

    known_tokens: Buffer
    """Tokens that can be drawn, `[1]` int64."""

    hidden_size: int
    hidden_dtype: DType
    device: Device
    longest: int
    """Positions for which a captured graph's attention is laid out."""

    @property
    def all(self) -> tuple[CapturedGraph, ...]:
        """Every graph, in the order of a cycle."""
        return (self.verify, self.draw, self.accept, *self.depths, self.hand_over)

    @property
    def keep(self) -> int:
        """Positions that the depths may read once more: the same for cycles of every depth, so that any can follow."""
        return len(self.depths) - 1


@dataclass(frozen=True)
class Start:
    """Where a request stands when a cycle begins.

    `window` are its tokens at the positions `p - K … p`, `kept` the hidden states of `p - K … p - 1`, in pieces.
    """

    window: Int64
    drafts: Sequence[int]
    kept: Sequence[Rows]


@dataclass(frozen=True)
class Outcome:
    """What the host reads of a cycle. It is there once `ready`, and until the cycle after the next is launched."""

    ready: DeviceEvent | None
    """`None` where it is there already."""

    drawn: Int64
    """What was drawn for each request, `[batch, d + 1]`."""

    accepted: Int64
    """How many drafts of each request that accepts, `[batch]`."""

    hidden: npt.NDArray[Any] | None
    """The hidden states `[batch, d + 1, hidden_size]`; `None` where no depth rests that will want them."""

    def wait(self) -> None:
        """Returns once it is there."""
        if self.ready is not None:
            self.ready.synchronize()


class SteadyCycle:
    """The memory and the graphs of one batch size and depth.

    Args:
        graphs: The compiled graphs.
        batch_size: Requests.
        depth: How many tokens each cycle verifies and drafts, at most as many as there are depths.
    """

    def __init__(self, graphs: CycleGraphs, batch_size: int, depth: int) -> None:
        self.batch_size, self.depth = batch_size, depth
        self._graphs, self._device = graphs, graphs.device
        self._depths = list(zip(graphs.depths, graphs.depth_inputs, strict=True))[:depth]
        self._cycles = 0
        keep = graphs.keep
        self._verified = self._buffer(DType.int64, batch_size * (depth + 1))
        self._window = self._buffer(DType.int64, batch_size, keep + 1)
        self._kept = self._buffer(graphs.hidden_dtype, batch_size, keep, graphs.hidden_size)
        self._offsets = self._constant(np.arange(batch_size + 1, dtype=np.uint32) * np.uint32(depth + 1))
        self._logit_rows = self._constant(np.arange(batch_size * (depth + 1)))
        self._next_places = self._constant(np.arange(batch_size * (depth + 1)).reshape(depth + 1, -1).T.reshape(-1))
        self._unknown = self._constant(np.full(batch_size, UNKNOWN_TOKEN, dtype=np.int64))
        # A copy goes on after the call, on a CPU too, and keeps no source alive. A cycle lies between two of these.
        self._begun: deque[Sequence[Buffer]] = deque(maxlen=4)
        self._drafted: list[Buffer] = []
        self._reader = DraftReader(graphs.device)
        self._lengths = OneCopy(graphs.device)
        self._to_host: list[tuple[Buffer, Buffer | None]] = []
        """Where the host reads results and hidden states, by turns: one cycle is launched before another is read."""
        if not graphs.device.is_host:
            pinned = Usage.STAGING | Usage.UNTRACKED
            shape = [batch_size * (depth + 1), graphs.hidden_size]
            self._to_host = [
                (
                    Buffer(DType.int64, [batch_size, depth + 2], graphs.device, pinned),
                    Buffer(graphs.hidden_dtype, shape, graphs.device, pinned) if self.leaves_rows else None,
                )
                for _ in range(2)
            ]

    def begin(self, starts: Mapping[int, Start]) -> None:
        """Lets requests begin at places of the cycle, behind all that was launched; other places stay as they are.

        Args:
            starts: Where the requests stand, by their places in ascending order.
        """
        width, keep, hidden_size = self.depth + 1, self._graphs.keep, self._graphs.hidden_size
        windows = np.array([start.window for start in starts.values()], dtype=np.int64)
        verified = np.array([[start.window[-1], *start.drafts[:]] for start in starts.values()], dtype=np.int64)
        window_rows = self._window.view(DType.int64, (self.batch_size * (keep + 1),))
        kept_rows = self._kept.view(self._kept.dtype, (self.batch_size * keep, hidden_size))
        pieces = [piece for start in starts.values() for piece in start.kept]
        copies = [
            *copies_to_places(window_rows, Buffer.from_numpy(windows.reshape(-1)), starts, keep + 1),
            *copies_to_places(self._verified, Buffer.from_numpy(verified.reshape(-1)), starts, width),
        ]
        rows = [row for place in starts for row in range(place * keep, (place + 1) * keep)]
        copies += copies_of_rows(kept_rows, rows, pieces)
        to, sources = zip(*copies, strict=True)
        batch_inplace_copy(to, sources)
        self._begun.append(sources)

    def at_lengths(self, caches: Caches, lengths: Int64) -> Caches:
        """The same caches with `lengths` positions of each request in them."""
        (sent,) = self._lengths.send(lengths.astype(np.uint32))
        return {kind: [dataclasses.replace(cache, cache_lengths=sent)] for kind, (cache,) in caches.items()}

    def launch(self, caches: Caches, sample: Sampler | None) -> Outcome:
        """Launches a cycle.

        Args:
            caches: Of the requests, by kind, with room for the drafts.
            sample: What draws; `None` for the greatest logit.

        Returns:
            What becomes of it.
        """
        graphs = self._graphs
        self._cycles += 1
        captured = self._cycles > SETTLED

        def run(graph: CapturedGraph, *inputs: Buffer) -> list[Buffer]:
            return graph.run(self._key, *inputs) if captured else graph.execute(*inputs)

        logits, hidden = run(graphs.verify, self._verified, self._offsets, self._logit_rows, *cache_leaves(caches))
        drawn = run(graphs.draw, logits, graphs.known_tokens)[0] if sample is None else sample(logits)
        each = (self.batch_size, self.depth + 1)
        previous, tokens, following, last_rows, lengths, result = run(
            graphs.accept,
            drawn.view(drawn.dtype, each),
            hidden.view(hidden.dtype, (*each, graphs.hidden_size)),
            next(iter(caches.values()))[0].cache_lengths,
            self._verified.view(self._verified.dtype, each),
            self._kept,
            self._window,
        )
        outcome = self._read(result, hidden)
        if not self._depths:
            return outcome
        graphs.refresh_heads()  # a copy a head, which the host starts while the target verifies
        # A depth reads as many rows of each request as the target, at other positions.
        leaves = {
            kind: cache_leaves(dataclasses.replace(caches[kind][0], cache_lengths=lengths))
            for kind in {inputs.kind for _, inputs in self._depths}
        }
        self._drafted = []
        for graph, inputs in self._depths:
            previous, tokens, chosen, _ = run(
                graph,
                previous,
                tokens,
                following,
                last_rows,
                self._unknown,
                self._offsets,
                *inputs.scalars,
                *inputs.head(),
                *leaves[inputs.kind],
            )
            self._drafted.append(chosen)
        drafted = [*self._drafted, *[self._unknown] * (len(graphs.depths) - self.depth)]
        run(graphs.hand_over, self._window, self._next_places, self._verified, *drafted)
        return outcome

    @property
    def leaves_rows(self) -> bool:
        """Whether some depth rests, which will want the cycle's hidden states when it drafts again."""
        return self.depth < len(self._graphs.depths)

    @property
    def settled(self) -> bool:
        """Whether the last cycle ran as all that follow will: nothing was captured in it."""
        return self._cycles > SETTLED + 1

    def drafted(self) -> Drafted:
        """What the last cycle drafted, as a copy."""
        return self._reader.start([drafts.copy() for drafts in self._drafted])

    def kept(self) -> list[Rows]:
        """The hidden states of each request's last positions, as a copy."""
        shape = (self.batch_size * self._graphs.keep, self._graphs.hidden_size)
        rows = self._kept.copy().view(self._kept.dtype, shape)
        kept: Rows = rows_to_host(rows) if self._device.is_host else DeviceRows(0, shape[0], KeptRows(rows))
        return split_rows(kept, [self._graphs.keep] * self.batch_size)

    def forget_captures(self) -> None:
        """Releases what was captured for this batch size and depth."""
        self._cycles = 0
        for graph in self._graphs.all:
            graph.forget(self._key)

    @property
    def _key(self) -> tuple[int, int]:
        """What a captured graph's shapes depend on."""
        return self.batch_size, self.depth

    def _read(self, result: Buffer, hidden: Buffer) -> Outcome:
        """Brings to the host what it reads of a cycle.

        Args:
            result: Of each request what was drawn, and how many of its drafts that accepts if it had any.
            hidden: The hidden states of what was verified.
        """
        shape = (self.batch_size, self.depth + 1, self._graphs.hidden_size)
        ready, states = None, None
        if not self._to_host:
            on_host = result.to_numpy()
            if self.leaves_rows:
                states = rows_to_host(hidden).reshape(shape)
        else:
            to_result, to_hidden = self._to_host[self._cycles % len(self._to_host)]
            to_result.inplace_copy_from(result)
            on_host = to_result.to_numpy()
            if to_hidden is not None:
                to_hidden.inplace_copy_from(hidden)
                states = rows_to_host(to_hidden).reshape(shape)
            ready = self._device.default_queue.record_event()
        accepted = on_host[:, -1] if self.depth else np.zeros(self.batch_size, dtype=np.int64)
        return Outcome(ready, on_host[:, : self.depth + 1], accepted, states)

    def _buffer(self, dtype: DType, *shape: int) -> Buffer:
        return Buffer.zeros(shape, dtype, self._device)

    def _constant(self, values: npt.NDArray[Any]) -> Buffer:
        return Buffer.from_numpy(values).to(self._device)


class SteadyCycles:
    """The cycles of all batch sizes and depths; what was not used for the longest time gives its captured graphs up.

    Args:
        graphs: The compiled graphs.
    """

    def __init__(self, graphs: CycleGraphs) -> None:
        self.graphs = graphs
        self._cycles: dict[tuple[int, int], SteadyCycle] = {}

    def of_size(self, batch_size: int, depth: int) -> SteadyCycle:
        """The cycle of a batch size and depth."""
        key = batch_size, depth
        cycle = self._cycles.pop(key, None) or SteadyCycle(self.graphs, batch_size, depth)
        self._cycles[key] = cycle  # the last one used stands last
        while sum(size * (deep + 1) for size, deep in self._cycles) > MOST_CAPTURED_ROWS and len(self._cycles) > 1:
            self._cycles.pop(next(iter(self._cycles))).forget_captures()
        return cycle
