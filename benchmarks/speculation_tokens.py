"""Whether the pipeline that drafts generates the plain one's tokens: what `speculation.py --compare` runs.

Greedy decoding takes the largest logit. Where the two pipelines part, the target's own logits judge, those from which
the verification drew the token: the other pipeline's token must be the second best, within one step of the type in
which the head computes. A forward pass over four tokens sums in another order than one over a single token, so that two
logits as close as that may swap places. Behind the first difference the texts are different and are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from report import Environment, format_table
from speculation_run import Settings, greedy_requests, random_prompts

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import ModelConfig
from step3p5.speculation.policy import FixedDepth
from step3p5.speculation.steady_cycle import Outcome, SteadyCycle
from step3p5.speculation.steady_run import SteadyRun

_FRACTION_BITS = {CheckpointDtype.BFLOAT16: 7, CheckpointDtype.FLOAT32: 23}


@dataclass(frozen=True)
class TopTwo:
    """The two largest logits of one position, in descending order."""

    tokens: tuple[int, int]
    logits: tuple[float, float]

    def steps_apart(self, dtype: CheckpointDtype) -> float:
        """Their distance in steps of `dtype` at the largest."""
        step = 2.0 ** (math.floor(math.log2(abs(self.logits[0]) or 1.0)) - _FRACTION_BITS[dtype])
        return (self.logits[0] - self.logits[1]) / step


@dataclass(frozen=True)
class Parting:
    """The first token of a request in which the pipelines differ, and the logits of the verification there."""

    position: int
    plain: int
    drafting: int
    seen: TopTwo

    def explained(self, dtype: CheckpointDtype) -> bool:
        """Whether the two tokens are the two best and lie within one step of `dtype`."""
        return {self.plain, self.drafting} == set(self.seen.tokens) and self.seen.steps_apart(dtype) <= 1.0


@dataclass(frozen=True)
class Comparison:
    """One batch size's prompts; `tokens` were the same, `near_ties` of the requests part within one step."""

    batch: int
    prompts: int
    tokens: int
    near_ties: int
    unexplained: list[Parting]
    steps_apart: list[float]
    """Of every parting, near tie or not."""

    HEADER = ("batch", "prompts", "tokens equal", "part at a near tie", "part otherwise", "steps apart at most")

    def row(self) -> tuple[str, ...]:
        """The table's cells."""
        counts = (self.batch, self.prompts, self.tokens, self.near_ties, len(self.unexplained))
        return (*map(str, counts), f"{max(self.steps_apart, default=0.0):.1f}")


@dataclass(frozen=True)
class ComparisonReport:
    """All that a run found; what `--json` writes."""

    benchmark: str
    environment: Environment
    model: str
    devices: str
    depth: int
    dtype: CheckpointDtype
    comparisons: list[Comparison]

    def text(self) -> str:
        """The same for people."""
        return "\n".join(
            [
                *self.environment.lines(),
                f"{self.model} on {self.devices}: greedy, {self.depth} drafts a cycle, against plain decoding",
                "",
                format_table(Comparison.HEADER, [comparison.row() for comparison in self.comparisons]),
                *(
                    f"batch {comparison.batch}, token {parting.position}: plain {parting.plain}, drafting "
                    f"{parting.drafting}; verified with {parting.seen}"
                    for comparison in self.comparisons
                    for parting in comparison.unexplained
                ),
            ]
        )


def compare_pipelines(
    model: str,
    settings: Settings,
    config: ModelConfig,
    dtype: CheckpointDtype,
    depth: int,
    num_prompts: int,
    batches: Sequence[int],
    new_tokens: int,
) -> list[Comparison]:
    """Generates from the same prompts in batches of each size, with the pipeline that drafts and then without."""
    prompts = random_prompts(0, config.vocab_size, num_prompts)
    drafted, seen = {}, {}
    with settings.load_drafting(model, depth) as drafting:
        for batch in batches:
            drafting.pipeline.policy = FixedDepth([(1, batch, depth)], depth)
            with recorded_logits(drafting.pipeline) as seen[batch]:
                drafted[batch] = generate(drafting.pipeline, prompts, batch, new_tokens)
    with settings.load_plain(model) as plain:
        return [
            compare(generate(plain.pipeline, prompts, batch, new_tokens), drafted[batch], seen[batch], batch, dtype)
            for batch in batches
        ]


def generate(pipeline: Any, prompts: Sequence[list[int]], batch: int, new_tokens: int) -> list[list[int]]:
    """The new tokens of each prompt."""
    texts: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        contexts = greedy_requests(prompts[start : start + batch], new_tokens)
        with GenerateIterator.from_contexts(pipeline, contexts) as running:
            own: list[list[int]] = [[] for _ in contexts]
            while not running.done:
                for row, tokens in running.step().items():
                    own[row] += tokens
        texts += own
    return texts


@contextmanager
def recorded_logits(pipeline: Any) -> Iterator[dict[tuple[int, int], TopTwo]]:
    """The two best logits that the target verified with, by request in the order of their first step, and new token.

    A token that is verified again, since an earlier token of its step was rejected, has its last logits. Tokens without
    words, which are not drawn, do not count.
    """
    model, known = pipeline._pipeline_model, pipeline.vocab_size
    seen: dict[tuple[int, int], TopTwo] = {}
    numbers: dict[RequestID, int] = {}

    def keep(contexts: Sequence[Any], num_drafts: Sequence[int], logits: Any) -> None:
        rows = np.array(logits)
        start = 0
        for context, drafts in zip(contexts, num_drafts, strict=True):
            number = numbers.setdefault(context.request_id, len(numbers))
            for ahead in range(drafts + 1):
                seen[number, context.tokens.generated_length + ahead] = top_two(rows[start + ahead, :known])
            start += drafts + 1

    def in_step(original: Callable[..., Any]) -> Callable[..., Any]:
        def verify(contexts: Any, drafts: Any, *rest: Any) -> Any:
            results = original(contexts, drafts, *rest)
            keep(contexts, [len(own) for own in drafts], results[0].to_numpy())
            return results

        return verify

    def in_graph(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            results = original(*inputs)
            last[:] = results[:1]  # one may call the other
            return results

        return run

    def in_launch(original: Callable[..., Outcome]) -> Callable[..., Outcome]:
        def launch(cycle: SteadyCycle, *rest: Any) -> Outcome:
            outcome = original(cycle, *rest)
            logits = np.array(last.pop().to_numpy())
            of_cycles[id(outcome)] = outcome, logits.reshape(cycle.batch_size, cycle.depth + 1, -1)
            return outcome

        return launch

    def in_commit(original: Callable[..., Any]) -> Callable[..., Any]:
        def commit(run: SteadyRun, outcome: Outcome) -> Any:
            _, logits = of_cycles.pop(id(outcome))
            for place, member in run:
                keep([member.context], [run.cycle.depth], logits[place])
            return original(run, outcome)

        return commit

    # A cycle may be launched before the tokens of the one before are known: its logits wait until it is their turn.
    last: list[Any] = []
    of_cycles: dict[int, tuple[Outcome, npt.NDArray[np.float32]]] = {}
    with ExitStack() as patches:
        patches.enter_context(patch.object(model, "verify", in_step(model.verify)))
        if pipeline.cycles is not None:
            graph = pipeline.cycles.graphs.verify
            for name in ("run", "execute"):
                patches.enter_context(patch.object(graph, name, in_graph(getattr(graph, name))))
            patches.enter_context(patch.object(SteadyCycle, "launch", in_launch(SteadyCycle.launch)))
            patches.enter_context(patch.object(pipeline, "_commit_cycle", in_commit(pipeline._commit_cycle)))
        yield seen


def top_two(logits: npt.NDArray[np.float32]) -> TopTwo:
    """The two largest of `[vocab_size]`, which are overwritten."""
    first = int(logits.argmax())
    best, logits[first] = float(logits[first]), -np.inf
    second = int(logits.argmax())
    return TopTwo((first, second), (best, float(logits[second])))


def compare(
    plain: Sequence[Sequence[int]],
    drafting: Sequence[Sequence[int]],
    seen: dict[tuple[int, int], TopTwo],
    batch: int,
    dtype: CheckpointDtype,
) -> Comparison:
    """Holds the new tokens of both pipelines to each other."""
    partings, equal = [], 0
    for number, (expected, found) in enumerate(zip(plain, drafting, strict=True)):
        assert len(expected) == len(found)
        at = next((i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1]), len(found))
        equal += at
        if at < len(found):
            partings.append(Parting(at, expected[at], found[at], seen[number, at]))
    unexplained = [parting for parting in partings if not parting.explained(dtype)]
    return Comparison(
        batch=batch,
        prompts=len(plain),
        tokens=equal,
        near_ties=len(partings) - len(unexplained),
        unexplained=unexplained,
        steps_apart=[parting.seen.steps_apart(dtype) for parting in partings],
    )
