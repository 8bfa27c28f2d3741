"""What the policy said for a step, with the number of requests that it was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import DraftPlan


@dataclass(frozen=True)
class StepPlan:
    """What the policy said for a step of `requests` requests that decode: `drafting` of them draft `depth` deep."""

    depth: int
    drafting: int
    requests: int

    @classmethod
    def of(cls, plan: DraftPlan, requests: int) -> StepPlan:
        """The policy's `plan` for so many."""
        return cls(plan.depth, min(plan.num_requests, requests), requests)

    @property
    def is_trial(self) -> bool:
        """Whether some draft and the others do not."""
        return self.drafting < self.requests

    @property
    def run_depth(self) -> int:
        """How deep those draft that go through cycles: in a trial, the ones that do not draft."""
        return 0 if self.is_trial else self.depth
