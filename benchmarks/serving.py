"""Loads a running server with streaming clients: time to first token, time per token, tokens a second, errors.

    max serve --model MODEL --custom-architectures pipelines_registry --devices cpu --host 127.0.0.1
    python benchmarks/serving.py http://127.0.0.1:8000 [--clients 1,4,16,64] [--rates 0.5,2] [--json FILE] [--plot FILE]

A closed loop keeps a number of clients busy, each with one request at a time, for some rounds, and more of them where
few clients would send fewer than `--least` requests in all; an open loop sends requests at random moments, so many a
second on average. Every request streams a greedy completion of a random prompt.

With `--forward`, the result of `forward.py` on the same machine with the same batches and context, the median gap
between two tokens is set against the decode step of as large a batch: the difference is what serving costs. The
clients' own work is in it where they share the server's machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import httpx
from arguments import OneLineParser, positive_int, positive_ints
from bandwidth import usable_cores
from plot import draw
from report import Environment, format_table, write_json
from serving_load import Level, Workload, closed_loop, http_client, open_loop
from tqdm import tqdm


@dataclass(frozen=True)
class Overhead:
    """The median gap between two tokens of `clients` answers beside a decode step of a batch of that size, alone."""

    clients: int
    gap_seconds: float
    step_seconds: float

    HEADER: ClassVar[tuple[str, ...]] = ("batch", "served, ms", "decode step, ms", "overhead, ms", "overhead")

    @property
    def seconds(self) -> float:
        """What serving adds to a step."""
        return self.gap_seconds - self.step_seconds

    @property
    def share(self) -> float:
        """The same as a share of the step."""
        return self.seconds / self.step_seconds

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        times = (self.gap_seconds, self.step_seconds, self.seconds)
        return (str(self.clients), *(f"{1e3 * time:.1f}" for time in times), f"{100 * self.share:.0f} %")


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes.

    `server` is how the server was started, as `--server` said; `forward` the command that measured the decode steps.
    """

    benchmark: str
    environment: Environment
    server: str
    model: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    levels: list[Level]
    forward: str | None
    overhead: list[dict[str, float]]

    def text(self, overheads: Sequence[Overhead]) -> str:
        """The same for people."""
        lines = [
            *self.environment.lines(),
            f"{self.model}: prompts of {self.prompt_tokens} tokens, answers of {self.new_tokens}; {self.server}",
            "",
            format_table(Level.HEADER, [level.row() for level in self.levels]),
        ]
        for level in self.levels:
            lines += [f"{level.name}: {count} × {error}" for error, count in level.errors.items()]
        if overheads:
            lines += ["", format_table(Overhead.HEADER, [overhead.row() for overhead in overheads])]
        return "\n".join(lines)


def positive_numbers(text: str) -> tuple[float, ...]:
    """Reads numbers above 0, separated by commas.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < 1e6 for number in numbers):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected numbers above 0, such as 0.5,2")
    return numbers


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="serving.py", description="Load a running server with streaming clients.")
    add = parser.add_argument
    add("address", metavar="ADDRESS", help="the server's, such as http://127.0.0.1:8000")
    add("--clients", metavar="N,N", type=positive_ints, default=(1, 4, 16, 64), help="at a time (default: 1,4,16,64)")
    add("--rounds", metavar="N", type=positive_int, default=4, help="of each client, at least (default: %(default)s)")
    add("--least", metavar="N", type=positive_int, default=32, help="requests of a closed loop (default: %(default)s)")
    add("--rates", metavar="X,X", type=positive_numbers, default=(), help="requests a second, in an open loop")
    add("--arrivals", metavar="N", type=positive_int, default=64, help="requests a rate (default: %(default)s)")
    add("--prompt-tokens", metavar="N", type=positive_int, default=64, help="(default: %(default)s)")
    add("--new-tokens", metavar="N", type=positive_int, default=16, help="of each answer (default: %(default)s)")
    add("--token-ids", metavar="N", type=positive_int, default=256, help="prompts' ids are below N (default: 256)")
    add("--server", metavar="TEXT", default="started elsewhere", help="how the server was started, for the report")
    add("--forward", metavar="FILE", type=Path, help="result of forward.py to compare with")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    add("--plot", metavar="FILE", type=Path, help="draw the report to FILE (needs matplotlib and --json)")
    options = parser.parse_args(arguments)
    if options.plot is not None and options.json is None:
        parser.error("--plot: found no --json, expected one: the plot is drawn from it")
    try:
        options.model = httpx.get(f"{options.address}/v1/models", timeout=30).raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        parser.error(f"ADDRESS: found no server at {options.address} ({error}), expected one that serves /v1/models")
    try:
        options.steps = decode_steps(options.forward) if options.forward is not None else {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"--forward {options.forward}: found no result of forward.py ({error!r})")
    return options


def decode_steps(path: Path) -> dict[int, float]:
    """Median seconds of a decode step by batch size, from a result of `forward.py`.

    Raises:
        OSError, ValueError, LookupError: The file is no such result.
    """
    results = json.loads(path.read_text())["results"]
    return {row["batch_size"]: row["seconds"]["median"] for row in results if row["new_tokens"] == 1}


async def measure(options: argparse.Namespace) -> list[Level]:
    """Runs every load, one after another."""
    workload = Workload(options.model, options.prompt_tokens, options.new_tokens, options.token_ids)
    rounds = {clients: max(options.rounds, -(-options.least // clients)) for clients in options.clients}
    total = sum(clients * (rounds[clients] + 1) for clients in options.clients) + len(options.rates) * options.arrivals
    levels = []
    with tqdm(total=total, desc="requests", file=sys.stderr) as bar:
        async with http_client(options.address) as client:
            for clients in options.clients:
                levels.append(await closed_loop(client, workload, clients, rounds[clients], seed=0, done=bar.update))
            for rate in options.rates:
                levels.append(await open_loop(client, workload, rate, options.arrivals, seed=1, done=bar.update))
    return levels


def compare(levels: Sequence[Level], steps: dict[int, float]) -> list[Overhead]:
    """Sets closed loops against decode steps of batches as large as their clients, where both were measured."""
    return [
        Overhead(level.clients, level.token_gap.p50, steps[level.clients])
        for level in levels
        if level.clients in steps and level.clients is not None and level.token_gap is not None
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments, 1 if any request failed."""
    options = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    levels = asyncio.run(measure(options))
    overheads = compare(levels, options.steps)
    report = Report(
        benchmark="serving",
        environment=environment,
        server=options.server,
        model=options.model,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        levels=levels,
        forward=json.loads(options.forward.read_text())["environment"]["command"] if options.forward else None,
        overhead=[
            {
                "clients": one.clients,
                "gap_seconds": one.gap_seconds,
                "step_seconds": one.step_seconds,
                "share": one.share,
            }
            for one in overheads
        ],
    )
    print(report.text(overheads))
    if options.json is not None:
        write_json(options.json, report)
    if options.plot is not None:
        draw(options.json, options.plot)
    if any(level.errors for level in levels):
        sys.exit(1)


if __name__ == "__main__":
    main()
