"""Loads checkpoints on this CPU in new processes, a token each, and says what that took: seconds, and memory by kind.

    python benchmarks/starts.py MODEL [MODEL ...] [--encodings float32,bfloat16] [--rounds 3] [--json FILE]

A first process of each case, which compiles what was not compiled before, does not count. Cases are taken in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import CPU_ENCODINGS, OneLineParser, encodings, positive_int
from bandwidth import usable_cores
from report import Environment, format_table, write_json
from tqdm import tqdm
from transformers import AutoConfig

from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors
from step3p5.pretrained_config import as_step3p5_config

FIRST_TOKEN = Path(__file__).with_name("first_token.py")
MB = 1e6


@dataclass(frozen=True)
class Start:
    """What a checkpoint in an encoding took; medians of `first_token.py`'s figures."""

    model: str
    encoding: str
    weight_bytes: int
    """Those of the weights kept."""

    figures: dict[str, float]

    HEADER = (
        "model",
        "encoding",
        "first token, s",
        "weights, MB",
        "resident",
        "x",
        "mapped weights",
        "libraries",
        "own",
    )

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        resident = self.figures["resident_bytes"]
        kinds = ("mapped_weights_bytes", "libraries_bytes", "own_bytes")
        return (
            self.model,
            self.encoding,
            f"{self.figures['first_token_seconds']:.1f}",
            f"{self.weight_bytes / MB:.0f}",
            f"{resident / MB:.0f}",
            f"{resident / self.weight_bytes:.2f}",
            *(f"{self.figures[kind] / MB:.0f}" for kind in kinds),
        )


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    rounds: int
    starts: list[Start]


def start(model: Path, encoding: str) -> dict[str, float]:
    """The figures of a new process."""
    command: list[str | Path] = [sys.executable, FIRST_TOKEN, model, encoding]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=dict(os.environ))
    figures = json.loads(run.stdout)
    assert isinstance(figures, dict)
    return figures


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def weight_bytes(model: Path, encoding: str) -> int:
    """Those of the weights that a process keeps."""
    config = as_step3p5_config(AutoConfig.from_pretrained(model)).model_config
    return sum(spec.num_bytes(CheckpointDtype(encoding)) for spec in checkpoint_tensors(config).values())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="starts.py", description="Load checkpoints on this CPU in new processes.")
    add = parser.add_argument
    add("models", metavar="MODEL", type=Path, nargs="+", help="folder of a checkpoint")
    add("--encodings", type=encodings, default=CPU_ENCODINGS, help="float32, bfloat16 or both (default: both)")
    add("--rounds", metavar="N", type=positive_int, default=3, help="(default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    for model in options.models:
        if not (model / "config.json").is_file():
            parser.error(f"MODEL: found no {model / 'config.json'}, expected a checkpoint's folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options = parse_arguments(arguments)
    cases = [(model, encoding) for model in options.models for encoding in options.encodings]
    found: dict[tuple[Path, str], list[dict[str, float]]] = {case: [] for case in cases}
    for index in tqdm(range(options.rounds + 1), desc="first start and rounds", file=sys.stderr):
        for case in cases:
            figures = start(*case)
            if index:
                found[case].append(figures)
    report = Report(
        benchmark="starts",
        environment=Environment.of_this_process(usable_cores()),
        rounds=options.rounds,
        starts=[
            Start(model.name, encoding, weight_bytes(model, encoding), medians(rounds))
            for (model, encoding), rounds in found.items()
        ],
    )
    print("\n".join(report.environment.lines()))
    print(format_table(Start.HEADER, [one.row() for one in report.starts]))
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
