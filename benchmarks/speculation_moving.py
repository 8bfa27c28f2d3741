"""A run whose batches and acceptance change while the policy chooses the depth, against plain decoding, phase by phase.

What `speculation.py --moving OTHER` runs. Batches grow, then another checkpoint of the same shape takes over, whose
drafts are right at another rate, then the batches shrink again, and the first checkpoint returns. One policy goes
through all phases. The plain pipeline and the one that drafts generate the same tokens from the same prompts; prompts
are read before the clocks start. On a CPU they take turns of half a second, so that whatever else the machine does in
between falls on both alike. A GPU has room for one checkpoint at a time: the pipelines that draft run through the
phases first, each after a cycle of every batch size and depth (whose graphs are captured then, as a server's are once),
then the plain ones, which capture theirs while they load.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from device import settle
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from report import Environment, format_table
from tqdm import tqdm

from step3p5.speculation.policy import FixedDepth
from step3p5.speculation.statistics import Statistics

TURN_SECONDS = 0.5
"""How long a pipeline generates before it is the other's turn."""

WARM_UP_TOKENS = 24
"""Of a request, for each batch size and depth."""

Prompts: TypeAlias = Sequence[npt.NDArray[np.int64]]

Load: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Loads a model by its checkpoint's name; it is on the device while in use."""


@dataclass(frozen=True)
class Phase:
    """Requests of one batch size to one of the checkpoints."""

    batch: int
    model: str


@dataclass(frozen=True)
class PhaseResult:
    """A phase's rates in tokens a second; `cost` is the share of plain decoding's that is lost, negative for a gain."""

    batch: int
    model: str
    plain: float
    chosen: float
    cost: float
    acceptance: list[float]
    mean_depth: float
    """Drafts of a request that a step verified."""

    @classmethod
    def of(cls, phase: Phase, base: Runner, chosen: Runner, counts: Statistics) -> PhaseResult:
        """The result of both sides' runs."""
        rates = base.tokens / base.seconds, chosen.tokens / chosen.seconds
        return cls(
            batch=phase.batch,
            model=phase.model,
            plain=rates[0],
            chosen=rates[1],
            cost=1 - rates[1] / rates[0],
            acceptance=counts.acceptance,
            mean_depth=counts.drafts / (chosen.steps * phase.batch),
        )

    HEADER = ("batch, model", "plain tok/s", "chosen tok/s", "cost", "acceptance", "drafts verified a step")

    def row(self) -> tuple[str, ...]:
        """The table's cells."""
        return (
            f"{self.batch}, {self.model}",
            f"{self.plain:.1f}",
            f"{self.chosen:.1f}",
            f"{self.cost:+.1%}",
            " ".join(f"{rate:.2f}" for rate in self.acceptance),
            f"{self.mean_depth:.2f}",
        )


@dataclass(frozen=True)
class MovingReport:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    """The first checkpoint."""

    new_tokens: int
    cores_taken: float | None
    phases: list[PhaseResult]
    cost: float
    """Of the whole run: the share of time lost against plain decoding."""

    def text(self) -> str:
        """The same for people."""
        busy = "" if self.cores_taken is None else f"; other processes kept {self.cores_taken:.1f} cores busy"
        return "\n".join(
            [
                *self.environment.lines(),
                f"{self.model}: {self.new_tokens} new tokens a request{busy}",
                "",
                format_table(PhaseResult.HEADER, [phase.row() for phase in self.phases]),
                f"\nwhole run: {self.cost:+.1%}",
            ]
        )


def moving_phases(batches: Sequence[int], first: str, other: str) -> list[Phase]:
    """Through `batches` with the first checkpoint, back through them with the other, then the first one again."""
    there = [Phase(batch, first) for batch in batches]
    return [*there, *(Phase(batch, other) for batch in reversed(batches)), there[0]]


class Runner:
    """One pipeline's side of a phase: its requests, its clock and its tokens."""

    def __init__(self, pipeline: Any, prompts: Prompts, new_tokens: int) -> None:
        self._batch = GenerateIterator.from_contexts(pipeline, [_request(prompt, new_tokens) for prompt in prompts])
        self.seconds, self.tokens, self.steps = 0.0, 0, 0

    def __enter__(self) -> Runner:
        self._batch.__enter__()
        self._batch.step()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._batch.__exit__(*exception)

    @property
    def done(self) -> bool:
        """Whether all requests have all their tokens."""
        return bool(self._batch.done)

    def turn(self) -> None:
        """Generates for `TURN_SECONDS`."""
        started = time.perf_counter()
        while not self.done and time.perf_counter() - started < TURN_SECONDS:
            self.tokens += sum(len(tokens) for tokens in self._batch.step().values())
            self.steps += 1
        self.seconds += time.perf_counter() - started


def run_phase(plain: Any, drafting: Any, prompts: Prompts, new_tokens: int) -> tuple[Runner, Runner, Statistics]:
    """Generates the same with both pipelines in turns."""
    with Runner(plain, prompts, new_tokens) as base, Runner(drafting, prompts, new_tokens) as chosen:
        drafting.statistics = counts = Statistics(len(drafting.statistics.verified))
        while not (base.done and chosen.done):
            # The one behind in its work goes on, so that both run over the same stretch of time.
            behind = min((r for r in (base, chosen) if not r.done), key=lambda r: r.tokens)
            behind.turn()
    return base, chosen, counts


def run_moving(
    pipelines: Mapping[str, tuple[Any, Any]],
    phases: Sequence[Phase],
    vocabulary: range,
    prompt_tokens: int,
    new_tokens: int,
) -> tuple[list[PhaseResult], float]:
    """Runs the phases one after the other; the policy goes on learning from phase to phase.

    Args:
        pipelines: By checkpoint, the plain pipeline and the one that drafts.
        phases: What to run.
        vocabulary: The tokens of prompts.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens that each request generates.

    Returns:
        Each phase's result, and the share of the whole time that was lost against plain decoding.
    """
    policy = pipelines[phases[0].model][1].policy
    sides = []
    for phase, prompts in tqdm(_with_prompts(phases, vocabulary, prompt_tokens), desc="phases", file=sys.stderr):
        plain, drafting = pipelines[phase.model]
        drafting.policy = policy
        sides.append(run_phase(plain, drafting, prompts, new_tokens))
    return _results(phases, sides)


def run_moving_apart(
    load_plain: Load,
    load_drafting: Load,
    phases: Sequence[Phase],
    depth: int,
    vocabulary: range,
    prompt_tokens: int,
    new_tokens: int,
    devices: str,
) -> tuple[list[PhaseResult], float]:
    """As `run_moving`, where one pipeline fits on the device at a time.

    Args:
        load_plain: Gives a checkpoint's plain pipeline.
        load_drafting: Gives the one that drafts.
        phases: See `run_moving`.
        depth: The most drafts of a cycle.
        vocabulary: See `run_moving`.
        prompt_tokens: See `run_moving`.
        new_tokens: See `run_moving`.
        devices: As MAX's `--devices`.

    Returns:
        As `run_moving`.
    """
    work = _with_prompts(phases, vocabulary, prompt_tokens)
    policy: Any = None
    chosen: list[tuple[Runner, Statistics]] = []
    for name, group in groupby(work, key=lambda one: one[0].model):
        with load_drafting(name) as model:
            pipeline: Any = model.pipeline
            policy = policy or pipeline.policy
            own = list(group)
            for batch in sorted({phase.batch for phase, _ in own}):
                for fixed in range(depth + 1):
                    pipeline.policy = FixedDepth([(1, batch, fixed)], depth)
                    _run_alone(pipeline, [own[0][1][0]] * batch, WARM_UP_TOKENS, devices)
            pipeline.policy = policy
            for _, prompts in tqdm(own, desc=f"{name}, drafting", file=sys.stderr):
                pipeline.statistics = counts = Statistics(len(pipeline.statistics.verified))
                chosen.append((_run_alone(pipeline, prompts, new_tokens, devices), counts))
    base: dict[int, Runner] = {}
    for name in dict.fromkeys(phase.model for phase in phases):
        with load_plain(name) as model:
            for index, (phase, prompts) in enumerate(work):
                if phase.model == name:
                    _run_alone(model.pipeline, prompts, WARM_UP_TOKENS, devices)
                    base[index] = _run_alone(model.pipeline, prompts, new_tokens, devices)
    return _results(phases, [(base[index], *drafted) for index, drafted in enumerate(chosen)])


def _run_alone(pipeline: Any, prompts: Prompts, new_tokens: int, devices: str) -> Runner:
    settle(devices)
    with Runner(pipeline, prompts, new_tokens) as runner:
        while not runner.done:
            runner.turn()
    return runner


def _with_prompts(phases: Sequence[Phase], vocabulary: range, prompt_tokens: int) -> list[tuple[Phase, Prompts]]:
    rng = np.random.default_rng(0)
    return [
        (phase, list(rng.integers(vocabulary.start, vocabulary.stop, (phase.batch, prompt_tokens)))) for phase in phases
    ]


def _results(
    phases: Sequence[Phase], sides: Sequence[tuple[Runner, Runner, Statistics]]
) -> tuple[list[PhaseResult], float]:
    results = [PhaseResult.of(phase, *side) for phase, side in zip(phases, sides, strict=True)]
    return results, sum(chosen.seconds for _, chosen, _ in sides) / sum(base.seconds for base, *_ in sides) - 1


def _request(prompt: npt.NDArray[np.int64], new_tokens: int) -> TextContext:
    return TextContext(
        request_id=RequestID(),
        max_length=len(prompt) + new_tokens,
        tokens=TokenBuffer(prompt.astype(np.int64)),
        eos_tracker=EOSTracker(eos_token_ids=set()),
        sampling_params=SamplingParams(temperature=0.0, top_k=1, ignore_eos=True),
    )
