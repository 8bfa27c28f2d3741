"""The plain pipeline and the one that drafts: how both are loaded, and a timed generation with either."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from device import max_settings, settle
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID

from step3p5.random_checkpoint.predictable import RING_TOKENS
from step3p5.speculation.policy import AdaptiveDepth, FixedDepth
from step3p5.speculation.statistics import Statistics

PROMPT_TOKENS = 64
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
class Settings:
    """How the pipelines are loaded.

    `artifacts` and `mtp_artifacts` are folders compiled ahead, for the plain pipeline and for the one that drafts.
    """

    devices: str
    max_batch_size: int
    max_length: int
    artifacts: str | None = None
    mtp_artifacts: str | None = None

    @property
    def fit_together(self) -> bool:
        """Whether both pipelines of a checkpoint are loaded at a time; a GPU may have no room for its weights twice."""
        return self.devices == "cpu"

    def load_plain(self, model: str) -> AutoModel:
        """The pipeline without speculation, at its best: on a GPU with overlapping steps and captured graphs."""
        return self._load(model, **max_settings(self.devices, self.artifacts))

    def load_drafting(self, model: str, depth: int) -> AutoModel:
        """The pipeline that drafts up to `depth` tokens."""
        artifacts = {"precompiled_mefs": self.mtp_artifacts} if self.mtp_artifacts else {}
        return self._load(model, speculative_method="mtp", num_speculative_tokens=depth, **artifacts)

    def _load(self, model: str, **own: Any) -> AutoModel:
        return AutoModel(
            model,
            devices=self.devices,
            custom_architectures=["pipelines_registry"],
            max_batch_size=self.max_batch_size,
            max_length=self.max_length,
            **own,
        )


def random_prompts(seed: int, vocab_size: int, count: int) -> list[list[int]]:
    """`count` prompts of tokens that a predictable checkpoint goes through."""
    rng = np.random.default_rng(seed)
    return rng.integers(FIRST_TEXT_TOKEN, min(RING_TOKENS, vocab_size - 64), (count, PROMPT_TOKENS)).tolist()


def greedy_requests(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[TextContext]:
    """Requests for exactly `new_tokens` tokens each."""
    return [
        TextContext(
            request_id=RequestID(),
            max_length=len(prompt) + new_tokens,
            tokens=TokenBuffer(np.asarray(prompt, dtype=np.int64)),
            eos_tracker=EOSTracker(eos_token_ids=set()),
            sampling_params=SamplingParams(temperature=0.0, top_k=1, ignore_eos=True),
        )
        for prompt in prompts
    ]


def run_case(
    pipeline: Any,
    policy: FixedDepth | AdaptiveDepth | None,
    case: Case,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    devices: str,
) -> None:
    """Generates once and keeps the rate; without a policy the pipeline is the plain one.

    The rate is that of the whole batch: from behind the prompts to where the first request has all its tokens.
    """
    counts: Statistics | None = None
    totals: Counter[int] = Counter()

    def step(batch: GenerateIterator) -> int:
        tokens = {row: len(own) for row, own in batch.step().items()}
        totals.update(tokens)
        return sum(tokens.values())

    settle(devices)
    with GenerateIterator.from_contexts(pipeline, greedy_requests(prompts, new_tokens)) as batch:
        if policy is not None:
            pipeline.policy = policy
        # Where steps overlap, a step returns the tokens of the one before.
        while not step(batch):
            pass
        if policy is not None:
            pipeline.statistics = counts = Statistics(len(pipeline.statistics.verified))
        started, generated = time.perf_counter(), 0
        while max(totals.values()) < new_tokens:
            generated += step(batch)
        seconds = time.perf_counter() - started
        if policy is not None:
            pipeline.statistics = Statistics(len(pipeline.statistics.verified))  # the rest does not count
        while not batch.done:
            batch.step()
    case.keep(generated / seconds, counts)
