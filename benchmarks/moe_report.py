"""What `moe.py run` finds, as tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gpu_clock import Clock
from report import Environment, format_table


@dataclass(frozen=True)
class Row:
    """One measurement of the routed experts."""

    variant: str
    routing: str
    tokens: int
    experts_hit: float
    floor_ms: float
    ms: float
    spread_ms: tuple[float, float]
    times_floor: float
    vllm_ms: float | None
    error: float
    same_bits: bool
    nan_contained: bool
    clock: Clock | None
    """Of the multiprocessors while the times were taken."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "variant",
        "routing",
        "tokens",
        "experts hit",
        "floor, ms",
        "ours, ms",
        "x floor",
        "vLLM 0.23, ms *",
        "SM MHz",
        "power cap",
    )

    def cells(self) -> list[str]:
        """Those under `HEADER` and `CHECKS`."""
        times = [f"{self.floor_ms:.3f}", f"{self.ms:.3f}", f"{self.times_floor:.3f}"]
        vllm = "" if self.vllm_ms is None else f"{self.vllm_ms:.3f}"
        clock = ("", "") if self.clock is None else (f"{self.clock.mhz:.0f}", f"{100 * self.clock.power_capped:.0f} %")
        sizes = [self.variant, self.routing, str(self.tokens), f"{self.experts_hit:.0f}"]
        return [*sizes, *times, vllm, *clock, *checks(self)]


@dataclass(frozen=True)
class LayerRow:
    """One measurement of the whole layer; the floor is what it must read at the copy rate."""

    tokens: int
    experts_hit: float
    floor_ms: float
    ms: float
    times_floor: float
    error: float
    same_bits: bool
    nan_contained: bool

    HEADER: ClassVar[tuple[str, ...]] = ("whole layer, tokens", "experts hit", "floor, ms", "ours, ms", "x floor")

    def cells(self) -> list[str]:
        """Those under `HEADER` and `CHECKS`."""
        times = [f"{self.floor_ms:.3f}", f"{self.ms:.3f}", f"{self.times_floor:.3f}"]
        return [str(self.tokens), f"{self.experts_hit:.0f}", *times, *checks(self)]


CHECKS = ("error", "same bits", "NaN kept")


def checks(row: Row | LayerRow) -> list[str]:
    """The cells under `CHECKS`."""
    kept = (row.same_bits, row.nan_contained)
    return [f"{row.error:.1e}", *("yes" if check else "NO" for check in kept)]


@dataclass(frozen=True)
class KernelRow:
    """One kernel of the routed experts, in the order in which a launch begins them; see `busy.KernelSum`."""

    variant: str
    tokens: int
    name: str
    runs: float
    us: float


@dataclass(frozen=True)
class SmallRow:
    """One measurement of the router, of its choice alone or of the grouping."""

    op: str
    tokens: int
    us: float
    correct: bool


@dataclass
class Report:
    """Everything that a run found."""

    gpu: str
    copy_tb_s: float
    read_tb_s: float
    environment: Environment
    experts: list[Row]
    kernels: list[KernelRow]
    layer: list[LayerRow]
    small: list[SmallRow]

    def text(self) -> str:
        """The tables."""
        kernels = [
            [row.variant, str(row.tokens), row.name[-50:], f"{row.runs:.2f}", f"{row.us:.1f}"] for row in self.kernels
        ]
        small = [[row.op, str(row.tokens), f"{row.us:.1f}", "yes" if row.correct else "NO"] for row in self.small]
        return "\n".join(
            [
                f"{self.gpu}, PyTorch copies at {self.copy_tb_s:.2f} TB/s and reads at {self.read_tb_s:.2f} TB/s",
                format_table((*Row.HEADER, *CHECKS), [row.cells() for row in self.experts]),
                "* random routing, one H100, CUDA graph: measured beforehand, not in this run",
                "power cap: the share of the time in which it held the clock down",
                format_table((*LayerRow.HEADER, *CHECKS), [row.cells() for row in self.layer]),
                format_table(("variant", "tokens", "kernel", "runs", "us"), kernels),
                format_table(("op", "tokens", "us", "correct"), small),
            ]
        )
