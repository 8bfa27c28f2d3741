"""One way to run a model on several GPUs, beside one GPU: the same logits, the times of its passes, its collectives.

    python benchmarks/parallel.py MODEL REFERENCE --precompiled-mefs DIR --devices gpu:0 --json one.json
    python benchmarks/parallel.py MODEL REFERENCE --precompiled-mefs DIR --devices gpu:0,1 [--ep-size 2]
                                  [--data-parallel-degree 2] --json tp.json

On one GPU the run writes the folder REFERENCE: the tokens that it chooses for prompts of several lengths, and the
logits of every step (`same_logits.py`). The same prompts split into two batches show there how far rounding alone goes.
On several GPUs the run reads the tokens of REFERENCE and compares the logits. Then follow the times of `forward.py`,
beside the plan's bound, and what `torch.profiler` sees on every GPU (`collectives.py`).

The JSON is written after each part, so that one that fails does not cost the others, nor one that hangs those before
it. `--no-capture` and
`--no-overlap` leave out captured graphs, and the overlap of a step with the preparation of the next.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from bounds import bound_seconds, this_gpu
from busy import SKIPPED_STEPS, kernels_of
from collectives import CollectiveTime, PassOfDevices
from device import as_passes, bytes_in_use, device_copy_rate, device_numbers, load_in_parallel, settle
from forward import precision_of, run_case
from forward_cases import Case, Result, evaluate, make_cases
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, format_table, write_json
from same_logits import Agreement, FreeRun, Reference, decode, decode_freely, random_prompts, synchronous
from transformers import AutoConfig

from step3p5.layer_config import ModelConfig
from step3p5.parallel_plan import ParallelPlan, parallel_plan
from step3p5.pretrained_config import as_step3p5_config

PROFILED_STEPS = 20


@dataclass
class Report:
    """All that a run found so far; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    ep_size: int
    data_parallel_degree: int
    captured_graphs: bool
    overlap: bool
    gpu: str | None
    load_seconds: float = 0.0
    bytes_in_use: int = 0
    """On the first GPU after loading, caches included."""
    device_copy_rate: float | None = None
    agreements: list[Agreement] = field(default_factory=list)
    free_run: FreeRun | None = None
    results: list[Result] = field(default_factory=list)
    passes: list[PassOfDevices] = field(default_factory=list)
    part_seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """What went wrong, by part."""

    def text(self) -> str:
        """The same for people."""
        lines = [
            *self.environment.lines(),
            f"{self.model} on {self.devices}, --ep-size {self.ep_size}, --data-parallel-degree "
            f"{self.data_parallel_degree}, captured graphs {self.captured_graphs}, overlap {self.overlap}",
            f"loaded in {self.load_seconds:.1f} s; parts: {self.part_seconds}",
            *(f"FAILED {part}: {message}" for part, message in self.failures.items()),
            "",
            format_table(Agreement.HEADER, [agreement.row() for agreement in self.agreements]),
        ]
        if self.free_run is not None:
            lines += [f"freely: {self.free_run}"]
        lines += ["", format_table(Result.HEADER, [result.row() for result in self.results])]
        for of in self.passes:
            lines += ["", format_table(PassOfDevices.HEADER, of.rows())]
            lines += [format_table(CollectiveTime.HEADER, [time.row() for time in of.collectives])]
            lines += [
                format_table(
                    (f"GPU {device.device}, {of.name}", "runs", "ms"),
                    [
                        (kernel.name[:100], f"{kernel.runs:.1f}", f"{kernel.milliseconds:.4f}")
                        for kernel in device.kernels
                    ],
                )
                for device in of.devices[:1]
            ]
        return "\n".join(lines)


class Run:
    """The parts of a run, on a loaded model."""

    def __init__(self, options: argparse.Namespace, model: AutoModel, config: ModelConfig, report: Report) -> None:
        self.options, self.model, self.config, self.report = options, model, config, report
        self.replicas: int = options.data_parallel_degree
        self.plan: ParallelPlan = parallel_plan(
            config, len(device_numbers(options.devices)), options.ep_size, self.replicas
        )
        self.cases: list[Case] = make_cases(
            options.prefill, options.batches, options.context, options.steps, self.replicas
        )
        self.rng = np.random.default_rng(0)

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Does a part and writes the report; a failure is noted, and what hangs ends the program."""
        start = time.perf_counter()
        faulthandler.dump_traceback_later(self.options.part_seconds, exit=True)
        print(f"[{name}]", file=sys.stderr, flush=True)
        self.report.failures[name] = "did not end"
        self.write()
        try:
            work()
            del self.report.failures[name]
        except Exception as error:
            traceback.print_exc()
            self.report.failures[name] = f"{type(error).__name__}: {error}"[:2000]
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.report.part_seconds[name] = round(time.perf_counter() - start, 2)
        self.write()

    def write(self) -> None:
        """Writes the report as it is."""
        if self.options.json is not None:
            write_json(self.options.json, self.report)

    def compare(self) -> None:
        """Every step's logits over the same tokens: written on one GPU, compared on several."""
        prompts = random_prompts(self.config.vocab_size)
        steps: int = self.options.equal_steps
        with synchronous(self.model.pipeline, self.replicas):
            if self.plan.num_devices == 1:
                tokens, logits = decode(self.model, prompts, steps)
                Reference.write(self.options.reference, tokens, logits)
                halves = [decode(self.model, prompts[half::2], steps, tokens[half::2])[1] for half in range(2)]
                again = [halves[row % 2][row // 2] for row in range(len(prompts))]
                name = "one GPU, in two batches"
                self.report.agreements.append(Agreement.of(name, logits, again))
                return
            reference = Reference.read(self.options.reference)
            _, here = decode(self.model, prompts, steps, reference.tokens)
            self.report.agreements.append(Agreement.of("all steps", reference.logits, here))
            first = [[rows[:1] for rows in logits] for logits in (reference.logits, here)]
            self.report.agreements.append(Agreement.of("prompts alone", *first))

    def choose(self) -> None:
        """The tokens chosen freely, as the pipeline is served."""
        reference = Reference.read(self.options.reference)
        prompts = random_prompts(self.config.vocab_size)
        here = decode_freely(self.model, prompts, reference.tokens.shape[1])
        self.report.free_run = FreeRun.of(reference.tokens, here)

    def time(self) -> None:
        """The times of `forward.py`."""
        for index in range(self.options.rounds + 1):
            for case in self.cases:
                settle(self.options.devices)
                passes = as_passes(run_case(self.model, case, self.rng), case.decode_steps)
                if index > 0:
                    case.keep(passes)
        gpu, precision = this_gpu(), precision_of(self.model, self.options.devices)
        self.report.results = [
            evaluate(case, self.config, precision, None, bound_seconds(case, self.plan, gpu) if gpu else None)
            for case in self.cases
        ]

    def look(self) -> None:
        """What runs on every GPU in a pass of each case."""
        for case, result in zip(self.cases, self.report.results, strict=True):
            longer = case
            if case.decode_steps:
                longer = replace(case, decode_steps=PROFILED_STEPS + SKIPPED_STEPS, seconds=[])
            settle(self.options.devices)
            kernels = kernels_of(self.model, longer, self.rng)
            passes = PROFILED_STEPS if case.decode_steps else 1
            self.report.passes.append(
                PassOfDevices.of(case.name, 1e3 * result.seconds.median, kernels, passes, self.plan)
            )

    def one_request(self) -> None:
        """A request on one replica alone, which the others have none beside."""
        if self.replicas == 1:
            return
        reference = Reference.read(self.options.reference)
        prompts = random_prompts(self.config.vocab_size)[-1:]
        with synchronous(self.model.pipeline, self.replicas):
            _, here = decode(self.model, prompts, 1)
        self.report.agreements.append(Agreement.of("a replica without requests", [reference.logits[-1][:1]], here))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="parallel.py", description="Run a model on several GPUs, beside one GPU.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder or a repository on the hub")
    add("reference", metavar="REFERENCE", type=Path, help="folder for the logits of one GPU")
    add("--precompiled-mefs", metavar="DIR", required=True, help="artifacts compiled ahead")
    add("--devices", type=devices, default="gpu:0", help="as MAX's --devices (default: %(default)s)")
    add("--ep-size", metavar="N", type=positive_int, default=1, help="as MAX's")
    add("--data-parallel-degree", metavar="N", type=positive_int, default=1, help="as MAX's")
    add("--no-capture", action="store_true", help="leave out captured graphs")
    add("--no-overlap", action="store_true", help="prepare a step after the one before has ended")
    add("--equal-steps", metavar="N", type=positive_int, default=200, help="steps compared (default: %(default)s)")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 8, 64), help="of all replicas (default: 1,8,64)")
    add("--prefill", metavar="N,N", type=positive_ints, default=(2048,), help="(default: 2048)")
    add("--context", metavar="N,N", type=positive_ints, default=(64,), help="tokens before decoding (default: 64)")
    add("--steps", metavar="N", type=positive_int, default=24, help="decode steps a round (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=5, help="(default: %(default)s)")
    add("--max-length", metavar="N", type=positive_int, default=4096, help="as MAX's (default: %(default)s)")
    add("--part-seconds", metavar="N", type=positive_int, default=60, help="most for a part (default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if options.devices == "cpu":
        parser.error("--devices: found cpu, expected GPUs")
    if uneven := [size for size in options.batches if size % options.data_parallel_degree]:
        parser.error(
            f"--batches: found {uneven[0]}, expected a multiple of --data-parallel-degree, "
            f"{options.data_parallel_degree}"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments, 1 where a part failed."""
    options = parse_arguments(arguments)
    faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    config = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config
    report = Report(
        benchmark="parallel",
        environment=Environment.of_this_process(usable_cores()),
        model=options.model,
        devices=options.devices,
        ep_size=options.ep_size,
        data_parallel_degree=options.data_parallel_degree,
        captured_graphs=not options.no_capture,
        overlap=not options.no_overlap,
        gpu=None,
    )
    start = time.perf_counter()
    with load_in_parallel(
        options, max(*options.batches, 8), options.max_length, not options.no_capture, not options.no_overlap
    ) as model:
        report.load_seconds = time.perf_counter() - start
        report.bytes_in_use = bytes_in_use(options.devices)
        gpu = this_gpu()
        report.gpu = gpu.name if gpu else None
        print(f"[loaded in {report.load_seconds:.1f} s]", file=sys.stderr, flush=True)
        run = Run(options, model, config, report)
        run.part("compare", run.compare)
        run.part("time", run.time)
        run.part("choose", run.choose)
        run.part("look", run.look)
        report.device_copy_rate = device_copy_rate()
        print(report.text(), flush=True)
        run.part("one request", run.one_request)
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
