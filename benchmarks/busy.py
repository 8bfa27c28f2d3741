"""Looks when a GPU works: kernels of decoding steps and prompts, the time they take together, and the gaps between.

    python benchmarks/busy.py MODEL --precompiled-mefs DIR [--devices gpu] [--batches 1,8] [--prefill 2048,8192]
                              [--context 64] [--steps 20] [--json FILE]

The kernels are those that `torch.profiler` sees, which must be installed. Overlap scheduler and captured graphs are on
(`device.py`). The steps are timed from outside before, without the profiler; the prompts are, too.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from device import as_passes, device_copy_rate, max_settings, settle
from forward import precision_of, run_case
from forward_cases import Case, Precision, make_cases
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, format_table, write_json
from transformers import AutoConfig

from step3p5.byte_account import forward_bytes
from step3p5.layer_config import ModelConfig
from step3p5.pretrained_config import as_step3p5_config

SKIPPED_STEPS = 10
"""Steps before those that are looked at: the first replay of a captured graph takes longer."""

MOST_KERNELS = 30


@dataclass(frozen=True)
class Kernel:
    """A kernel's run on the device, or a copy's; microseconds."""

    start: float
    duration: float
    name: str
    device: int = 0


@dataclass(frozen=True)
class KernelSum:
    """All runs of the kernels of one name in a pass.

    `milliseconds` are those in which no kernel that began before was still running, so that all sums add up to `busy`:
    a kernel may begin early to wait for the one before (programmatic dependent launch).
    """

    name: str
    runs: float
    milliseconds: float


@dataclass(frozen=True)
class Timeline:
    """What the device did in a pass: milliseconds in which anything ran, and between the first kernel and the last."""

    busy: float
    gaps: float
    kernels: list[KernelSum]

    @classmethod
    def of(cls, kernels: Sequence[Kernel], passes: int) -> Timeline:
        """Adds up the kernels of `passes` equal passes.

        Raises:
            ValueError: If there is none.
        """
        if not kernels:
            raise ValueError("kernels: found none, expected those of a pass; does torch.profiler see this device?")
        ordered = sorted(kernels, key=lambda kernel: kernel.start)
        busy, end = 0.0, ordered[0].start
        sums = defaultdict[str, list[float]](list)
        for kernel in ordered:
            last = kernel.start + kernel.duration
            own = max(last - max(kernel.start, end), 0.0)
            busy += own
            end = max(end, last)
            sums[kernel.name].append(own)
        rows = [KernelSum(name, len(runs) / passes, sum(runs) / passes / 1e3) for name, runs in sums.items()]
        gaps = end - ordered[0].start - busy
        return cls(busy / passes / 1e3, gaps / passes / 1e3, sorted(rows, key=lambda row: -row.milliseconds))


@dataclass(frozen=True)
class Result:
    """A pass: its time from outside, what the device did, and the bytes that it must read."""

    name: str
    milliseconds: float
    timeline: Timeline
    bytes_to_read: float
    busy_over_bytes: float
    """Busy time over that of the bytes at the device's copy rate."""

    HEADER: ClassVar[tuple[str, ...]] = ("pass", "ms", "device busy, ms", "gaps, ms", "GB to read", "busy x bytes")

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            self.name,
            f"{self.milliseconds:.3f}",
            f"{self.timeline.busy:.3f}",
            f"{self.timeline.gaps:.3f}",
            f"{self.bytes_to_read / 1e9:.2f}",
            f"{self.busy_over_bytes:.2f}",
        )


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    device_copy_rate: float
    results: list[Result]

    def text(self) -> str:
        """The same for people."""
        lines = [
            *self.environment.lines(),
            f"{self.model} on {self.devices}, which copies at {1e-12 * self.device_copy_rate:.2f} TB/s",
            "",
            format_table(Result.HEADER, [result.row() for result in self.results]),
        ]
        for result in self.results:
            rows = [
                (kernel.name[:90], f"{kernel.runs:.1f}", f"{kernel.milliseconds:.4f}")
                for kernel in result.timeline.kernels[:MOST_KERNELS]
            ]
            lines += ["", format_table((result.name, "runs", "ms"), rows)]
        return "\n".join(lines)


def kernels_of(model: AutoModel, case: Case, rng: np.random.Generator) -> list[Kernel]:
    """What the device runs in a case's passes, the first steps left out."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with model.generate_iter(
        case.prompts(model, rng), max_new_tokens=case.decode_steps + 1, temperature=0.0, ignore_eos=True
    ) as batch:
        for _ in range(min(SKIPPED_STEPS, case.decode_steps)):
            batch.step()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(max(case.decode_steps - SKIPPED_STEPS, 1)):
                batch.step()
            for device in range(torch.cuda.device_count()):
                torch.cuda.synchronize(device)
        while not batch.done:
            batch.step()
    return device_kernels(profiler)


def device_kernels(profiler: Any) -> list[Kernel]:
    """What a `torch.profiler.profile` saw on the device."""
    return [
        Kernel(event.time_range.start, event.time_range.end - event.time_range.start, event.name, event.device_index)
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]


def look_at(
    model: AutoModel, case: Case, config: ModelConfig, precision: Precision, copy_rate: float, devices: str
) -> Result:
    """Times a case, then looks at its kernels."""
    rng = np.random.default_rng()
    longer = replace(case, decode_steps=case.decode_steps + SKIPPED_STEPS) if case.decode_steps else case
    passes = list[float]()
    for _ in range(2):  # the first one warms up
        settle(devices)
        passes = as_passes(run_case(model, longer, rng), longer.decode_steps)
    settle(devices)
    timeline = Timeline.of(kernels_of(model, longer, rng), max(case.decode_steps, 1))
    to_read = forward_bytes(config, case.forward, precision.weights, precision.cache)
    return Result(
        name=case.name,
        milliseconds=1e3 * statistics.median(passes[SKIPPED_STEPS:] if case.decode_steps else passes[:1]),
        timeline=timeline,
        bytes_to_read=to_read,
        busy_over_bytes=1e-3 * timeline.busy * copy_rate / to_read,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="busy.py", description="Look when a GPU works during a checkpoint's forward passes.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder or a repository on the hub")
    add("--precompiled-mefs", metavar="DIR", required=True, help="artifacts compiled ahead")
    add("--devices", type=devices, default="gpu", help="as MAX's --devices (default: %(default)s)")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 8), help="decoded batches (default: 1,8)")
    add("--prefill", metavar="N,N", type=positive_ints, default=(2048, 8192), help="(default: 2048,8192)")
    add("--context", metavar="N,N", type=positive_ints, default=(64,), help="tokens before decoding (default: 64)")
    add("--steps", metavar="N", type=positive_int, default=20, help="decoding steps (default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if options.devices == "cpu":
        parser.error("--devices: found cpu, expected a GPU")
    if find_spec("torch") is None:
        parser.error("torch: found none, expected PyTorch with CUDA, whose profiler sees the kernels")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    config = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config
    cases = make_cases(options.prefill, options.batches, options.context, options.steps)
    with AutoModel(
        options.model,
        devices=options.devices,
        custom_architectures=["pipelines_registry"],
        max_batch_size=max(options.batches),
        max_length=max(case.longest for case in cases) + SKIPPED_STEPS,
        **max_settings(options.devices, options.precompiled_mefs),
    ) as model:
        precision = precision_of(model, options.devices)
        copy_rate = device_copy_rate()
        assert copy_rate is not None, "looked for before"
        results = [look_at(model, case, config, precision, copy_rate, options.devices) for case in cases]
    report = Report("busy", environment, options.model, options.devices, copy_rate, results)
    print(report.text())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
