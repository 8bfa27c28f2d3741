"""Times the forward passes of a checkpoint in MAX, one at a time: prefill by prompt length, decode by batch size.

    python benchmarks/forward.py MODEL [--devices cpu] [--batches 1,4,8] [--context 64] [--prefill 64,512] [--rounds 5]
                                 [--json FILE] [--precompiled-mefs DIR] [--ep-size N] [--data-parallel-degree N]

A pass is timed from outside, as `GenerateIterator.step()`: batching, graph and sampling. Prompts are random tokens, new
ones each round; sampling is greedy and end-of-sequence tokens are ignored. All cases run once to warm up, then in turn
once a round, a prefill timed once and every decode step by itself.

Beside each time stand the bytes that the pass must read (`step3p5.byte_account`; routed experts as expected under
uniform routing) and their rate as a share of a plain copy's: on a CPU the best one after the rounds, on a GPU the
median of PyTorch's, where that is installed. On a GPU the overlap scheduler and captured graphs are on (`device.py`),
and times stand beside the plan's bound (`bounds.py`). With `--data-parallel-degree` every replica prefills one prompt,
and a batch is that of all replicas.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import Bandwidth, measure_bandwidth, usable_cores
from bounds import bound_seconds, this_gpu
from contention import CpuTimes, cores_taken
from device import (
    DeviceMemory,
    as_passes,
    bytes_in_use,
    cache_bytes,
    device_copy_rate,
    device_numbers,
    load_in_parallel,
    planned_bytes,
    settle,
)
from forward_cases import Case, Precision, Result, evaluate, make_cases
from max.pipelines.kv_cache import cache_dtype_for_encoding
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, format_table, peak_memory_bytes, write_json
from tqdm import tqdm
from transformers import AutoConfig

from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors
from step3p5.config_fields import ConfigError
from step3p5.layer_config import ModelConfig
from step3p5.parallel_plan import parallel_plan
from step3p5.pretrained_config import as_step3p5_config

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes.

    `cores_taken` are those that other processes kept busy during the rounds, `None` where the system does not say;
    `bandwidth` is `None` on a GPU, `device_memory` on a CPU.
    """

    benchmark: str
    environment: Environment
    model: str
    num_layers: int
    num_parameters: int
    precision: Precision
    devices: str
    rounds: int
    cores_taken: float | None
    load_seconds: float
    peak_memory_bytes_after_loading: int
    peak_memory_bytes: int
    device_memory: DeviceMemory | None
    bandwidth: Bandwidth | None
    device_copy_rate: float | None
    results: list[Result]

    def text(self) -> str:
        """The same for people."""
        loading, rounds = self.peak_memory_bytes_after_loading / 2**20, self.peak_memory_bytes / 2**20
        lines = [
            *self.environment.lines(),
            f"{self.model}: {self.num_layers} layers, {self.num_parameters / 1e6:.1f} M parameters, "
            f"{self.precision.weights} weights, {self.precision.cache} cache",
            f"loaded on {self.devices} in {self.load_seconds:.1f} s, compiling included unless cached",
            f"peak resident memory {loading:.0f} MiB after loading, {rounds:.0f} MiB after the rounds",
            *([self.device_memory.line()] if self.device_memory is not None else []),
            *(
                [f"other processes kept {self.cores_taken:.1f} cores busy during the rounds"]
                if self.cores_taken is not None
                else []
            ),
            *([self.bandwidth.line()] if self.bandwidth is not None else []),
            *([f"the device copies at {1e-12 * self.device_copy_rate:.2f} TB/s"] if self.device_copy_rate else []),
            "",
            format_table(Result.HEADER, [result.row() for result in self.results]),
        ]
        return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ModelConfig, list[Case]]:
    """Reads the command line and the checkpoint's configuration; ends the program where either is unusable."""
    parser = OneLineParser(
        prog="forward.py", description="Time a checkpoint's forward passes in MAX: prefill and decode, one at a time."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder or a repository on the hub")
    add("--devices", type=devices, default="cpu", help="as MAX's --devices (default: %(default)s)")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 4, 8), help="decoded batches (default: 1,4,8)")
    add("--prefill", metavar="N,N", type=positive_ints, default=(64, 512), help="prompt lengths (default: 64,512)")
    add("--context", metavar="N,N", type=positive_ints, default=(64,), help="tokens before decoding (default: 64)")
    add("--steps", metavar="N", type=positive_int, default=8, help="decode steps a round (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=5, help="(default: %(default)s)")
    add("--precompiled-mefs", metavar="DIR", help="artifacts compiled ahead, for a GPU")
    add("--ep-size", metavar="N", type=positive_int, default=1, help="as MAX's, with several GPUs")
    add("--data-parallel-degree", metavar="N", type=positive_int, default=1, help="as MAX's, with several GPUs")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if not Path(options.model).is_dir() and not _HUB_NAME.fullmatch(options.model):
        parser.error(f"MODEL: found no folder {options.model}, expected a checkpoint's or a hub repository, OWNER/NAME")
    try:
        model = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config
    except (ConfigError, OSError, ValueError) as error:
        parser.error(f"MODEL {options.model}: {' '.join(str(error).split())}")
    replicas = options.data_parallel_degree
    if uneven := [size for size in options.batches if size % replicas]:
        parser.error(f"--batches: found {uneven[0]}, expected a multiple of --data-parallel-degree, {replicas}")
    cases = make_cases(options.prefill, options.batches, options.context, options.steps, replicas)
    for case in cases:
        if case.longest > model.max_position_embeddings:
            parser.error(
                f"{case.name}: {case.longest} tokens, expected at most the checkpoint's max_position_embeddings, "
                f"{model.max_position_embeddings}; lower {'--context or --steps' if case.decode_steps else '--prefill'}"
            )
    return options, model, cases


def run_rounds(model: AutoModel, devices: str, cases: Sequence[Case], rounds: int) -> None:
    """Runs every case once to warm up and then once a round, whose times the cases keep."""
    rng = np.random.default_rng(0)
    for index in tqdm(range(rounds + 1), desc="warm-up and rounds", file=sys.stderr):
        for case in cases:
            settle(devices)
            step_seconds = run_case(model, case, rng)
            if index > 0:
                case.keep(as_passes(step_seconds, case.decode_steps))


def run_case(model: AutoModel, case: Case, rng: np.random.Generator) -> list[float]:
    """Generates once from new prompts and returns the seconds of each step, the prompt's first."""
    prompts, seconds = case.prompts(model, rng), []
    with model.generate_iter(prompts, max_new_tokens=case.decode_steps + 1, temperature=0.0, ignore_eos=True) as batch:
        while not batch.done:
            start = time.perf_counter()
            batch.step()
            seconds.append(time.perf_counter() - start)
    return seconds


def precision_of(model: AutoModel, devices: str) -> Precision:
    """The types in which a loaded model runs; a CPU's cache is float32."""
    config = model.pipeline_config.model
    cache = cache_dtype_for_encoding(config.quantization_encoding, config.kv_cache.kv_cache_format).name
    return Precision(
        CheckpointDtype(config.quantization_encoding),
        CheckpointDtype.FLOAT32 if devices == "cpu" else CheckpointDtype(cache),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options, config, cases = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    largest, longest, in_use = max(options.batches), max(case.longest for case in cases), bytes_in_use(options.devices)
    start = time.perf_counter()
    plan = parallel_plan(
        config, max(len(device_numbers(options.devices)), 1), options.ep_size, options.data_parallel_degree
    )
    with load_in_parallel(options, largest, longest) as model:
        load_seconds, load_memory = time.perf_counter() - start, peak_memory_bytes()
        loaded = bytes_in_use(options.devices)
        precision = precision_of(model, options.devices)
        before = CpuTimes.now()
        run_rounds(model, options.devices, cases, options.rounds)
        taken = cores_taken(before, CpuTimes.now())
        memory, device_memory = peak_memory_bytes(), None
        if options.devices != "cpu":
            device_memory = DeviceMemory(
                before_loading=in_use,
                after_loading=loaded,
                after_rounds=bytes_in_use(options.devices),
                caches=cache_bytes(model.pipeline),
                planned=planned_bytes(plan, precision.weights, largest, longest),
            )
        device_rate = None if options.devices == "cpu" else device_copy_rate()
    bandwidth = measure_bandwidth() if options.devices == "cpu" else None
    copy_rate, gpu = (
        bandwidth.copy.maximum if bandwidth else device_rate,
        this_gpu() if device_numbers(options.devices) else None,
    )
    one = plan.num_devices == 1  # the bytes are those of all devices, the copy's rate is that of one
    report = Report(
        benchmark="forward",
        environment=environment,
        model=options.model,
        num_layers=len(config.layers),
        num_parameters=sum(spec.num_elements for spec in checkpoint_tensors(config).values()),
        precision=precision,
        devices=options.devices,
        rounds=options.rounds,
        cores_taken=taken,
        load_seconds=load_seconds,
        peak_memory_bytes_after_loading=load_memory,
        peak_memory_bytes=memory,
        device_memory=device_memory,
        bandwidth=bandwidth,
        device_copy_rate=device_rate,
        results=[
            evaluate(
                case, config, precision, copy_rate if one else None, bound_seconds(case, plan, gpu) if gpu else None
            )
            for case in cases
        ],
    )
    print(report.text())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
