"""Times a checkpoint on this CPU in MAX and in llama.cpp, pass by pass in turn, and sets one against the other.

    python benchmarks/cpu_peer.py MODEL (--peer DIR | --build DIR) [--encodings float32,bfloat16] [--rounds 5]
        [--batches 1,4,8] [--prefill 64,512] [--profile] [--json FILE]

`--build` first makes the peer in a new folder: llama-cpp-python out of its source archive, built for this machine, and
the archive's converter (`llama_cpp_build.py`); `--peer` takes a folder that was made before. The checkpoint is
converted once for each encoding. Both sides stay loaded, read the same random prompts and decode greedily with all
cores. MAX is timed from outside, sampling and Python included; llama.cpp is timed around `llama_decode` alone. Of each
pass the median of a round counts, of the rounds the median of their ratios, which the machine's pace leaves alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from arguments import CPU_ENCODINGS, OneLineParser, encodings, positive_int, positive_ints
from bandwidth import Bandwidth, measure_bandwidth, usable_cores
from contention import CpuTimes, cores_taken
from forward_cases import Case, make_cases
from llama_cpp_build import VERSION, build, convert, python_of
from max.pipelines.lib.auto_model import AutoModel
from report import Environment, Spread, format_table, write_json
from step_profile import StepProfile
from tqdm import tqdm
from transformers import AutoConfig

from step3p5.byte_account import forward_bytes
from step3p5.checkpoint_tensors import CheckpointDtype, checkpoint_tensors
from step3p5.layer_config import ModelConfig
from step3p5.pretrained_config import as_step3p5_config

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
FIRST_TOKEN = Path(__file__).with_name("first_token.py")


@dataclass(frozen=True)
class Comparison:
    """One kind of pass: seconds of each side's passes, and the spread over rounds of how much faster MAX is."""

    name: str
    tokens: int
    here: Spread
    llama_cpp: Spread
    ratio: Spread
    of_copy: float
    """Bytes that the pass must read, a second at the median time here, as a share of a plain copy's best rate."""

    HEADER = ("pass", "here, ms (quartiles)", "tok/s", "llama.cpp, ms", "tok/s", "ratio (quartiles)", "of copy")

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            self.name,
            self.here.text(1e3),
            f"{self.tokens / self.here.median:.1f}",
            self.llama_cpp.text(1e3),
            f"{self.tokens / self.llama_cpp.median:.1f}",
            self.ratio.text(1),
            f"{100 * self.of_copy:.0f} %",
        )


@dataclass(frozen=True)
class EncodingReport:
    """What was found in one encoding; bytes are resident ones, `weight_bytes` those of the weights kept."""

    encoding: str
    weight_bytes: int
    start: dict[str, float]
    """`first_token.py`'s figures, compiled before."""
    llama_cpp_load_seconds: float
    llama_cpp_resident_bytes: int
    cores_taken: float | None
    first_tokens_agree: str
    comparisons: list[Comparison]
    profile: StepProfile | None

    def text(self) -> str:
        """The same for people."""
        resident = self.start["resident_bytes"]
        lines = [
            f"{self.encoding}: first token {self.start['first_token_seconds']:.1f} s after the start of a new process "
            f"(imports {self.start['import_seconds']:.1f}, load {self.start['load_seconds']:.1f}); llama.cpp loads in "
            f"{self.llama_cpp_load_seconds:.1f} s",
            f"resident {resident / 2**20:.0f} MiB, {resident / self.weight_bytes:.2f} x the weights, at most "
            f"{self.start['peak_bytes'] / 2**20:.0f} MiB while loading; llama.cpp "
            f"{self.llama_cpp_resident_bytes / 2**20:.0f} MiB",
            f"first tokens that agree: {self.first_tokens_agree}",
            *([f"other processes kept {self.cores_taken:.1f} cores busy"] if self.cores_taken is not None else []),
            format_table(Comparison.HEADER, [comparison.row() for comparison in self.comparisons]),
            *([self.profile.text()] if self.profile is not None else []),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    llama_cpp_python: str
    model: str
    rounds: int
    bandwidth: Bandwidth
    encodings: list[EncodingReport]

    def text(self) -> str:
        """The same for people."""
        head = [*self.environment.lines(), f"llama-cpp-python {self.llama_cpp_python}", self.bandwidth.line()]
        return "\n".join(head) + "\n\n" + "\n\n".join(encoding.text() for encoding in self.encodings)


class LlamaCpp:
    """llama.cpp in a process of its own; a context manager."""

    def __init__(self, python: Path, gguf: Path, threads: int, length: int, requests: int) -> None:
        command: list[str | Path] = [python, WORKER, gguf, *map(str, (threads, length, requests))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.load_seconds = float(self._answer()["load_seconds"])
        self.resident_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, prompts: list[list[int]], steps: int) -> tuple[list[float], list[int]]:
        """Seconds of each pass, the prompts' first, and each request's first token."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # who has ended gives no answer either
            self._process.stdin.write(json.dumps({"prompts": prompts, "steps": steps}) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.resident_bytes = answer["resident_bytes"]
        return answer["seconds"], answer["first_tokens"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{WORKER.name} ended with status {self._process.wait()}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


def run_here(model: AutoModel, prompts: list[list[int]], steps: int) -> tuple[list[float], list[int]]:
    """The same in MAX."""
    seconds: list[float] = []
    first: dict[int, int] = {}
    with model.generate_iter(prompts, max_new_tokens=steps + 1, temperature=0.0, ignore_eos=True) as batch:
        while not batch.done:
            start = time.perf_counter()
            step = batch.step()
            seconds.append(time.perf_counter() - start)
            for row, tokens in step.items():
                first.setdefault(row, int(tokens[0]))
    return seconds, [first[row] for row in range(len(prompts))]


@dataclass
class Rounds:
    """A case's medians of each round on both sides, and how many first tokens were the same."""

    case: Case
    here: list[float]
    llama_cpp: list[float]
    same: int = 0
    compared: int = 0

    def run(self, model: AutoModel, peer: LlamaCpp, rng: np.random.Generator, keep: bool) -> None:
        """One round of both sides on new prompts."""
        case = self.case
        prompts = case.prompts(model, rng)
        # Whatever keeps the cores busy for longer than a run must not fall to the same side each time.
        if rng.integers(2):
            here, llama_cpp = run_here(model, prompts, case.decode_steps), peer.run(prompts, case.decode_steps)
        else:
            llama_cpp, here = peer.run(prompts, case.decode_steps), run_here(model, prompts, case.decode_steps)
        if keep:
            timed = slice(1, None) if case.decode_steps else slice(None)
            self.here.append(statistics.median(here[0][timed]))
            self.llama_cpp.append(statistics.median(llama_cpp[0][timed]))
            self.same += sum(a == b for a, b in zip(here[1], llama_cpp[1], strict=True))
            self.compared += len(prompts)

    def comparison(self, config: ModelConfig, dtype: CheckpointDtype, copy_rate: float) -> Comparison:
        """What the rounds come to."""
        here = Spread.of(self.here)
        to_read = forward_bytes(config, self.case.forward, dtype, CheckpointDtype.FLOAT32)
        return Comparison(
            name=self.case.name,
            tokens=self.case.forward.num_tokens,
            here=here,
            llama_cpp=Spread.of(self.llama_cpp),
            ratio=Spread.of([peer / own for own, peer in zip(self.here, self.llama_cpp, strict=True)]),
            of_copy=to_read / here.median / copy_rate,
        )


def compare(options: argparse.Namespace, config: ModelConfig, encoding: str, copy_rate: float) -> EncodingReport:
    """Loads both sides in one encoding and times them."""
    dtype = CheckpointDtype(encoding)
    cases = make_cases(options.prefill, options.batches, (options.context,), options.steps)
    length = max(case.longest for case in cases)
    requests = max(options.batches)
    gguf = convert(options.peer, options.model, encoding)
    rng = np.random.default_rng()
    with AutoModel(
        str(options.model),
        devices="cpu",
        custom_architectures=["pipelines_registry"],
        quantization_encoding=encoding,
        max_batch_size=requests,
        max_length=length,
    ) as model:
        with LlamaCpp(python_of(options.peer, "runtime"), gguf, usable_cores(), length, requests) as peer:
            rounds = [Rounds(case, [], []) for case in cases]
            before = CpuTimes.now()
            for index in tqdm(range(options.rounds + 1), desc=f"{encoding}, warm-up and rounds", file=sys.stderr):
                for case in rounds:
                    case.run(model, peer, rng, keep=index > 0)
            taken = cores_taken(before, CpuTimes.now())
            load, resident = peer.load_seconds, peer.resident_bytes
        profile = StepProfile.measure(model, options.context, options.steps) if options.profile else None
    start = subprocess.run(
        [sys.executable, FIRST_TOKEN, options.model, encoding],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    return EncodingReport(
        encoding=encoding,
        weight_bytes=sum(spec.num_bytes(dtype) for spec in checkpoint_tensors(config).values()),
        start=json.loads(start.stdout),
        llama_cpp_load_seconds=load,
        llama_cpp_resident_bytes=resident,
        cores_taken=taken,
        first_tokens_agree=f"{sum(case.same for case in rounds)} of {sum(case.compared for case in rounds)}",
        comparisons=[case.comparison(config, dtype, copy_rate) for case in rounds],
        profile=profile,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program where it is unusable."""
    parser = OneLineParser(prog="cpu_peer.py", description="Time a checkpoint on this CPU in MAX and in llama.cpp.")
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="folder of a checkpoint")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--peer", metavar="DIR", type=Path, help="folder that --build made")
    where.add_argument("--build", metavar="DIR", type=Path, help="build llama.cpp in this new folder first")
    add("--encodings", type=encodings, default=CPU_ENCODINGS, help="float32, bfloat16 or both (default: both)")
    add("--batches", metavar="N,N", type=positive_ints, default=(1, 4, 8), help="decoded batches (default: 1,4,8)")
    add("--prefill", metavar="N,N", type=positive_ints, default=(64, 512), help="prompt lengths (default: 64,512)")
    add("--context", metavar="N", type=positive_int, default=64, help="tokens before decoding (default: %(default)s)")
    add("--steps", metavar="N", type=positive_int, default=16, help="decode steps a round (default: %(default)s)")
    add("--rounds", metavar="N", type=positive_int, default=5, help="(default: %(default)s)")
    add("--profile", action="store_true", help="show where the time of a decode step goes")
    add("--json", metavar="FILE", type=Path, help="write the report to FILE as well")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").is_file():
        parser.error(f"MODEL: found no {options.model / 'config.json'}, expected a checkpoint's folder")
    if options.peer is not None and not python_of(options.peer, "runtime").exists():
        parser.error(f"--peer: found no {python_of(options.peer, 'runtime')}, expected a folder that --build made")
    if options.build is not None and options.build.exists() and any(options.build.iterdir()):
        parser.error(f"--build: found files in {options.build}, expected a new folder; --peer takes a built one")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with status 2 on unusable arguments."""
    options = parse_arguments(arguments)
    environment = Environment.of_this_process(usable_cores())
    logging.getLogger("max.pipelines").setLevel(logging.WARNING)
    config = as_step3p5_config(AutoConfig.from_pretrained(options.model)).model_config
    if options.build is not None:
        build(options.build)
        options.peer = options.build
    bandwidth = measure_bandwidth()
    report = Report(
        benchmark="cpu_peer",
        environment=environment,
        llama_cpp_python=VERSION,
        model=options.model.name,
        rounds=options.rounds,
        bandwidth=bandwidth,
        encodings=[compare(options, config, name, bandwidth.copy.maximum) for name in options.encodings],
    )
    print(report.text())
    if options.json is not None:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
