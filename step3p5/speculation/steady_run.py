"""Requests that go from cycle to cycle together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from max.pipelines.context import TextContext

from ..steady_batch import same_requests
from .kept_rows import CycleRows
from .rows import Int64
from .steady_cycle import Outcome, SteadyCycle


@dataclass(frozen=True)
class Launched:
    """A cycle that was launched and whose result nobody has looked at."""

    at: float
    """By the host's clock."""
    outcome: Outcome


class SteadyRun:
    """A batch in a `SteadyCycle`.

    Args:
        batch: The requests, in the order of the cycle.
        padding: What comes after them up to the cycle's size.
        cycle: Its memory and graphs.
        most_rows: Hidden states of a request to keep for depths that rest.
    """

    def __init__(
        self, batch: Sequence[TextContext], padding: Sequence[TextContext], cycle: SteadyCycle, most_rows: int
    ) -> None:
        self.batch, self.padding, self.cycle = list(batch), list(padding), cycle
        self.rows = CycleRows(len(batch), most_rows)
        """What the cycles leave for depths that rest."""
        self.ends: list[int] = []
        """Processed length of each request when the last cycle ended."""
        self.launched: Launched | None = None
        """The cycle after the last one that ended, if it was launched ahead of its step."""
        trackers = [context.eos_tracker for context in batch]
        self._end_tokens: list[int] | None = None
        """Tokens that end a text; `None` where sequences of several do."""
        if not any(tracker.eos_sequences for tracker in trackers):
            self._end_tokens = sorted(set().union(*(tracker.eos_token_ids for tracker in trackers)))
        self.end_cycle()
        self._verified: float | None = None

    def goes_on_in(self, batch: Sequence[TextContext]) -> bool:
        """Whether `batch` is this one, as the last cycle left it."""
        return same_requests(self.batch, batch) and all(map(self.stands_still, range(len(batch))))

    def stands_still(self, index: int) -> bool:
        """Whether a request is where the last cycle left it: it was not preempted."""
        return self.batch[index].tokens.processed_length == self.ends[index]

    def end_cycle(self) -> None:
        """Takes note of where the requests are."""
        self.ends = [context.tokens.processed_length for context in self.batch]

    def ends_a_text(self, result: Int64) -> bool:
        """Whether a request may end with what a cycle drew, drafts that were not accepted included."""
        return self._end_tokens is None or bool(np.isin(result[:, :-1], self._end_tokens).any())

    def lengths_after(self, accepted: Int64) -> Int64:
        """Positions in the cache of each request and what fills the batch up, after a cycle.

        Args:
            accepted: How many drafts of each request the cycle accepts, `[batch]`, or `[1]` for all.
        """
        padding = [context.tokens.processed_length for context in self.padding]
        return np.concatenate([np.array(self.ends) + accepted + 1, np.array(padding, dtype=np.int64)])

    def seconds_of_cycle(self, verified: float) -> float | None:
        """Seconds from the verification before to that at `verified`; `None` where that is not the time to expect."""
        before, self._verified = self._verified, verified
        return None if before is None or not self.cycle.settled else verified - before
