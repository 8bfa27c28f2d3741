"""Looks where the host spends a decoding step's time, stage by stage.

    python benchmarks/host.py MODEL --precompiled-mefs DIR [--devices gpu | --devices gpu:0,1 [--ep-size N]
                              [--data-parallel-degree N]] [--batches 1,8,64] [--steps 200] [--json FILE]

Overlap scheduler and captured graphs are on (`device.py`). Each batch runs twice: timed step by step from outside, and
with a stopwatch around the stages (`stopwatch.py`). A stage's time is that until its kernels are launched; "wait" is
what is left of a step for the GPUs: near zero, the host is what a step waits for.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from device import load_in_parallel, settle
from max.driver import DeviceEvent
from max.engine import Model
from max.pipelines.lib import graph_capture
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.pipeline_variants.overlap_text_generation import AsyncBatch
from report import Environment, Spread, format_table, write_json
from stopwatch import Stopwatch
from transformers import AutoConfig

from step3p5 import steady_replay
from step3p5.cache_inputs import CacheInputs
from step3p5.pipelines import GreedyDraws
from step3p5.pretrained_config import as_step3p5_config
from step3p5.steady_replay import SteadyReplays

PROMPT_TOKENS = 64
SKIPPED_STEPS = 20
"""Steps before those that are looked at: the first replay of a captured graph takes longer."""

REST = "rest"


@dataclass(frozen=True)
class Result:
    """A batch size; milliseconds of a step."""

    batch: int
    step_ms: Spread
    """From outside, without the stopwatch."""

    stages: dict[str, float]
    """The mean of each stage, with the stopwatch."""

    def text(self) -> str:
        """A table for people."""
        rows = [(name, f"{ms:.4f}") for name, ms in self.stages.items()]
        watched = sum(self.stages.values())
        heading = f"batch {self.batch}: {self.step_ms.text(digits=3)} ms a step, {watched:.3f} with the stopwatch"
        return "\n".join([heading, format_table(("stage", "ms"), rows)])


@dataclass
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    ep_size: int
    data_parallel_degree: int
    results: list[Result] = field(default_factory=list)


def watched_calls(pipeline: Any) -> list[tuple[str, Any, str]]:
    """The stages of a step, as `Stopwatch.watching` takes them."""
    manager, model = pipeline._kv_manager, pipeline._pipeline_model
    return [
        ("room in the cache", manager, "alloc"),
        ("which captured graph", pipeline, "_replay_batch_characteristics"),
        ("cache inputs", manager, "runtime_inputs"),
        ("cache inputs", CacheInputs, "advance"),
        ("tokens and offsets", model, "prepare_initial_token_inputs"),
        ("tokens still being drawn", pipeline._realize_future_token_processor, "realize_future_tokens"),
        ("replay: host", pipeline._graph_capture_runner, "replay"),
        ("replay: host", SteadyReplays, "go_on"),
        ("replay: copies", graph_capture, "batch_inplace_copy"),
        ("replay: copies", steady_replay, "batch_inplace_copy"),
        ("replay: launch", Model, "replay"),
        ("draw", GreedyDraws, "__call__"),
        ("draw: the rest", pipeline, "_sample_logits"),
        ("answers", AsyncBatch, "sync_and_process_outputs"),
        ("wait", DeviceEvent, "synchronize"),
        ("cache step", manager, "step"),
    ]


class Steps:
    """Runs decoding steps of one batch size with a loaded model."""

    def __init__(self, model: AutoModel, batch: int, steps: int, vocab_size: int, device: str) -> None:
        self._model, self._batch, self._steps = model, batch, steps
        self._vocab_size, self._device = vocab_size, device

    def run(self, stopwatch: Stopwatch, around: AbstractContextManager[Any]) -> list[float]:
        """Runs `steps` steps within `around`; returns the seconds of each."""
        prompts = np.random.default_rng().integers(self._vocab_size, size=(self._batch, PROMPT_TOKENS)).tolist()
        seconds = []
        settle(self._device)
        with self._model.generate_iter(
            prompts, max_new_tokens=self._steps + SKIPPED_STEPS + 1, temperature=0.0, ignore_eos=True
        ) as batch:
            for _ in range(1 + SKIPPED_STEPS):
                batch.step()
            stopwatch.reset()
            with around:
                for _ in range(self._steps - 1):
                    started = time.perf_counter()
                    batch.step()
                    seconds.append(time.perf_counter() - started)
        return seconds

    def look(self) -> Result:
        """Runs to warm up, then without the stopwatch and with it."""
        self.run(Stopwatch(), nullcontext())
        seconds = self.run(Stopwatch(), nullcontext())
        stopwatch = Stopwatch()
        watched = self.run(stopwatch, stopwatch.watching(watched_calls(self._model.pipeline)))
        stages = {name: 1e3 * spent / len(watched) for name, spent in stopwatch.seconds.items()}
        stages[REST] = 1e3 * sum(watched) / len(watched) - sum(stages.values())
        return Result(self._batch, Spread.of([1e3 * one for one in seconds]), stages)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="host.py", description="Look where the host spends a decoding step's time.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder or a repository on the hub")
    add("--precompiled-mefs", metavar="DIR", required=True, help="artifacts compiled ahead")
    add("--devices", type=devices, default="gpu", help="as MAX's --devices (default: %(default)s)")
    add("--ep-size", metavar="N", type=positive_int, default=1, help="as MAX's")
    add("--data-parallel-degree", metavar="N", type=positive_int, default=1, help="as MAX's")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 8, 64), help="of all replicas (default: 1,8,64)")
    add("--steps", metavar="N", type=positive_int, default=200, help="looked at, a run (default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if options.devices == "cpu":
        parser.error("--devices: found cpu, expected GPUs")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    vocab_size = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config.vocab_size
    report = Report("host", environment, options.model, options.devices, options.ep_size, options.data_parallel_degree)
    print(*environment.lines(), sep="\n", flush=True)
    with load_in_parallel(options, max(options.batches), PROMPT_TOKENS + SKIPPED_STEPS + options.steps + 2) as model:
        for batch in options.batches:
            result = Steps(model, batch, options.steps, vocab_size, options.devices).look()
            report.results.append(result)
            print("", result.text(), sep="\n", flush=True)
            if options.json is not None:
                write_json(options.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
