"""Times speculation with the MTP layers: acceptance, draft and verify time, and speed-up, by batch and depth.

    python benchmarks/speculation.py MODEL [--batches 1,4,8] [--depth 3] [--new-tokens 64] [--rounds 3] [--json FILE]
    python benchmarks/speculation.py MODEL --moving OTHER [--batches 1,4,8] [--json FILE]

MODEL is a checkpoint whose drafts can be right, such as `python -m step3p5.random_checkpoint OUT --preset mid
--predictable 0.8` writes. The plain pipeline and the speculative one, at each depth and at the depth that it chooses
itself, generate greedily from the same prompts, new ones each round, in turn once a round after one round to warm up;
prompts are read before the clock starts. `--predict` only counts bytes and loads nothing.

The prediction is of bytes: tokens a cycle by the acceptance that was seen, over the bytes that a cycle reads beside
those of plain decoding (`step3p5.byte_account`; routed experts as expected under uniform routing).

`--moving` runs through changing batches and checkpoints instead and shows what the chosen depth costs against plain
decoding (`speculation_moving.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from arguments import OneLineParser, positive_int, positive_ints
from bandwidth import usable_cores
from contention import CpuTimes, cores_taken
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from report import Environment, Spread, format_table, write_json
from speculation_moving import MovingReport, moving_phases, run_moving
from tqdm import tqdm
from transformers import AutoConfig

from step3p5.byte_account import cycle_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import ModelConfig
from step3p5.pretrained_config import as_step3p5_config
from step3p5.speculation.policy import AdaptiveDepth, FixedDepth, tokens_per_cycle
from step3p5.speculation.statistics import Statistics

PROMPT_TOKENS, MAX_LENGTH = 64, 1024
FIRST_TEXT_TOKEN = 16


@dataclass
class Case:
    """One batch size at one depth; `depth` is `None` where the policy chooses, 0 for the plain pipeline."""

    batch: int
    depth: int | None
    tokens_per_second: list[float] = field(default_factory=list)
    verify_ms: list[float] = field(default_factory=list)
    draft_ms: list[float] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> list[float]:
        """Of each depth, given the depths before it."""
        return [a / v if v else 0.0 for a, v in zip(self.accepted, self.verified, strict=True)]

    def keep(self, tokens_per_second: float, counts: Statistics | None) -> None:
        """Adds one round."""
        self.tokens_per_second.append(tokens_per_second)
        if counts is not None:
            self.verify_ms.append(1e3 * counts.verify_seconds / counts.steps)
            self.draft_ms.append(1e3 * counts.draft_seconds / counts.steps)
            before = [self.verified or [0] * len(counts.verified), self.accepted or [0] * len(counts.accepted)]
            self.verified = [sum(pair) for pair in zip(before[0], counts.verified, strict=True)]
            self.accepted = [sum(pair) for pair in zip(before[1], counts.accepted, strict=True)]


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
                f"{self.model}: {self.new_tokens} new tokens a request, {self.rounds} rounds{busy}",
                "",
                format_table(Result.HEADER, [result.row() for result in self.results]),
            ]
        )


def predicted_speedup(model: ModelConfig, batch: int, acceptance: Sequence[float], dtype: CheckpointDtype) -> float:
    """Speed-up by the bytes read, drafting as deep as `acceptance` is long."""

    def read(depth: int) -> float:
        return cycle_bytes(model, batch, depth, PROMPT_TOKENS, dtype, dtype)

    return tokens_per_cycle(acceptance) * read(0) / read(len(acceptance))


def run_case(models: tuple[AutoModel, AutoModel], case: Case, prompts: list[list[int]], new_tokens: int) -> None:
    """Generates once and keeps the rate, prompts excluded."""
    pipeline: Any = models[case.depth != 0].pipeline
    counts: Statistics | None = None
    if case.depth != 0:
        counts = pipeline.statistics
        if case.depth is not None:
            pipeline.policy = FixedDepth([(1, case.batch, case.depth)], len(counts.verified))
        elif not isinstance(pipeline.policy, AdaptiveDepth):
            pipeline.policy = chosen_depths[id(pipeline)]
    contexts = [
        TextContext(
            request_id=RequestID(),
            max_length=PROMPT_TOKENS + new_tokens,
            tokens=TokenBuffer(np.asarray(prompt, dtype=np.int64)),
            eos_tracker=EOSTracker(eos_token_ids=set()),
            sampling_params=SamplingParams(temperature=0.0, top_k=1, ignore_eos=True),
        )
        for prompt in prompts
    ]
    with GenerateIterator.from_contexts(pipeline, contexts) as batch:
        generated = sum(len(tokens) for tokens in batch.step().values())
        if counts is not None:
            pipeline.statistics = counts = Statistics(len(counts.verified))
        started = time.perf_counter()
        total = -generated
        while not batch.done:
            total += sum(len(tokens) for tokens in batch.step().values())
        seconds = time.perf_counter() - started
    case.keep((total + generated) / seconds, counts)


chosen_depths: dict[int, AdaptiveDepth] = {}
"""The policy of each pipeline that learns through all rounds."""


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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="speculation.py", description="Time speculation with a checkpoint's MTP layers.")
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint: a folder")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 4, 8), help="batch sizes (default: 1,4,8)")
    add("--depth", metavar="N", type=positive_int, default=3, help="most drafts a cycle (default: %(default)s)")
    add("--new-tokens", metavar="N", type=positive_int, default=64, help="a request (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=3, help="(default: %(default)s)")
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
    settings: dict[str, Any] = dict(
        devices="cpu",
        custom_architectures=["pipelines_registry"],
        max_batch_size=max(options.batches),
        max_length=MAX_LENGTH,
    )
    if options.moving is not None:
        models = {Path(name).name: load_both(name, max(depths), settings) for name in (options.model, options.moving)}
        before = CpuTimes.now()
        phases, cost = run_moving(
            {name: (plain.pipeline, drafting.pipeline) for name, (plain, drafting) in models.items()},
            moving_phases(options.batches, *models),
            range(FIRST_TEXT_TOKEN, model.vocab_size - 64),
            PROMPT_TOKENS,
            options.new_tokens,
        )
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
    plain, drafting = load_both(options.model, max(depths), settings)
    chosen_depths[id(drafting.pipeline)] = drafting.pipeline.policy
    cases = [Case(batch, depth) for batch in options.batches for depth in (0, *depths, None)]
    rng = np.random.default_rng(0)
    before = CpuTimes.now()
    for index in tqdm(range(options.rounds + 1), desc="warm-up and rounds", file=sys.stderr):
        prompts = {
            batch: rng.integers(FIRST_TEXT_TOKEN, model.vocab_size - 64, (batch, PROMPT_TOKENS)).tolist()
            for batch in options.batches
        }
        for case in cases:
            target = case if index else Case(case.batch, case.depth)
            run_case((plain, drafting), target, prompts[case.batch], options.new_tokens)
    report = Report(
        benchmark="speculation",
        environment=Environment.of_this_process(usable_cores()),
        model=Path(options.model).name,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        cores_taken=cores_taken(before, CpuTimes.now()),
        results=evaluate(cases, model, dtype),
    )
    show(report, options.json)


def load_both(model: str, depth: int, settings: dict[str, Any]) -> tuple[AutoModel, AutoModel]:
    """A checkpoint's plain pipeline, and the one that drafts up to `depth` tokens."""
    drafting = AutoModel(model, speculative_method="mtp", num_speculative_tokens=depth, **settings)
    return AutoModel(model, **settings), drafting


def show(report: Report | MovingReport, file: Path | None) -> None:
    """Prints a report, and writes it to `file` if there is one."""
    print(report.text())
    if file is not None:
        write_json(file, report)


if __name__ == "__main__":
    main()
