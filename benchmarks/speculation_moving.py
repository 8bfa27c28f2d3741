"""A run whose batches and acceptance change while the policy chooses the depth, against plain decoding, phase by phase.

What `speculation.py --moving OTHER` runs. Batches grow, then another checkpoint of the same shape takes over, whose
drafts are right at another rate, then the batches shrink again, and the first checkpoint returns. One policy goes
through all phases. The plain pipeline and the one that drafts generate the same tokens from the same prompts and take
turns of half a second, so that whatever else the machine does in between falls on both alike; prompts are read before
the clocks start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from report import Environment, format_table
from tqdm import tqdm

from step3p5.speculation.statistics import Statistics

TURN_SECONDS = 0.5
"""How long a pipeline generates before it is the other's turn."""


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

    def __init__(self, pipeline: Any, prompts: Sequence[npt.NDArray[np.int64]], new_tokens: int) -> None:
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


def run_phase(
    plain: Any, drafting: Any, phase: Phase, prompts: Sequence[npt.NDArray[np.int64]], new_tokens: int
) -> tuple[PhaseResult, float, float]:
    """Generates the same with both pipelines in turns.

    Returns:
        The phase's result, and the seconds of the plain pipeline and the one that drafts.
    """
    with Runner(plain, prompts, new_tokens) as base, Runner(drafting, prompts, new_tokens) as chosen:
        drafting.statistics = counts = Statistics(len(drafting.statistics.verified))
        while not (base.done and chosen.done):
            # The one behind in its work goes on, so that both run over the same stretch of time.
            behind = min((r for r in (base, chosen) if not r.done), key=lambda r: r.tokens)
            behind.turn()
    rates = base.tokens / base.seconds, chosen.tokens / chosen.seconds
    return (
        PhaseResult(
            batch=phase.batch,
            model=phase.model,
            plain=rates[0],
            chosen=rates[1],
            cost=1 - rates[1] / rates[0],
            acceptance=counts.acceptance,
            mean_depth=counts.drafts / (chosen.steps * phase.batch),
        ),
        base.seconds,
        chosen.seconds,
    )


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
    rng = np.random.default_rng(0)
    results, times = [], []
    for phase in tqdm(phases, desc="phases", file=sys.stderr):
        prompts = rng.integers(vocabulary.start, vocabulary.stop, (phase.batch, prompt_tokens))
        plain, drafting = pipelines[phase.model]
        drafting.policy = policy
        result, *seconds = run_phase(plain, drafting, phase, list(prompts), new_tokens)
        results.append(result)
        times.append(seconds)
    base, chosen = (sum(column) for column in zip(*times, strict=True))
    return results, chosen / base - 1


def _request(prompt: npt.NDArray[np.int64], new_tokens: int) -> TextContext:
    return TextContext(
        request_id=RequestID(),
        max_length=len(prompt) + new_tokens,
        tokens=TokenBuffer(prompt.astype(np.int64)),
        eos_tracker=EOSTracker(eos_token_ids=set()),
        sampling_params=SamplingParams(temperature=0.0, top_k=1, ignore_eos=True),
    )
