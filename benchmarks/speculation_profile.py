"""Looks where a cycle of speculation spends its time: on the host by stage, on the GPU by kernel.

    python benchmarks/speculation_profile.py MODEL [--batches 1,8,64] [--depth 3] [--cycles 20] [--kernels 15]
                                             [--launch in-step|executed|by-step]
                                             [--devices gpu] [--precompiled-mtp-mefs DIR] [--json FILE]

A cycle verifies the drafts of every request and drafts anew. Each batch runs three times: to warm up, timed by stage
(`stopwatch.py`), and under `torch.profiler`, which must be installed for a GPU. On the host a stage's time is
that until its kernels are launched; what waits for the device is a stage of its own. On a GPU cycles are captured
graphs and launched ahead of their steps; `--launch` says otherwise: captured graphs launched in their step, the same
graphs executed, or verification and drafting one after the other.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from busy import Timeline, device_kernels
from device import settle
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.sampling import FusedSamplingProcessor
from report import Environment, Spread, format_table, write_json
from speculation import MAX_LENGTH
from speculation_run import PROMPT_TOKENS, Settings, greedy_requests, random_prompts
from stopwatch import Stopwatch
from transformers import AutoConfig

from step3p5.pretrained_config import as_step3p5_config
from step3p5.speculation.policy import FixedDepth, tokens_per_cycle
from step3p5.speculation.statistics import Statistics
from step3p5.speculation.steady_cycle import Outcome, SteadyCycle

SKIPPED_CYCLES = 6
"""Cycles before those that are looked at: the first ones draft anew, and capture graphs."""

REST = "rest of a step"


@dataclass(frozen=True)
class Result:
    """A batch size; milliseconds of a cycle."""

    batch: int
    cycle_ms: Spread
    tokens_per_cycle: float
    acceptance: list[float]
    stages: dict[str, float]
    timeline: Timeline | None

    def text(self, most_kernels: int) -> str:
        """Tables for people."""
        rate = 1e3 * self.batch * self.tokens_per_cycle / self.cycle_ms.median
        acceptance = " ".join(f"{a:.2f}" for a in self.acceptance)
        lines = [
            f"batch {self.batch}: {self.cycle_ms.text(digits=3)} ms a cycle, {self.tokens_per_cycle:.2f} tokens of a "
            f"request (acceptance {acceptance}), {rate:.0f} tokens/s",
            "",
            format_table(("on the host", "ms a cycle"), [(name, f"{ms:.3f}") for name, ms in self.stages.items()]),
        ]
        if self.timeline is not None:
            runs = sum(kernel.runs for kernel in self.timeline.kernels)
            rows = [
                (kernel.name[:100], f"{kernel.runs:.1f}", f"{kernel.milliseconds:.4f}")
                for kernel in self.timeline.kernels[:most_kernels]
            ]
            lines += [
                "",
                f"device busy {self.timeline.busy:.3f} ms a cycle, gaps {self.timeline.gaps:.3f} under the profiler; "
                f"{runs:.0f} kernels and copies",
                "",
                format_table(("on the device", "runs", "ms"), rows),
            ]
        return "\n".join(lines)


@dataclass
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    depth: int
    load_seconds: float
    results: list[Result] = field(default_factory=list)


def watched_calls(pipeline: Any) -> list[tuple[str, Any, str]]:
    """The stages of a cycle, as `Stopwatch.watching` takes them."""
    model, manager = pipeline._pipeline_model, pipeline._kv_manager
    return [
        ("cache inputs", manager, "runtime_inputs"),
        ("verify: launch", model, "verify"),
        ("sample: launch", pipeline, "_sample"),
        ("wait for the tokens", FusedSamplingProcessor, "get_new_tokens_numpy"),
        ("commit", pipeline, "_commit"),
        ("a whole cycle: launch", SteadyCycle, "launch"),
        ("wait for the tokens", Outcome, "wait"),
        ("commit", pipeline, "_commit_cycle"),
        ("draft: bookkeeping", pipeline, "_draft"),
        ("draft: launch", model, "draft"),
        ("cache step", manager, "step"),
    ]


class Cycles:
    """Runs cycles of one batch size at a fixed depth with a loaded pipeline."""

    def __init__(self, pipeline: Any, batch: int, depth: int, cycles: int, vocab_size: int, device: str) -> None:
        self._pipeline, self._batch, self._depth, self._cycles = pipeline, batch, depth, cycles
        self._vocab_size, self._device = vocab_size, device
        self._runs = 0

    def run(self, stopwatch: Stopwatch, around: AbstractContextManager[Any]) -> tuple[list[float], Statistics]:
        """Runs `cycles` cycles within `around`; returns the seconds of each, and what they verified."""
        self._runs += 1
        prompts = random_prompts(1000 * self._runs + self._batch, self._vocab_size, self._batch)
        new_tokens = (self._depth + 1) * (self._cycles + SKIPPED_CYCLES) + 1
        settle(self._device)
        with GenerateIterator.from_contexts(self._pipeline, greedy_requests(prompts, new_tokens)) as batch:
            self._pipeline.policy = FixedDepth([(1, self._batch, self._depth)], self._depth)
            for _ in range(1 + SKIPPED_CYCLES):
                batch.step()
            settle(self._device)
            self._pipeline.statistics = counts = Statistics(self._depth)
            stopwatch.reset()
            seconds = []
            with around:
                for _ in range(self._cycles):
                    started = time.perf_counter()
                    batch.step()
                    seconds.append(time.perf_counter() - started)
                settle(self._device)
        return seconds, counts

    def look(self) -> Result:
        """Runs three times: to warm up, with the stopwatch and, on a GPU, with the profiler."""
        unwatched = Stopwatch()
        self.run(unwatched, nullcontext())
        stopwatch = Stopwatch()
        with stopwatch.watching(watched_calls(self._pipeline)):
            seconds, counts = self.run(stopwatch, nullcontext())
        stages = {name: 1e3 * spent / self._cycles for name, spent in stopwatch.seconds.items()}
        stages[REST] = 1e3 * sum(seconds) / self._cycles - sum(stages.values())
        return Result(
            batch=self._batch,
            cycle_ms=Spread.of([1e3 * one for one in seconds]),
            tokens_per_cycle=tokens_per_cycle(counts.acceptance),
            acceptance=counts.acceptance,
            stages=stages,
            timeline=self._timeline() if self._device != "cpu" else None,
        )

    def _timeline(self) -> Timeline:
        """What the device does in a cycle."""
        from torch.profiler import ProfilerActivity, profile

        profiler = profile(activities=[ProfilerActivity.CUDA])
        self.run(Stopwatch(), profiler)
        return Timeline.of(device_kernels(profiler), self._cycles)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="speculation_profile.py", description="Look where a cycle of speculation spends time.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 8, 64), help="batch sizes (default: 1,8,64)")
    add("--depth", metavar="N", type=positive_int, default=3, help="drafts a cycle (default: %(default)s)")
    add("--cycles", metavar="N", type=positive_int, default=20, help="looked at, a run (default: %(default)s)")
    add("--kernels", metavar="N", type=positive_int, default=15, help="to list, a batch (default: %(default)s)")
    add("--launch", choices=("in-step", "executed", "by-step"), help="how cycles are launched (default: as it comes)")
    add("--devices", type=devices, default="gpu", help="as MAX's --devices (default: %(default)s)")
    add("--precompiled-mtp-mefs", metavar="DIR", help="artifacts compiled ahead with --speculative-method mtp")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well, after each batch")
    options = parser.parse_args(arguments)
    most = (MAX_LENGTH - PROMPT_TOKENS - 1) // (options.depth + 1) - SKIPPED_CYCLES
    if options.cycles > most:
        parser.error(f"--cycles: found {options.cycles}, expected at most {most} of {options.depth} drafts")
    if options.devices != "cpu" and find_spec("torch") is None:
        parser.error("torch: found none, expected PyTorch with CUDA, whose profiler sees the kernels")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments, with 1 where a batch failed."""
    options = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    vocab_size = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config.vocab_size
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    settings = Settings(options.devices, max(options.batches), MAX_LENGTH, mtp_artifacts=options.precompiled_mtp_mefs)
    started = time.perf_counter()
    failed = False
    with settings.load_drafting(options.model, options.depth) as model:
        loaded = time.perf_counter() - started
        report = Report(
            "speculation_profile", environment, Path(options.model).name, options.devices, options.depth, loaded
        )
        print(*environment.lines(), f"loaded in {loaded:.1f} s", sep="\n", flush=True)
        if options.launch == "by-step":
            model.pipeline.cycles = None
        elif options.launch == "executed":
            model.pipeline.use_cycles(captures=False)
        elif options.launch == "in-step":
            model.pipeline.launches_ahead = False
        for batch in options.batches:
            started = time.perf_counter()
            try:
                result = Cycles(
                    model.pipeline, batch, options.depth, options.cycles, vocab_size, options.devices
                ).look()
            except Exception:  # the other batches may teach something yet
                failed = True
                traceback.print_exc()
                continue
            report.results.append(result)
            taken = time.perf_counter() - started
            print("", result.text(options.kernels), f"looked at in {taken:.1f} s", sep="\n", flush=True)
            if options.json is not None:
                write_json(options.json, report)
    sys.exit(failed)


if __name__ == "__main__":
    main()
