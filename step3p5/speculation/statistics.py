"""Acceptance by depth and the time of both halves of a step."""

from __future__ import annotations

from collections.abc import Sequence

from max.pipelines.speculative.utils import _SpeculativeDecodingMetrics


def step_metrics(requests: Sequence[tuple[int, int]]) -> _SpeculativeDecodingMetrics:
    """A step's acceptance as MAX reports it, of requests as (drafts verified, drafts accepted)."""
    depth = max((verified for verified, _ in requests), default=0)
    accepted = [sum(accepted > index for _, accepted in requests) for index in range(depth)]
    return _SpeculativeDecodingMetrics(depth, accepted, len(requests))


class Statistics:
    """Counts since the pipeline was made.

    Args:
        depth: The most drafts of a request that a step verifies.
    """

    def __init__(self, depth: int) -> None:
        self.verified = [0] * depth
        """How often a draft of each depth was verified and the ones before it were accepted."""
        self.accepted = [0] * depth
        """How often a draft of each depth was accepted."""
        self.drafts = 0
        """Drafts that were verified, whether the ones before them were accepted or not."""
        self.steps = 0
        """Forward passes of the target."""
        self.verify_seconds = 0.0
        """Time of verification: the target's forward, sampling and bookkeeping."""
        self.draft_seconds = 0.0
        """Time of drafting."""

    def record_drafts(self, requests: Sequence[tuple[int, int]]) -> None:
        """Counts requests that had drafts, each as (drafts verified, drafts accepted)."""
        self.drafts += sum(verified for verified, _ in requests)
        for index in range(max((verified for verified, _ in requests), default=0)):
            self.verified[index] += sum(verified > index <= accepted for verified, accepted in requests)
            self.accepted[index] += sum(accepted > index for _, accepted in requests)

    def record_times(self, verify_seconds: float, draft_seconds: float) -> None:
        """Adds one step's times."""
        self.steps += 1
        self.verify_seconds += verify_seconds
        self.draft_seconds += draft_seconds

    @property
    def acceptance(self) -> list[float]:
        """For each depth, the share of its drafts accepted among those whose predecessors were; 0 where none was."""
        counts = zip(self.accepted, self.verified, strict=True)
        return [accepted / verified if verified else 0.0 for accepted, verified in counts]
