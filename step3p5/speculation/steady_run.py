"""Requests that go from cycle to cycle together, each at a place of its own; others come and leave in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from max.pipelines.context import TextContext
from max.pipelines.modeling.types import RequestID

from ..steady_batch import is_constrained, takes_the_best
from .kept_rows import CycleRows
from .padding import padded_size
from .rows import Int64
from .state import RequestState
from .steady_cycle import Outcome, Start, SteadyCycle

PATIENCE = 16
"""Cycles for which a run has had more places than it needs before it goes on in a smaller one."""


@dataclass(frozen=True)
class Launched:
    """A cycle that was launched and whose result nobody has looked at."""

    at: float
    """By the host's clock."""
    outcome: Outcome


@dataclass(eq=False)
class Member:
    """A request of a run."""

    context: TextContext
    state: RequestState
    """Where it stood when it joined; whoever has another one by now was released or preempted."""

    end: int
    """Its processed length when the last cycle ended."""

    @property
    def stands_still(self) -> bool:
        """Whether the request is where the last cycle left it: it was not preempted, and no grammar binds it."""
        return self.context.tokens.processed_length == self.end and not is_constrained(self.context)


class _Listed(NamedTuple):
    """What is asked of the requests in every cycle, and changes where one comes or leaves."""

    contexts: list[TextContext]
    all_contexts: list[TextContext]
    takes_the_best: bool


class SteadyRun:
    """A `SteadyCycle` and the requests at its places; those where none is are filled up.

    Args:
        cycle: Its memory and graphs.
        padding: What stands at all free places, see `padding_request`.
        most_rows: Hidden states of a request to keep for depths that rest.
    """

    def __init__(self, cycle: SteadyCycle, padding: TextContext, most_rows: int) -> None:
        self.cycle, self._padding = cycle, padding
        self.places: list[Member | None] = [None] * cycle.batch_size
        self.rows = CycleRows(cycle.batch_size, most_rows)
        """What the cycles leave for depths that rest."""
        self.launched: Launched | None = None
        """The cycle after the last one that ended, if it was launched ahead of its step."""
        self._place_of: dict[RequestID, int] = {}
        self._listed: _Listed | None = None
        self._end_tokens: npt.NDArray[np.int64] | None = None
        self._verified: float | None = None
        self._cycles_too_large = 0

    def __len__(self) -> int:
        return len(self._place_of)

    def __contains__(self, context: TextContext) -> bool:
        return context.request_id in self._place_of

    def __iter__(self) -> Iterator[tuple[int, Member]]:
        """The requests with their places."""
        return ((place, member) for place, member in enumerate(self.places) if member is not None)

    def fits(self, requests: int) -> bool:
        """Whether so many requests can go on in this run, and have not had far too many places for long."""
        return requests <= self.cycle.batch_size and self._cycles_too_large < PATIENCE

    def join(self, newcomers: Sequence[tuple[Member, Start]]) -> None:
        """Lets requests begin at free places, of which there must be as many."""
        if not newcomers:
            return
        free = [place for place, member in enumerate(self.places) if member is None]
        for place, (member, _) in zip(free, newcomers, strict=False):
            self.places[place] = member
            self._place_of[member.context.request_id] = place
            self.rows.forget(place)
        self.cycle.begin({place: start for place, (_, start) in zip(free, newcomers, strict=False)})
        self._listed = None
        trackers = [context.eos_tracker for context in self.contexts]
        self._end_tokens = None
        if not any(tracker.eos_sequences for tracker in trackers):
            ends = set().union(*(tracker.eos_token_ids for tracker in trackers))
            self._end_tokens = np.array(sorted(ends), dtype=np.int64)
        self.interrupt()

    def leave(self, place: int) -> Member:
        """Frees a place; returns who had it."""
        member = self.places[place]
        assert member is not None
        self.places[place] = None
        del self._place_of[member.context.request_id]
        self.rows.forget(place)
        self._listed = None
        return member

    @property
    def contexts(self) -> list[TextContext]:
        """The requests, by place."""
        return self._lists.contexts

    @property
    def all_contexts(self) -> list[TextContext]:
        """What is at each place."""
        return self._lists.all_contexts

    @property
    def takes_the_best(self) -> bool:
        """Whether all requests take the greatest logit."""
        return self._lists.takes_the_best

    @property
    def _lists(self) -> _Listed:
        if self._listed is None:
            contexts = [member.context for _, member in self]
            everywhere = [self._padding if member is None else member.context for member in self.places]
            self._listed = _Listed(contexts, everywhere, all(map(takes_the_best, contexts)))
        return self._listed

    def end_cycle(self, hidden: npt.NDArray[np.generic] | None, counts: Int64) -> None:
        """Takes note of what a cycle left.

        Args:
            hidden: See `Outcome`.
            counts: Tokens that each place gained, `[places]`; 0 where nobody is.
        """
        if hidden is not None:
            self.rows.add(hidden, counts)
        is_too_large = padded_size(len(self), self.cycle.batch_size) < self.cycle.batch_size
        self._cycles_too_large = self._cycles_too_large + 1 if is_too_large else 0

    def ends_a_text(self, drawn: Int64) -> bool:
        """Whether a request may end with what a cycle drew, drafts that were not accepted included."""
        if self._end_tokens is None:
            return True  # some text ends with a sequence of several tokens
        return bool(np.isin(drawn, self._end_tokens).any())

    def lengths_after(self, accepted: Int64) -> Int64:
        """Positions in the cache of what is at each place, after a cycle.

        Args:
            accepted: How many drafts the cycle accepts, `[places]`, or `[1]` for all.
        """
        ends = np.array([-1 if member is None else member.end for member in self.places])
        return np.where(ends < 0, self._padding.tokens.processed_length, ends + accepted + 1)

    def interrupt(self) -> None:
        """Says that the next cycle's time will not be that of a cycle alone."""
        self._verified = None

    def seconds_of_cycle(self, verified: float) -> float | None:
        """Seconds from the verification before to that at `verified`; `None` where that is not the time to expect."""
        before, self._verified = self._verified, verified
        return None if before is None or not self.cycle.settled else verified - before
