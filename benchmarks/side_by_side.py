"""Decodes in several processes of one CPU at a time, and in one alone: together they should lose nothing.

    python benchmarks/side_by_side.py MODEL [--encoding bfloat16] [--processes 2] [--seconds 4]
        [--rounds 5] [--json FILE]

Every process holds the model and decodes one request after another. In each round the first decodes alone, then all at
the same time; what counts is each process's share of the rate alone, `1 / processes` if nothing is lost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from arguments import OneLineParser, positive_int
from bandwidth import usable_cores
from report import Environment, Spread, format_table, write_json

WORKER = Path(__file__).with_name("side_by_side_worker.py")


@dataclass(frozen=True)
class Report:
    """Steps a second of the first process alone and of each among all, and over the rounds each one's share."""

    benchmark: str
    environment: Environment
    model: str
    encoding: str
    seconds: int
    alone: Spread
    together: list[Spread]
    shares: list[Spread]

    def text(self) -> str:
        """The same for people."""
        rows = [("alone", self.alone.text(1, 1), "")]
        rows += [
            (f"process {index} of {len(self.together)}", rate.text(1, 1), share.text())
            for index, (rate, share) in enumerate(zip(self.together, self.shares, strict=True))
        ]
        return "\n".join([*self.environment.lines(), format_table(("", "tokens/s (quartiles)", "of alone"), rows)])


class Decoder:
    """A process that decodes when told; a context manager."""

    def __init__(self, model: Path, encoding: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, WORKER, model, encoding],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(os.environ),
        )
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, seconds: int) -> None:
        """Lets it decode."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def rate(self) -> float:
        """Steps a second of what was started."""
        answer = self._answer()
        return float(answer["steps"] / answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended with status {self._process.wait()}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


def measure(options: argparse.Namespace) -> Report:
    """Loads the processes and times them."""
    alone: list[float] = []
    together: list[list[float]] = [[] for _ in range(options.processes)]
    with ExitStack() as stack:
        decoders = [stack.enter_context(Decoder(options.model, options.encoding)) for _ in together]
        for index in range(options.rounds + 1):
            decoders[0].start(options.seconds)
            rate = decoders[0].rate()
            for decoder in decoders:
                decoder.start(options.seconds)
            rates = [decoder.rate() for decoder in decoders]
            if index > 0:  # the first warms up
                alone.append(rate)
                for found, rate in zip(together, rates, strict=True):
                    found.append(rate)
    return Report(
        benchmark="side_by_side",
        environment=Environment.of_this_process(usable_cores()),
        model=options.model.name,
        encoding=options.encoding,
        seconds=options.seconds,
        alone=Spread.of(alone),
        together=[Spread.of(rates) for rates in together],
        shares=[Spread.of([own / one for own, one in zip(rates, alone, strict=True)]) for rates in together],
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="side_by_side.py", description="Decode in several processes of one CPU at a time.")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of a checkpoint")
    add("--encoding", default="bfloat16", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    add("--processes", metavar="N", type=positive_int, default=2, help="(default: %(default)s)")
    add("--seconds", metavar="N", type=positive_int, default=4, help="of each measurement (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=5, help="(default: %(default)s)")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(f"MODEL: found no {options.model / 'config.json'}, expected a checkpoint's folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options = parse_arguments(arguments)
    report = measure(options)
    print(report.text())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
