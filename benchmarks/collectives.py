"""What several GPUs do in a pass: each one's busy time, its collectives by kind, and what runs beside them.

A collective's kernel waits for the other devices, so its time includes what they come later by; the shortest run is
nearest to the exchange alone.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from busy import Kernel, KernelSum, Timeline

from step3p5.parallel_plan import Collective, ParallelPlan

KINDS = {
    Collective.ALL_REDUCE.value: r"all_?reduce",
    Collective.ALL_GATHER.value: r"all_?gather",
    f"{Collective.DISPATCH}, send": r"send_tokens",
    f"{Collective.DISPATCH}, receive": r"receive_tokens",
    f"{Collective.COMBINE}, send": r"send_sums",
    f"{Collective.COMBINE}, receive": r"receive_sums",
    "broadcast": r"broadcast_(pull|push|multimem|1stage|2stage|kernel)|comm.*broadcast",
    "copy between devices": r"memcpy (ptop|p2p|peer)",
}
"""What is in the name of a kernel of a kind, in small letters. A collective of the plan is all kinds that begin with
its name."""

Interval = tuple[float, float]


def kind_of(name: str) -> str | None:
    """The kind of a collective's kernel, `None` for any other kernel."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower())), None)


@dataclass(frozen=True)
class CollectiveTime:
    """The runs of one kind of collective on one device in a pass; `hidden` is the share during which others ran."""

    device: int
    kind: str
    runs: float
    milliseconds: float
    median_run: float
    shortest_run: float
    hidden: float

    HEADER: ClassVar[tuple[str, ...]] = ("collective", "GPU", "runs", "ms a pass", "us a run", "shortest", "hidden")

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            self.kind,
            str(self.device),
            f"{self.runs:.1f}",
            f"{self.milliseconds:.4f}",
            f"{1e3 * self.median_run:.1f}",
            f"{1e3 * self.shortest_run:.1f}",
            f"{100 * self.hidden:.0f} %",
        )


@dataclass(frozen=True)
class DeviceTime:
    """What one device did in a pass, milliseconds; `layer` is of one layer's collectives, the mean over the layers."""

    device: int
    busy: float
    gaps: float
    collectives: float
    layer: float
    kernels: list[KernelSum]


@dataclass(frozen=True)
class PassOfDevices:
    """A pass from outside, and on every device."""

    name: str
    milliseconds: float
    devices: list[DeviceTime]
    collectives: list[CollectiveTime]

    HEADER: ClassVar[tuple[str, ...]] = (
        "pass",
        "ms",
        "GPU",
        "busy, ms",
        "gaps, ms",
        "collectives, ms",
        "of a layer, ms",
    )

    def rows(self) -> list[tuple[str, ...]]:
        """The cells under `HEADER`, one row a device."""
        return [
            (
                self.name,
                f"{self.milliseconds:.3f}",
                str(of.device),
                f"{of.busy:.3f}",
                f"{of.gaps:.3f}",
                f"{of.collectives:.3f}",
                f"{of.layer:.4f}",
            )
            for of in self.devices
        ]

    @classmethod
    def of(
        cls, name: str, milliseconds: float, kernels: Sequence[Kernel], passes: int, plan: ParallelPlan
    ) -> PassOfDevices:
        """Adds up the kernels of `passes` equal passes."""
        devices, collectives = [], []
        for device in sorted({kernel.device for kernel in kernels}):
            here = [kernel for kernel in kernels if kernel.device == device]
            times = collective_times(device, here, passes)
            timeline = Timeline.of(here, passes)
            devices.append(
                DeviceTime(
                    device=device,
                    busy=timeline.busy,
                    gaps=timeline.gaps,
                    collectives=sum(time.milliseconds for time in times),
                    layer=layer_milliseconds(times, plan),
                    kernels=timeline.kernels[:30],
                )
            )
            collectives += times
        return cls(name, milliseconds, devices, collectives)


def collective_times(device: int, kernels: Sequence[Kernel], passes: int) -> list[CollectiveTime]:
    """The collectives among one device's kernels, by kind."""
    runs = defaultdict[str, list[Kernel]](list)
    others = list[Kernel]()
    for kernel in kernels:
        kind = kind_of(kernel.name)
        (others if kind is None else runs[kind]).append(kernel)
    busy = union(others)
    result = []
    for kind, of_kind in runs.items():
        durations = [kernel.duration / 1e3 for kernel in of_kind]
        total = sum(durations)
        beside = shared(union(of_kind), busy) / 1e3
        result.append(
            CollectiveTime(
                device=device,
                kind=kind,
                runs=len(of_kind) / passes,
                milliseconds=total / passes,
                median_run=statistics.median(durations),
                shortest_run=min(durations),
                hidden=beside / total if total else 0.0,
            )
        )
    return result


def layer_milliseconds(times: Iterable[CollectiveTime], plan: ParallelPlan) -> float:
    """Of one layer's collectives, the mean over the layers, by the median run of each kind."""
    layers = plan.layers[: len(plan.model.layers)]
    median: defaultdict[str, float] = defaultdict(float)
    for time in times:
        median[time.kind.partition(",")[0]] += time.median_run
    every = [of for layer in layers for of in (layer.after_attention, layer.before_mlp, layer.after_mlp)]
    return sum(median[of.value] for of in every if of is not None) / len(layers)


def union(kernels: Iterable[Kernel]) -> list[Interval]:
    """The time in which any of the kernels runs, as disjoint intervals in order."""
    joined: list[Interval] = []
    for start, end in sorted((kernel.start, kernel.start + kernel.duration) for kernel in kernels):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def shared(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """The time that lies in both; each is disjoint and in order."""
    total, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        total += max(min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]), 0.0)
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return total
