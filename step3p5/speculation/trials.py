"""Trials of depths that are not in use: how they go, what changing costs, and when, by what the last one cost."""

from __future__ import annotations

from dataclasses import dataclass

PERIOD = 512
"""Fewest cycles from one trial to the next."""

COST = 0.01
"""Share of the time with a kind of batches that its trials may cost; they come less often where that takes more than
`PERIOD`."""

DRAFTS = 32
MOST_CYCLES = 16
FEWEST_CYCLES = 4
"""A trial of the acceptance drafts at full depth until so many requests' drafts were verified, within bounds."""

AFTERMATH = 4
"""Cycles after a trial whose time belongs to it."""


@dataclass(frozen=True)
class Trials:
    """How depths that are not in use are tried."""

    cycles: int = 1
    """Steps for each depth, where some depth is in use."""

    share: int = 16
    """A trial while nothing is drafted takes one request in so many, ..."""

    whole_batch: int = 1
    """... but all of a batch of no more than this, ..."""

    fewest: int = 1
    """... and no fewer than so many."""

    up: float = 1.0
    down: float = 0.5
    """What it costs to go to a deeper depth and to a shallower one, in cycles of plain decoding."""

    beside: float = 0.25
    """What it costs a cycle of plain decoding when a few of its requests draft, in such cycles."""

    def requests(self, batch: int) -> int:
        """For how many of `batch` requests a trial drafts where nothing is drafted."""
        return batch if batch <= self.whole_batch else max(self.fewest, batch // self.share)


CYCLE_TRIALS = Trials(cycles=3, whole_batch=16, fewest=4, up=7.0, down=2.0, beside=2.0)
"""Where batches go through cycles: the first of a depth leads there from another and is not measured; drafts for some
of the requests alone take a step without, so that small batches do better to draft as a whole. Going deeper takes such
a step, too; the costs are those seen on an H200 at batch 1 to 128."""


def acceptance_cycles(requests: int) -> int:
    """For how many cycles a trial of the acceptance drafts for `requests` requests."""
    return min(max(-(-DRAFTS // requests), FEWEST_CYCLES), MOST_CYCLES)


@dataclass(frozen=True)
class TrialKind:
    """Trials that cost about the same: by how many requests there are, and whether a depth is in use that drafts."""

    bucket: int
    drafts: bool


class TrialClock:
    """When trials begin and what they cost: the time they took beyond that of as many tokens at the depth in use."""

    def __init__(self) -> None:
        self.phase: int | None = None
        """Cycles since a trial began; `None` where there is none."""
        self._cycles_since = 0
        self._seconds_since: dict[TrialKind, float] = {}
        self._now = self._kind = TrialKind(0, drafts=False)
        self._rate = self._lost = 0.0
        self._costs: dict[TrialKind, float] = {}

    def tick(self, kind: TrialKind) -> None:
        """A cycle begins in which a trial would be of `kind`.

        A trial with other batch sizes is over, and its cost stays unknown. Where drafting has just come to rest, or has
        begun again, enough is known for a while.
        """
        before, self._now = self._now, kind
        self._cycles_since += 1
        if self.phase is not None:
            self.phase += 1
            if kind.bucket != self._kind.bucket:
                self._rest()
        elif kind.drafts != before.drafts:
            self._rest()

    def _rest(self) -> None:
        self.phase, self._cycles_since, self._seconds_since = None, 0, {}

    @property
    def may_begin(self) -> bool:
        """Whether a trial may begin if it costs little enough."""
        return self.phase is None and self._cycles_since >= PERIOD

    def is_due(self, kind: TrialKind, expected_cost: float) -> bool:
        """Whether a trial may begin.

        Args:
            kind: What it would be.
            expected_cost: Seconds, for a kind of which there has been none.
        """
        return self.may_begin and self._seconds_since.get(kind, 0.0) * COST >= self._costs.get(kind, expected_cost)

    def begin(self, kind: TrialKind, rate: float) -> None:
        """A trial begins, where the depth in use gives `rate` tokens a second."""
        self.phase, self._kind, self._rate, self._lost = 0, kind, rate, 0.0

    def end(self) -> None:
        """The trial is over."""
        self._costs[self._kind] = max(self._lost, 0.0)
        self._rest()

    def record(self, tokens: int, seconds: float) -> None:
        """Learns what a step gave and took."""
        self._seconds_since[self._now] = self._seconds_since.get(self._now, 0.0) + seconds
        if self.phase is not None:
            self._lost += seconds - tokens / self._rate
