"""Times speculation with the MTP layers: acceptance, draft and verify time, and speed-up, by batch and depth.

    python benchmarks/speculation.py MODEL [--batches 1,4,8] [--depth 3] [--new-tokens 64] [--rounds 3] [--json FILE]
                                     [--devices cpu] [--precompiled-mefs DIR] [--precompiled-mtp-mefs DIR]
    python benchmarks/speculation.py MODEL --compare PROMPTS …
    python benchmarks/speculation.py MODEL --moving OTHER [--batches 1,4,8] [--json FILE]

MODEL is a checkpoint whose drafts can be right, such as `python -m step3p5.random_checkpoint OUT --preset mid
--predictable 0.8` writes. The plain pipeline and the speculative one, at each depth and at the depth that it chooses
itself, generate greedily from the same prompts, new ones each round, after one round to warm up; prompts are read
before the clock starts. On a CPU the pipelines take turns once a round. A GPU has room for one at a time: the one that
drafts runs all its rounds first, then the plain one with overlapping steps and captured graphs (`device.py`).

The prediction is of bytes: tokens a cycle by the acceptance that was seen, over the bytes that a cycle reads beside
those of plain decoding (`step3p5.byte_account`; routed experts as expected under uniform routing). `--predict` only
counts and loads nothing.

`--compare` holds the tokens of both pipelines to each other instead (`speculation_tokens.py`), `--moving` runs through
changing batches and checkpoints and shows what the chosen depth costs against plain decoding (`speculation_moving.py`).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arguments import OneLineParser, devices, positive_int, positive_ints
from bandwidth import usable_cores
from contention import CpuTimes, cores_taken
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, Spread, format_table, write_json
from speculation_moving import MovingReport, PhaseResult, moving_phases, run_moving, run_moving_apart
from speculation_run import FIRST_TEXT_TOKEN, PROMPT_TOKENS, Case, Settings, random_prompts, run_case
from speculation_tokens import ComparisonReport, compare_pipelines
from tqdm import tqdm
from transformers import AutoConfig

from step3p5.byte_account import cycle_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import ModelConfig
from step3p5.pretrained_config import as_step3p5_config
from step3p5.random_checkpoint.predictable import RING_TOKENS
from step3p5.speculation.draft_vocabulary import draft_vocabulary_size
from step3p5.speculation.policy import AdaptiveDepth, FixedDepth, tokens_per_cycle

MAX_LENGTH = 1024


@dataclass(frozen=True)
class Result:
    """A case's figures; times are of a step, `speedup` is of the median rates of a round."""

    batch: int
    depth: int | None
    tokens_per_second: Spread
    verify_ms: float | None
    draft_ms: float | None
    acceptance: list[float]
    speedup: float
    predicted_speedup: float | None

    HEADER = ("batch, depth", "tok/s median (quartiles)", "verify ms", "draft ms", "acceptance", "speed-up", "by bytes")

    def row(self) -> tuple[str, ...]:
        """The table's cells."""
        name = {None: "chosen", 0: "plain"}.get(self.depth, str(self.depth))
        return (
            f"{self.batch}, {name}",
            self.tokens_per_second.text(digits=1),
            "" if self.verify_ms is None else f"{self.verify_ms:.1f}",
            "" if self.draft_ms is None else f"{self.draft_ms:.1f}",
            " ".join(f"{rate:.2f}" for rate in self.acceptance),
            f"{self.speedup:.2f}",
            "" if self.predicted_speedup is None else f"{self.predicted_speedup:.2f}",
        )


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    new_tokens: int
    rounds: int
    cores_taken: float | None
    results: list[Result]

    def text(self) -> str:
        """The same for people."""
        busy = "" if self.cores_taken is None else f"; other processes kept {self.cores_taken:.1f} cores busy"
        return "\n".join(
            [
                *self.environment.lines(),
                f"{self.model} on {self.devices}: {self.new_tokens} new tokens a request, {self.rounds} rounds{busy}",
                "",
                format_table(Result.HEADER, [result.row() for result in self.results]),
            ]
        )


def predicted_speedup(model: ModelConfig, batch: int, acceptance: Sequence[float], dtype: CheckpointDtype) -> float:
    """Speed-up by the bytes read, drafting as deep as `acceptance` is long."""

    def read(depth: int) -> float:
        return cycle_bytes(model, batch, depth, PROMPT_TOKENS, dtype, dtype, draft_vocabulary_size(model))

    return tokens_per_cycle(acceptance) * read(0) / read(len(acceptance))


def run_rounds(
    sides: Sequence[Side], model: ModelConfig, cases: Sequence[Case], rounds: int, new_tokens: int, devices: str
) -> None:
    """Runs the cases of `sides` once to warm up and then once a round, whose figures the cases keep."""
    for index in tqdm(range(rounds + 1), desc="warm-up and rounds", file=sys.stderr):
        for case in cases:
            side = next((side for side in sides if side.drafts == (case.depth != 0)), None)
            if side is not None:
                prompts = random_prompts(1000 * index + case.batch, model.vocab_size, case.batch)
                target = case if index else Case(case.batch, case.depth)
                run_case(side.pipeline, side.policy_of(case), target, prompts, new_tokens, devices)


@dataclass(frozen=True)
class Side:
    """A loaded pipeline; `chosen` is the policy that chooses the depth and learns through all rounds."""

    pipeline: Any
    chosen: FixedDepth | AdaptiveDepth | None

    @property
    def drafts(self) -> bool:
        """Whether it is the one that drafts."""
        return self.chosen is not None

    def policy_of(self, case: Case) -> FixedDepth | AdaptiveDepth | None:
        """How deep to draft."""
        return self.chosen if not case.depth else FixedDepth([(1, case.batch, case.depth)], case.depth)


def evaluate(cases: Sequence[Case], model: ModelConfig, dtype: CheckpointDtype) -> list[Result]:
    """Each case's figures beside the plain pipeline's."""
    plain = {case.batch: case.tokens_per_second for case in cases if case.depth == 0}
    results = []
    for case in cases:
        ratios = [rate / base for rate, base in zip(case.tokens_per_second, plain[case.batch], strict=True)]
        drafted = case.acceptance[: case.depth]
        results.append(
            Result(
                batch=case.batch,
                depth=case.depth,
                tokens_per_second=Spread.of(case.tokens_per_second),
                verify_ms=statistics.median(case.verify_ms) if case.verify_ms else None,
                draft_ms=statistics.median(case.draft_ms) if case.draft_ms else None,
                acceptance=drafted,
                speedup=statistics.median(ratios),
                predicted_speedup=predicted_speedup(model, case.batch, drafted, dtype) if case.depth else None,
            )
        )
    return results


def measure(model: str, config: ModelConfig, options: argparse.Namespace, depth: int) -> list[Case]:
    """Times every batch size with the plain pipeline, at each depth and at the depth that is chosen."""
    settings = settings_of(options)
    cases = [Case(batch, d) for batch in options.batches for d in (0, *range(1, depth + 1), None)]
    rest = config, cases, options.rounds, options.new_tokens, options.devices
    with settings.load_drafting(model, depth) as drafting:
        sides = [Side(drafting.pipeline, drafting.pipeline.policy)]
        if settings.fit_together:
            with settings.load_plain(model) as plain:
                run_rounds([Side(plain.pipeline, None), *sides], *rest)
            return cases
        run_rounds(sides, *rest)
        sides.clear()
    with settings.load_plain(model) as plain:
        run_rounds([Side(plain.pipeline, None)], *rest)
    return cases


def measure_moving(options: argparse.Namespace, config: ModelConfig, depth: int) -> tuple[list[PhaseResult], float]:
    """Runs through changing batches and both checkpoints; see `run_moving`."""
    settings = settings_of(options)
    folders = {Path(folder).name: folder for folder in (options.model, options.moving)}
    phases = moving_phases(options.batches, *folders)
    vocabulary = range(FIRST_TEXT_TOKEN, min(RING_TOKENS, config.vocab_size - 64))
    requests = vocabulary, PROMPT_TOKENS, options.new_tokens

    def load_plain(name: str) -> AutoModel:
        return settings.load_plain(folders[name])

    def load_drafting(name: str) -> AutoModel:
        return settings.load_drafting(folders[name], depth)

    if not settings.fit_together:
        return run_moving_apart(load_plain, load_drafting, phases, depth, *requests, options.devices)
    models = {name: (load_plain(name), load_drafting(name)) for name in folders}
    pipelines = {name: (plain.pipeline, drafting.pipeline) for name, (plain, drafting) in models.items()}
    return run_moving(pipelines, phases, *requests)


def settings_of(options: argparse.Namespace) -> Settings:
    """How the command line wants the pipelines loaded."""
    return Settings(
        devices=options.devices,
        max_batch_size=max(options.batches),
        max_length=MAX_LENGTH,
        artifacts=options.precompiled_mefs,
        mtp_artifacts=options.precompiled_mtp_mefs,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="speculation.py", description="Time speculation with a checkpoint's MTP layers.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 4, 8), help="batch sizes (default: 1,4,8)")
    add("--depth", metavar="N", type=positive_int, default=3, help="most drafts a cycle (default: %(default)s)")
    add("--new-tokens", metavar="N", type=positive_int, default=64, help="a request (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=3, help="(default: %(default)s)")
    add("--devices", type=devices, default="cpu", help="as MAX's --devices (default: %(default)s)")
    add("--precompiled-mefs", metavar="DIR", help="artifacts compiled ahead for the plain pipeline, for a GPU")
    add("--precompiled-mtp-mefs", metavar="DIR", help="the same for the one that drafts (--speculative-method mtp)")
    add("--compare", metavar="N", type=positive_int, help="compare the tokens of N prompts instead of times")
    add("--predict", metavar="P", type=float, help="print the speed-up by bytes at acceptance P and end")
    add("--moving", metavar="OTHER", help="run through the batches with MODEL and back with OTHER, of the same shape")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if PROMPT_TOKENS + options.new_tokens > MAX_LENGTH:
        parser.error(f"--new-tokens: found {options.new_tokens}, expected at most {MAX_LENGTH - PROMPT_TOKENS}")
    if options.moving is not None and Path(options.moving).name == Path(options.model).name:
        parser.error(f"--moving: found {options.moving}, expected a folder of another name than MODEL's")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_arguments(arguments)
    hub_config = AutoConfig.from_pretrained(options.model)
    model = as_step3p5_config(hub_config).model_config
    dtype = CheckpointDtype(str(hub_config.torch_dtype).removeprefix("torch."))
    depths = range(1, min(options.depth, len(model.mtp_layers)) + 1)
    if options.predict is not None:
        rows = [
            (str(batch), *(f"{predicted_speedup(model, batch, [options.predict] * d, dtype):.2f}" for d in depths))
            for batch in options.batches
        ]
        print(format_table(("batch", *(f"depth {depth}" for depth in depths)), rows))
        return
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    before = CpuTimes.now()
    if options.compare is not None:
        comparisons = compare_pipelines(
            options.model,
            settings_of(options),
            model,
            dtype,
            max(depths),
            options.compare,
            options.batches,
            options.new_tokens,
        )
        show(
            ComparisonReport(
                benchmark="speculation_tokens",
                environment=Environment.of_this_process(usable_cores()),
                model=Path(options.model).name,
                devices=options.devices,
                depth=max(depths),
                dtype=dtype,
                comparisons=comparisons,
            ),
            options.json,
        )
        sys.exit(any(comparison.unexplained for comparison in comparisons))
    if options.moving is not None:
        phases, cost = measure_moving(options, model, max(depths))
        show(
            MovingReport(
                benchmark="speculation_moving",
                environment=Environment.of_this_process(usable_cores()),
                model=Path(options.model).name,
                new_tokens=options.new_tokens,
                cores_taken=cores_taken(before, CpuTimes.now()),
                phases=phases,
                cost=cost,
            ),
            options.json,
        )
        return
    cases = measure(options.model, model, options, max(depths))
    report = Report(
        benchmark="speculation",
        environment=Environment.of_this_process(usable_cores()),
        model=Path(options.model).name,
        devices=options.devices,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        cores_taken=cores_taken(before, CpuTimes.now()),
        results=evaluate(cases, model, dtype),
    )
    show(report, options.json)


def show(report: Report | MovingReport | ComparisonReport, file: Path | None) -> None:
    """Prints a report, and writes it to `file` if there is one."""
    print(report.text())
    if file is not None:
        write_json(file, report)


if __name__ == "__main__":
    main()
