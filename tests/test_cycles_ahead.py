"""Cycles that are launched ahead of their steps, under a scheduler that then wants another batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SEED
from harness import Prompt
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import InsufficientBlocksError
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.modeling.types import RequestID, TextGenerationInputs
from speculation_harness import generate, load, prompts_of, request

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint
from step3p5.speculation.policy import FixedDepth
from step3p5.speculation.steady_cycle import Outcome, SteadyCycle

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

from speculation_tokens import recorded_logits

DEPTH = 3


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoModel]:
    """Drafts that are right more often than not."""
    folder = tmp_path_factory.mktemp("predictable") / "tiny"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.FLOAT32, SEED, predictable=0.7)
    with load(folder, DEPTH) as model:
        yield model


class Scheduler:
    """Drives a pipeline as MAX's scheduler does.

    Args:
        pipeline: Its cycles are launched ahead while this is in use.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.manager = pipeline, pipeline.kv_manager
        self.requests: dict[RequestID, TextContext] = {}
        self.generated: dict[str, Prompt] = {}
        self.left = 0
        """Cycles launched ahead for requests some of which then were left out of a step."""
        self.joined = 0
        """Requests that joined others whose cycle was on its way."""

    def __enter__(self) -> Scheduler:
        self.pipeline.use_cycles(captures=False)
        self.pipeline.launches_ahead = True
        return self

    def __exit__(self, *_: object) -> None:
        for context in self.live:
            self.leave(context)
        self.pipeline.cycles, self.pipeline.launches_ahead = None, False

    def join(self, context: TextContext) -> None:
        self.manager.claim(context, replica_idx=0)
        self.requests[context.request_id] = context
        self.generated.setdefault(str(context.request_id), [])

    def leave(self, context: TextContext) -> None:
        self.manager.release(context)
        self.pipeline.release(context.request_id)
        del self.requests[context.request_id]

    def preempt(self, context: TextContext) -> None:
        self.leave(context)
        context.reset()
        self.join(context)

    @property
    def live(self) -> list[TextContext]:
        return list(self.requests.values())

    def runs(self, context: TextContext) -> bool:
        return context.request_id in self.requests

    @property
    def is_ahead(self) -> bool:
        run = self.pipeline._run
        return run is not None and run.launched is not None

    @property
    def running_ahead(self) -> set[RequestID]:
        """The requests whose cycle is on its way."""
        return {context.request_id for context in self.pipeline._run.contexts} if self.is_ahead else set()

    def step(self, batch: Sequence[TextContext]) -> None:
        for context in batch:
            self.manager.alloc(context).synchronize()
        before = self.running_ahead
        decodes = any(context.tokens.generated_length for context in batch)
        self.left += decodes and not before <= {context.request_id for context in batch}
        outputs = self.pipeline.execute(TextGenerationInputs(batches=[list(batch)]))
        self.joined += len(self.running_ahead - before) if self.running_ahead & before else 0
        if (run := self.pipeline._run) is not None:
            free = [place for place, member in enumerate(run.places) if member is None]
            assert not any(map(len, run.rows.of(free)))  # what nobody wants would be kept for good
        for context in self.live:
            if (output := outputs.get(context.request_id)) is not None:
                self.generated[str(context.request_id)] += [int(token) for token in output.tokens]
                if output.is_done:
                    self.leave(context)

    def run(self, contexts: Sequence[TextContext], first: TextContext) -> None:
        """Steps of all `contexts`, which join, until `first` is done."""
        for context in contexts:
            self.join(context)
        while self.runs(first):
            self.step(contexts)

    def finish(self) -> None:
        """Steps of all that still run."""
        while self.live:
            self.step(self.live)

    def of(self, context: TextContext) -> Prompt:
        """What a request has generated."""
        return self.generated[str(context.request_id)]


@pytest.mark.parametrize(("stays_on_device", "depth"), [(False, DEPTH), (True, DEPTH), (True, 0)])
def test_any_batches_give_the_same_tokens(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, stays_on_device: bool, depth: int
) -> None:
    """Requests join, are left out of steps, are preempted, need new pages of the cache; one is hung up.

    Prompts are read alone, as MAX's scheduler has it, or beside the others.
    """
    pipeline: Any = drafting.pipeline
    monkeypatch.setattr(pipeline, "policy", FixedDepth([(1, 8, depth)], DEPTH))
    monkeypatch.setattr(pipeline._pipeline_model, "stays_on_device", stays_on_device)
    prompts, lengths = prompts_of(rng, 5, 60, 120, 30, 9, 250, 7, 40), (90, 130, 40, 150, 130, 25, 60, 80)
    want = generate(drafting, [request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)])
    contexts = [request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    waiting, hung_up, steps_ahead = contexts[5:], contexts[4], 0
    with Scheduler(pipeline) as scheduler:
        for context in contexts[:5]:
            scheduler.join(context)
        while scheduler.live or waiting:
            if waiting and rng.random() < 0.1:
                scheduler.join(waiting.pop())
            if scheduler.live and rng.random() < 0.04:
                scheduler.preempt(scheduler.live[int(rng.integers(len(scheduler.live)))])
            if scheduler.runs(hung_up) and len(scheduler.of(hung_up)) > 40:
                scheduler.leave(hung_up)
            prompts_alone = [context for context in scheduler.live if not context.tokens.generated_length]
            batch = [context for context in scheduler.live if rng.random() < 0.96]
            if prompts_alone and rng.random() < 0.5:
                batch = prompts_alone
            if batch:
                scheduler.step(batch)
                steps_ahead += scheduler.is_ahead
        assert scheduler.left > 0
        assert scheduler.joined > 0
        assert steps_ahead > 2 * scheduler.left
        for context, tokens in zip(contexts, want, strict=True):
            found = scheduler.of(context)
            assert found == tokens if context is not hung_up else found == tokens[: len(found)]


def test_a_request_can_end_in_a_cycle_that_was_launched_for_another_batch(
    drafting: AutoModel, rng: np.random.Generator
) -> None:
    """Its end is told in the step of the others, and it is not computed again."""
    prompts, ended_ahead = prompts_of(rng, 20, 33), 0
    for new_tokens in range(9, 9 + 6 * (DEPTH + 1)):
        want = generate(drafting, [request(prompts[0], new_tokens), request(prompts[1], 80)])
        short, long = request(prompts[0], new_tokens), request(prompts[1], 80)
        with Scheduler(drafting.pipeline) as scheduler:
            for context in (short, long):
                scheduler.join(context)
            while scheduler.runs(short):
                near_end = new_tokens - len(scheduler.of(short)) <= DEPTH + 1
                leaves_out = scheduler.is_ahead and near_end and len(scheduler.running_ahead) == 2
                scheduler.step([long] if leaves_out else [short, long])
                ended_ahead += leaves_out and not scheduler.runs(short)
            while scheduler.live:
                scheduler.step([long])
            assert (scheduler.of(short), scheduler.of(long)) == (want[0], want[1])
    assert ended_ahead


def test_the_next_cycle_is_launched_before_the_tokens_are_taken_note_of(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, which the scheduler made room for."""
    prompts, pipeline = prompts_of(rng, 20, 33, 140), drafting.pipeline
    want = generate(drafting, [request(prompt, 60) for prompt in prompts])
    contexts, events = [request(prompt, 60) for prompt in prompts], list[str]()
    launch, commit = SteadyCycle.launch, type(pipeline)._commit_cycle

    def keep_launch(*arguments: Any) -> Any:
        events.append("launch")
        return launch(*arguments)

    def keep_commit(*arguments: Any) -> Any:
        events.append("commit")
        return commit(*arguments)

    monkeypatch.setattr(SteadyCycle, "launch", keep_launch)
    monkeypatch.setattr(type(pipeline), "_commit_cycle", keep_commit)
    with Scheduler(pipeline) as scheduler:
        for context in contexts:
            scheduler.join(context)
        while len(scheduler.live) == len(contexts):
            scheduler.step(contexts)
        while scheduler.live:
            scheduler.step(scheduler.live)
        assert [scheduler.of(context) for context in contexts] == want
    assert events[:9] == ["launch", "commit", "launch", *3 * ["launch", "commit"]]


def one_that_ends(drafting: AutoModel, rng: np.random.Generator) -> tuple[list[TextContext], list[Prompt]]:
    """Two requests, the first of which ends before its longest length; and what they generate."""
    prompts = prompts_of(rng, 20, 33)
    ending, whole = generate(drafting, [request(prompt, 80) for prompt in prompts])
    place = next(place for place in range(40, 80) if ending[place] not in ending[:place])
    contexts = [request(prompts[0], 80, eos=[ending[place]]), request(prompts[1], 80)]
    return contexts, [ending[: place + 1], whole]


def test_the_cycle_behind_a_text_that_ends_is_one_of_the_others(drafting: AutoModel, rng: np.random.Generator) -> None:
    contexts, want = one_that_ends(drafting, rng)
    with Scheduler(drafting.pipeline) as scheduler:
        scheduler.run(contexts, contexts[0])
        assert scheduler.running_ahead == {contexts[1].request_id}
        scheduler.finish()
        assert [scheduler.of(context) for context in contexts] == want


def test_without_drafts_a_cycle_is_launched_before_the_one_before_has_ended(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text may end in the one before: then the next one is for the others."""
    pipeline: Any = drafting.pipeline
    monkeypatch.setattr(pipeline, "policy", FixedDepth([(1, 8, 0)], DEPTH))
    contexts, want = one_that_ends(drafting, rng)
    in_flight = list[bool]()
    wait = Outcome.wait

    def keep_wait(outcome: Outcome) -> None:
        in_flight.append(len(launches) > len(in_flight) + 1)
        wait(outcome)

    launches: list[None] = []
    launch = SteadyCycle.launch

    def keep_launch(*arguments: Any) -> Any:
        launches.append(None)
        return launch(*arguments)

    monkeypatch.setattr(Outcome, "wait", keep_wait)
    monkeypatch.setattr(SteadyCycle, "launch", keep_launch)
    with Scheduler(pipeline) as scheduler:
        scheduler.run(contexts, contexts[0])
        assert scheduler.is_ahead
        assert in_flight[1:] == [True] * (len(in_flight) - 1)
        scheduler.finish()
        assert [scheduler.of(context) for context in contexts] == want


@pytest.mark.parametrize("depth", [0, DEPTH])
def test_the_benchmark_sees_the_logits_of_every_token(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    """Those of tokens whose cycle was launched before the ones in front of them were known, too."""
    pipeline: Any = drafting.pipeline
    monkeypatch.setattr(pipeline, "policy", FixedDepth([(1, 8, depth)], DEPTH))
    monkeypatch.setattr(pipeline._pipeline_model, "stays_on_device", True)
    contexts = [
        request(prompt, length) for prompt, length in zip(prompts_of(rng, 20, 33, 7), (40, 60, 80), strict=True)
    ]
    with Scheduler(pipeline) as scheduler, recorded_logits(pipeline) as seen:
        for context in contexts:
            scheduler.join(context)
        scheduler.finish()
    for number, context in enumerate(contexts):
        for at, token in enumerate(scheduler.of(context)):
            assert seen[number, at].tokens[0] == token


def test_without_room_in_the_cache_nothing_is_launched_ahead(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(rng, 20)
    want = generate(drafting, [request(prompt, 30)])
    context, pipeline = request(prompt, 30), drafting.pipeline
    with Scheduler(pipeline) as scheduler:
        scheduler.join(context)
        alloc = scheduler.manager.alloc
        while scheduler.runs(context):
            alloc(context).synchronize()
            with monkeypatch.context() as patch:
                patch.setattr(scheduler.manager, "alloc", full)
                outputs = pipeline.execute(TextGenerationInputs(batches=[[context]]))
            assert not scheduler.is_ahead
            output = outputs[context.request_id]
            scheduler.of(context).extend(int(token) for token in output.tokens)
            if output.is_done:
                scheduler.leave(context)
        assert [scheduler.of(context)] == want


def full(*_: object) -> None:
    raise InsufficientBlocksError("none is free")
