"""One machine and load: the plan, what lies in memory, what a step takes, what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from step3p5.parallel_plan import ParallelPlan, ParallelPlanError, parallel_plan
from step3p5.plan.gpus import GPU
from step3p5.plan.memory import DeviceMemory, device_memory, largest_batch, largest_context
from step3p5.plan.source import ModelSource
from step3p5.plan.step_time import Step, decode_step

COUNTS = (1, 2, 4, 8)
"""Numbers of devices that are compared."""


@dataclass(frozen=True)
class Mode:
    """A way to share the model, as MAX's flags ask for it."""

    experts_by_number: bool
    own_requests: bool

    def flags(self, count: int) -> str:
        """The flags of `max serve`."""
        devices = "--devices gpu:" + ",".join(map(str, range(count)))
        experts = f" --ep-size {count}" if self.experts_by_number and count > 1 else ""
        return devices + experts + (f" --data-parallel-degree {count}" if self.own_requests and count > 1 else "")


MODES: Mapping[str, Mode] = {
    "tp": Mode(experts_by_number=False, own_requests=False),
    "tp-ep": Mode(experts_by_number=True, own_requests=False),
    "dp-ep": Mode(experts_by_number=True, own_requests=True),
}
"""The modes by the name that `--mode` takes."""


@dataclass(frozen=True)
class Load:
    """Requests at a time, of all devices together, tokens of each, and MTP layers that are loaded."""

    batch: int
    context: int
    mtp_depth: int = 0


@dataclass(frozen=True)
class Case:
    """A model on `count` GPUs in one mode under a load.

    Raises:
        ParallelPlanError: There is no such plan; on first use.
    """

    source: ModelSource
    gpu: GPU
    count: int
    mode: str
    load: Load

    @cached_property
    def plan(self) -> ParallelPlan:
        """Where the tensors lie."""
        mode = MODES[self.mode]
        return parallel_plan(
            self.source.model,
            self.count,
            self.count if mode.experts_by_number else 1,
            self.count if mode.own_requests else 1,
            self.source.weights.blocks,
        )

    @cached_property
    def memory(self) -> DeviceMemory:
        """What lies on the fullest device."""
        load = self.load
        return device_memory(self.plan, self.source.weights, load.batch, load.context, load.mtp_depth)

    @cached_property
    def step(self) -> Step:
        """A decode step."""
        return decode_step(self.plan, self.source.weights, self.gpu, self.load.batch, self.load.context)

    @property
    def fits(self) -> bool:
        """Whether the load fits into the GPUs' memory."""
        return self.memory.fits(self.gpu)

    @cached_property
    def largest_batch(self) -> int:
        """Most requests at the load's context."""
        load = self.load
        return largest_batch(self.plan, self.source.weights, self.gpu, load.context, load.mtp_depth)

    @cached_property
    def largest_context(self) -> int:
        """Longest requests at the load's batch."""
        load = self.load
        return largest_context(self.plan, self.source.weights, self.gpu, load.batch, load.mtp_depth)


@dataclass(frozen=True)
class Refused:
    """A mode in which the model cannot lie on so many devices, and why."""

    count: int
    mode: str
    error: ParallelPlanError


def cases(source: ModelSource, gpu: GPU, load: Load, count: int) -> Iterator[Case | Refused]:
    """Every mode on `count` devices, or why there is no such plan; on one device they are all the same."""
    for mode in MODES if count > 1 else list(MODES)[:1]:
        case = Case(source, gpu, count, mode, load)
        try:
            _ = case.plan
        except ParallelPlanError as error:
            yield Refused(count, mode, error)
        else:
            yield case


def best(candidates: list[Case]) -> Case | None:
    """The case that gives most tokens a second among those that fit; `None` if none does."""
    fitting = [case for case in candidates if case.fits]
    return max(fitting, key=lambda case: case.step.tokens_per_second, default=None)
