"""How deep to draft: by what a cycle costs and yields at each depth, both measured as the requests run.

A cycle drafts `d` tokens of each request and verifies them. With a conditional acceptance `a_k` at depth `k` it gives a
request `1 + a_0 + a_0 a_1 + …` tokens. The depth whose tokens come fastest is chosen, for the batch at hand; 0 is plain
decoding. For batch sizes unlike all before, costs are those that the bytes to read foretell, in proportion to what has
been measured; plain decoding and every depth that may pay by them are then measured. What is not in use is tried now
and then, so that a change of the requests or of the machine is noticed: each depth for a few cycles to learn its time,
and where nothing is drafted, a few requests for a while to learn their acceptance.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .cycle_times import CycleTimes
from .padding import padded_size
from .trials import AFTERMATH, TrialClock, TrialKind, Trials, acceptance_cycles

DOUBT = 1.3
"""A depth that by the bytes is slower than the best by more than this is not measured before the next trial."""

ACCEPTANCE_WINDOW = 256.0
"""About so many of a depth's last drafts make its acceptance."""

RECENT_WINDOW = 16.0
CHANGE = 0.35
"""Where the acceptance of a depth's last so many drafts lies this far from the estimate, it takes its place at once."""

DOUBTED_WINDOW = 16.0
"""So many when a trial begins: what was believed may be long out of date."""

PRIOR_ACCEPTANCE = 0.7
PRIOR_WEIGHT = 4.0
"""What is believed before anything was verified, and how many drafts it takes to outweigh it."""

MEASURING = 10
"""Most cycles for which a depth is used only to measure it."""


Unread: TypeAlias = Callable[[int], int]
"""Positions that the first so many depths have not read, of all requests: what drafting so deep begins with."""


@dataclass(frozen=True)
class DraftPlan:
    """How deep to draft now, and for how many of the batch's requests."""

    depth: int
    num_requests: int


def tokens_per_cycle(acceptance: Sequence[float]) -> float:
    """Tokens that a cycle gives a request, `acceptance[k]` being that of depth `k` given the depths before it."""
    total = reached = 1.0
    for rate in acceptance:
        reached *= rate
        total += reached
    return total


class FixedDepth:
    """The depth that a table of batch sizes gives.

    Args:
        schedule: Ranges of batch sizes as (first, last, depth), ascending; what lies between two belongs to the first.
        max_depth: The most that can be drafted.
    """

    def __init__(self, schedule: Sequence[tuple[int, int, int]], max_depth: int) -> None:
        self._schedule, self._max_depth = schedule, max_depth

    def plan(self, batch: int, pure: bool, unread: Unread | None = None) -> DraftPlan:
        """What to draft now for a batch of `batch` requests."""
        depths = [depth for first, _, depth in self._schedule if first <= batch]
        return DraftPlan(min(depths[-1], self._max_depth), batch)

    def record_acceptance(self, requests: Sequence[tuple[int, int]]) -> None:
        """Learns nothing."""

    def record_verification(self, batch: int, depth: int, seconds: float) -> None:
        """Learns nothing."""

    def record_drafting(self, batch: int, depth: int, seconds: float) -> None:
        """Learns nothing."""

    def record_catching_up(self, positions: int, seconds: float) -> None:
        """Learns nothing."""

    def record_step(self, tokens: int, seconds: float) -> None:
        """Learns nothing."""

    def try_out_with(self, trials: Trials) -> None:
        """Tries nothing out."""


class AdaptiveDepth:
    """The depth that pays, from 0 to `max_depth`; batches are told apart by powers of two.

    Args:
        max_depth: The most that can be drafted.
        cycle_bytes: What a cycle reads by batch size and depth, in any unit: the prior of its time.
    """

    def __init__(self, max_depth: int, cycle_bytes: Callable[[int, int], float]) -> None:
        self._max_depth = max_depth
        self._times = CycleTimes(functools.cache(cycle_bytes))
        self._accepted = [PRIOR_ACCEPTANCE * PRIOR_WEIGHT] * max_depth
        self._verified = [PRIOR_WEIGHT] * max_depth
        self._recent = [PRIOR_ACCEPTANCE] * max_depth
        self._depth: int | None = None
        """The depth in use, but for measurements and trials."""
        self._regret = 0.0
        """Seconds that the best other depth would have saved since this one is in use, so far as is known."""
        self._seconds_a_position: float | None = None
        """What it takes to read a position that was left unread."""
        self._measuring: tuple[int, int] | None = None
        """A batch size and the depth that is measured for it."""
        self._tries: Counter[tuple[int, int]] = Counter()
        """For how many cycles each was."""
        self._clock = TrialClock()
        self._acceptance_cycles = 0
        """Of the trial."""
        self._running = 0
        self._trials = Trials()

    def try_out_with(self, trials: Trials) -> None:
        """Sets how depths that are not in use are tried."""
        self._trials = trials

    @property
    def acceptance(self) -> list[float]:
        """The current estimate for each depth, given the depths before it."""
        return [accepted / verified for accepted, verified in zip(self._accepted, self._verified, strict=True)]

    def record_acceptance(self, requests: Sequence[tuple[int, int]]) -> None:
        """Learns from one step's requests, each as (drafts verified, drafts accepted)."""
        for index in range(self._max_depth):
            reached = sum(verified > index <= accepted for verified, accepted in requests)
            if reached:
                accepted_now = sum(accepted > index for _, accepted in requests)
                self._forget(index, max(ACCEPTANCE_WINDOW - reached, 0.0))
                self._accepted[index] += accepted_now
                self._verified[index] += reached
                share = min(1.0, reached / RECENT_WINDOW)
                self._recent[index] += share * (accepted_now / reached - self._recent[index])
                if abs(self._recent[index] - self.acceptance[index]) > CHANGE:
                    self._verified[index] = RECENT_WINDOW
                    self._accepted[index] = RECENT_WINDOW * self._recent[index]

    def record_verification(self, batch: int, depth: int, seconds: float) -> None:
        """Learns the time of a verification of `depth` drafts of each of `batch` requests."""
        self._times.record_verification(_size(batch), depth, seconds)

    def record_drafting(self, batch: int, depth: int, seconds: float) -> None:
        """Learns the time of drafting `depth` deep for `batch` requests."""
        self._times.record_drafting(_size(batch), depth, seconds)

    def record_catching_up(self, positions: int, seconds: float) -> None:
        """Learns what it takes to read many positions that were left unread."""
        self._seconds_a_position = seconds / positions

    def record_step(self, tokens: int, seconds: float) -> None:
        """Learns the tokens and the time of a step of requests past their prompts, from the end of the one before."""
        self._clock.record(tokens, seconds)

    def plan(self, batch: int, pure: bool, unread: Unread | None = None) -> DraftPlan:
        """What to draft now, called once a step.

        Args:
            batch: Requests in the step.
            pure: Whether all of them are past their prompts; nothing is tried out in a step that reads prompts, since
                its time says nothing.
            unread: What drafting deeper begins with; not asked for as long as that does not seem to pay.
        """
        if not pure:
            return DraftPlan(self._in_use(_size(max(batch, self._running))), batch)
        self._running = batch
        size = _size(batch)
        best = self._choose(size, unread)
        kind = TrialKind(size.bit_length(), drafts=best > 0)
        self._clock.tick(kind)
        if (unmeasured := self._to_measure(size, best)) is not None:
            return DraftPlan(unmeasured, batch)
        tried = self._tried(best, batch)
        if self._clock.may_begin and self._clock.is_due(kind, self._expected_cost(size, best, tried / batch, unread)):
            self._clock.begin(kind, self._rates(size)[best] * batch)
            self._acceptance_cycles = acceptance_cycles(tried) if best < self._max_depth else 0
            for index in range(self._max_depth):
                self._forget(index, DOUBTED_WINDOW)
        phase = self._clock.phase
        if phase is None:
            return DraftPlan(best, batch)
        if phase < self._acceptance_cycles:
            return DraftPlan(self._max_depth, tried)
        # From deep to shallow: who has more drafts than needed can go on with some.
        others = [depth for depth in range(self._max_depth, -1, -1) if depth != best]
        turn = (phase - self._acceptance_cycles) // self._trials.cycles
        # Drafting again after a rest reads all that was left unread: not for a measurement.
        if best and 0 <= turn < len(others):
            return DraftPlan(others[turn], batch)
        if phase >= self._acceptance_cycles + AFTERMATH + (len(others) * self._trials.cycles if best else 0):
            self._clock.end()
        return DraftPlan(best, batch)

    def _expected_cost(self, size: int, best: int, share: float, unread: Unread | None) -> float:
        """Seconds that a trial costs by what is known of the depths, where `share` of the requests draft in it."""
        acceptance, best_seconds = self.acceptance, self._times.seconds(size, best)

        def tokens(depth: int) -> float:
            return tokens_per_cycle(acceptance[:depth])

        lost = [
            max(0.0, self._times.seconds(size, depth) - best_seconds * tokens(depth) / tokens(best))
            for depth in range(self._max_depth + 1)
        ]
        plain = self._times.seconds(size, 0)
        cost = plain * (self._trials.up + self._trials.down * (self._max_depth if best else 1))
        if best:
            return cost + self._trials.cycles * sum(lost)
        a_cycle = lost[-1] if share == 1 else self._trials.beside * plain
        cycles = acceptance_cycles(round(share * size))
        return cost + cycles * a_cycle + share * self._catching_up(self._max_depth, unread)

    def _tried(self, best: int, batch: int) -> int:
        """For how many of `batch` requests a trial drafts where `best` is the depth in use."""
        return batch if best else self._trials.requests(batch)

    def _forget(self, index: int, window: float) -> None:
        """Lets the acceptance of depth `index` rest on at most `window` drafts."""
        share = min(1.0, window / self._verified[index])
        self._accepted[index] *= share
        self._verified[index] *= share

    def _in_use(self, size: int) -> int:
        """The depth in use; at first the one whose tokens come fastest by the bytes."""
        if self._depth is None:
            rates = self._rates(size)
            self._depth = max(range(self._max_depth + 1), key=rates.__getitem__)
        return self._depth

    def _choose(self, size: int, unread: Unread | None) -> int:
        """The depth to use from now on.

        Another one takes over as soon as it would have saved what it costs to change: so long as not much is known,
        and where two are about as good, nothing changes.
        """
        current, rates = self._in_use(size), self._rates(size)
        other = max((depth for depth in range(self._max_depth + 1) if depth != current), key=rates.__getitem__)
        plain = self._times.seconds(size, 0)
        saved = self._times.seconds(size, current) * (rates[other] / rates[current] - 1)
        if saved <= 0 and math.isinf(self._regret):
            self._regret = 0.0
        self._regret = max(0.0, self._regret + saved)
        price = plain * (self._trials.down if other < current else self._trials.up)
        if saved > 0 and self._regret >= price:
            # Only now is it worth to count what is unread.
            price += self._catching_up(other, unread) if other > current else 0.0
            if self._regret >= price:
                self._depth, self._regret = other, 0.0
        return self._in_use(size)

    def _catching_up(self, depth: int, unread: Unread | None) -> float:
        """Seconds that it takes before all requests can draft so deep."""
        if unread is None:
            return 0.0
        many = 128
        a_position = self._seconds_a_position or self._times.seconds(many, 0) / many
        return unread(depth) * a_position

    def _to_measure(self, size: int, best: int) -> int | None:
        """The next depth to measure for a batch size unlike all before; `None` once the best is known well enough.

        First the best by the bytes, then plain decoding, which no depth may lose to, then what might be better.
        """
        if self._measuring is None or self._measuring[0] != size or not self._may_measure(*self._measuring):
            rates = self._rates(size)
            doubtful = [depth for depth in range(self._max_depth, 0, -1) if rates[depth] * DOUBT > rates[best]]
            unknown = (depth for depth in (best, 0, *doubtful) if not self._times.is_known(size, depth))
            before = self._measuring
            self._measuring = next(((size, depth) for depth in unknown if self._may_measure(size, depth)), None)
            if before is not None and self._measuring is None:
                self._regret = math.inf  # from the last one measured it is as far to any
        if self._measuring is None:
            return None
        self._tries[self._measuring] += 1
        return self._measuring[1]

    def _may_measure(self, size: int, depth: int) -> bool:
        return not self._times.is_measured(size, depth) and self._tries[size, depth] < MEASURING

    def _rates(self, size: int) -> list[float]:
        """Tokens a second at each depth, but for a common factor as long as nothing was measured."""
        acceptance = self.acceptance
        return [
            tokens_per_cycle(acceptance[:depth]) / self._times.seconds(size, depth)
            for depth in range(self._max_depth + 1)
        ]


def _size(batch: int) -> int:
    """Batches that are told apart: those whose graphs are captured."""
    return padded_size(batch, 1 << batch.bit_length())
