"""Cycles without the host between verifying and drafting, on a CPU, where they are executed instead of captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SEED
from harness import FIRST_TEXT_TOKEN, Prompt
from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.generate import GenerateIterator
from speculation_harness import GREEDY, generate, load, prompts_of, request

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint
from step3p5.speculation.captured import CapturedGraph
from step3p5.speculation.padding import padded_size
from step3p5.speculation.policy import DraftPlan, FixedDepth, Unread
from step3p5.speculation.steady_cycle import Sampler, Start, SteadyCycle, SteadyCycles

DEPTH = 3

Verified = dict[tuple[str, int], list[int]]
"""The drafts that were verified of a request at a position."""

Cycles = list[tuple[int, int]]
"""Batch size and depth of every cycle."""


@pytest.fixture(scope="module")
def predictable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` checkpoint whose drafts are right more often than not."""
    folder = tmp_path_factory.mktemp("predictable") / "tiny"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.FLOAT32, SEED, predictable=0.7)
    return folder


@pytest.fixture(scope="module")
def drafting(predictable: Path) -> Iterator[AutoModel]:
    """`predictable` with all its depths; no prefix cache, with which the drafts of a second run may be others."""
    with load(predictable, DEPTH, enable_prefix_caching=False) as model:
        yield model


@pytest.fixture(params=[False, True], ids=["as on a CPU", "as on a GPU"])
def handed_on(drafting: AutoModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """How drafts and kept rows go from a step to the next where there is no cycle, and when cycles are launched."""
    monkeypatch.setattr(drafting.pipeline._pipeline_model, "stays_on_device", request.param)
    if request.param:
        launch_ahead(drafting.pipeline, monkeypatch)


def launch_ahead(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets cycles be launched ahead of their steps."""
    use_cycles = pipeline.use_cycles

    def use(*, captures: bool) -> None:
        use_cycles(captures=captures)
        pipeline.launches_ahead = True

    monkeypatch.setattr(pipeline, "use_cycles", use)


@contextmanager
def recorded(pipeline: Any, contexts: Sequence[TextContext], *, cycles: bool) -> Iterator[tuple[Verified, Cycles]]:
    """Keeps all drafts that are verified, and what cycles there were."""
    verified: Verified = {}
    sizes: Cycles = []
    names = {context.request_id: f"request {index}" for index, context in enumerate(contexts)}
    commit, launch = pipeline._commit, SteadyCycle.launch

    def keep_commit(batch: Sequence[TextContext], drafts: Sequence[Sequence[int]], drawn: list[int]) -> list[int]:
        for context, own in zip(batch, drafts, strict=True):
            verified[names[context.request_id], len(context.tokens)] = list(own[:])
        return list(commit(batch, drafts, drawn))

    def keep_launch(cycle: SteadyCycle, caches: Any, sample: Sampler | None) -> Any:
        sizes.append((cycle.batch_size, cycle.depth))
        tokens = cycle._verified.to_numpy().reshape(cycle.batch_size, -1)
        for (cache,) in caches.values():
            # The depths take the target's own number of rows.
            assert cache.max_prompt_length.to_numpy().item() == cycle.depth + 1
        lengths = next(iter(caches.values()))[0].cache_lengths.to_numpy()
        for place, member in pipeline._run:
            # A request may have tokens by now that its context has yet to learn of.
            context, own, length = member.context, tokens[place].tolist(), int(lengths[place])
            if length < len(context.tokens):
                assert own[0] == context.tokens.active[0]
            verified[names[context.request_id], length + 1] = own[1:]
        return launch(cycle, caches, sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_commit", keep_commit)
        patch.setattr(SteadyCycle, "launch", keep_launch)
        pipeline.cycles = None
        if cycles:
            pipeline.use_cycles(captures=False)
        yield verified, sizes


def assert_same_drafts(found: Verified, want: Verified) -> None:
    """Near its longest length a request without cycles has fewer drafts."""
    assert found.keys() == want.keys()
    others = [place for place, drafts in want.items() if found[place][: len(drafts)] != drafts]
    assert not others


def test_a_cycle_begins_with_what_it_is_given(drafting: AutoModel, rng: np.random.Generator) -> None:
    """At some places, the others stay as they are. Copies go on after the call that starts them: what they read must
    live as long."""
    pipeline = drafting.pipeline
    pipeline.use_cycles(captures=False)
    graphs, batch = pipeline.cycles.graphs, 6
    pipeline.cycles = None
    cycle = SteadyCycle(graphs, batch, DEPTH)
    tokens = np.zeros((batch, graphs.keep + 1 + DEPTH), dtype=np.int64)
    kept = np.zeros((batch, graphs.keep, graphs.hidden_size), dtype=np.float32)
    for _ in range(200):
        places = np.flatnonzero(rng.random(batch) < 0.6).tolist() or [0]
        tokens[places] = rng.integers(FIRST_TEXT_TOKEN, 500, size=(len(places), tokens.shape[1]))
        kept[places] = rng.standard_normal((len(places), *kept.shape[1:]), dtype=np.float32)
        cycle.begin(
            {
                at: Start(
                    tokens[at, : graphs.keep + 1].copy(), tokens[at, graphs.keep + 1 :].tolist(), pieces(kept[at])
                )
                for at in places
            }
        )
        np.full((64, graphs.hidden_size), np.nan, dtype=np.float32)  # takes memory that is free
        np.testing.assert_array_equal(cycle._verified.to_numpy().reshape(batch, -1), tokens[:, graphs.keep :])
        np.testing.assert_array_equal(cycle._window.to_numpy(), tokens[:, : graphs.keep + 1])
        np.testing.assert_array_equal(cycle._kept.to_numpy(), kept)


def pieces(rows: np.ndarray) -> list[np.ndarray]:
    """A copy of `rows`, cut in two."""
    return [rows[:1].copy(), rows[1:].copy()]


def cycles_that_change_nothing(drafting: AutoModel, requests: Callable[[], list[TextContext]]) -> Cycles:
    """The cycles of a run, after holding its tokens and drafts to those of a run without any."""
    contexts = requests()
    with recorded(drafting.pipeline, contexts, cycles=False) as (want_drafts, _):
        want = generate(drafting, contexts)
    contexts = requests()
    with recorded(drafting.pipeline, contexts, cycles=True) as (drafts, cycles):
        assert generate(drafting, contexts) == want
    assert_same_drafts(drafts, want_drafts)
    return cycles


def test_heads_are_brought_up_to_date_between_verification_and_drafts(
    drafting: AutoModel, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, order = drafting.pipeline, []
    execute = CapturedGraph.execute

    def note(graph: CapturedGraph, *inputs: Any) -> Any:
        order.append(graph._name)
        return execute(graph, *inputs)

    context = request(prompts_of(rng, 9)[0], 20)
    with recorded(pipeline, [context], cycles=True) as (_, cycles):
        graphs = dataclasses.replace(pipeline.cycles.graphs, refresh_heads=lambda: order.append("heads"))
        pipeline.cycles = SteadyCycles(graphs)
        monkeypatch.setattr(CapturedGraph, "execute", note)
        generate(drafting, [context])
    depths = [f"MTP depth {depth}" for depth in range(DEPTH)]
    assert order == len(cycles) * ["verification", "greedy draws", "acceptance", "heads", *depths, "the next tokens"]
    assert len(cycles) > 3


@pytest.mark.usefixtures("late_inputs")
def test_a_cycle_waits_for_its_inputs(drafting: AutoModel, rng: np.random.Generator) -> None:
    prompts = prompts_of(rng, 5, 60, 30)

    def requests() -> list[TextContext]:
        return [request(prompt, length) for prompt, length in zip(prompts, (8, 16, 24), strict=True)]

    assert cycles_that_change_nothing(drafting, requests)


@pytest.mark.usefixtures("handed_on")
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_cycles_draft_and_draw_the_same(drafting: AutoModel, rng: np.random.Generator, batch_size: int) -> None:
    """Requests end at different times, so that cycles of one size follow those of another."""
    prompts = prompts_of(rng, *rng.integers(1, 300, size=batch_size))
    lengths = rng.integers(40, 80, size=batch_size).tolist()

    def requests() -> list[TextContext]:
        return [request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]

    cycles = cycles_that_change_nothing(drafting, requests)
    sizes = [size for size, _ in cycles]
    assert max(sizes) == batch_size
    assert set(sizes) <= {padded_size(size, batch_size) for size in range(1, batch_size + 1)}
    assert len(sizes) > 5


class Changing(FixedDepth):
    """Some steps at each depth, in an order of chance, now and then for one request alone."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__([(1, 8, DEPTH)], DEPTH)
        self.rng = rng
        self.depths: list[int] = []

    def plan(self, batch: int, pure: bool, unread: Unread | None = None) -> DraftPlan:
        if not self.depths:
            self.depths = [
                int(depth) for depth in self.rng.permutation(DEPTH + 1) for _ in range(self.rng.integers(3, 8))
            ]
        return DraftPlan(self.depths.pop(), 1 if self.rng.random() < 0.05 else batch)


@pytest.mark.usefixtures("handed_on")
def test_drafts_are_the_same_whichever_depths_came_before(drafting: AutoModel, rng: np.random.Generator) -> None:
    """Depths that rest find the hidden states that they have missed, with and without cycles."""
    prompts, pipeline = prompts_of(rng, 5, 130, 40), drafting.pipeline

    def requests() -> list[TextContext]:
        return [request(prompt, 150) for prompt in prompts]

    contexts = requests()
    with recorded(pipeline, contexts, cycles=False) as (want_drafts, _):
        want = generate(drafting, contexts)
    contexts = requests()
    always, pipeline.policy = pipeline.policy, Changing(rng)
    try:
        with recorded(pipeline, contexts, cycles=True) as (drafts, cycles):
            assert generate(drafting, contexts) == want
    finally:
        pipeline.policy = always
    common = {place: (drafts[place], want_drafts[place]) for place in drafts.keys() & want_drafts.keys()}
    pairs = {
        place: (found, whole[: len(found)]) for place, (found, whole) in common.items() if len(found) <= len(whole)
    }
    assert {at: pair for at, pair in pairs.items() if pair[0] != pair[1]} == {}
    assert {len(found) for found, _ in pairs.values()} == set(range(DEPTH + 1))
    assert len(cycles) > 15
    assert {depth for _, depth in cycles} == set(range(DEPTH + 1))


def test_plain_decoding_goes_through_cycles_too(drafting: AutoModel, rng: np.random.Generator) -> None:
    prompts, pipeline = prompts_of(rng, 9, 70), drafting.pipeline
    want = generate(drafting, [request(prompt, 40) for prompt in prompts])
    contexts = [request(prompt, 40) for prompt in prompts]
    always, pipeline.policy = pipeline.policy, FixedDepth([(1, 8, 0)], DEPTH)
    try:
        with recorded(pipeline, contexts, cycles=True) as (drafts, cycles):
            assert generate(drafting, contexts) == want
    finally:
        pipeline.policy = always
    assert not any(drafts.values())
    assert cycles.count((2, 0)) > 35


@pytest.mark.usefixtures("handed_on")
def test_the_others_go_on_without_a_request_that_is_hung_up(drafting: AutoModel, rng: np.random.Generator) -> None:
    prompts, pipeline = prompts_of(rng, 60, 9, 33), drafting.pipeline
    want = generate(drafting, [request(prompt, 40) for prompt in prompts])
    contexts = [request(prompt, 40) for prompt in prompts]
    generated: list[Prompt] = [[] for _ in contexts]
    with (
        recorded(pipeline, contexts, cycles=True) as (_, sizes),
        GenerateIterator.from_contexts(pipeline, contexts) as batch,
    ):
        while not batch.done:
            for row, tokens in batch.step().items():
                generated[row] += tokens
            if len(sizes) == 3:
                batch.remove(1)
    assert generated[0] == want[0]
    assert generated[2] == want[2]
    assert len(generated[1]) < 40


def test_sampled_requests_draw_the_same_beside_greedy_ones(drafting: AutoModel, rng: np.random.Generator) -> None:
    """Five are filled up to six: what MAX's sampler does with a row depends on the parameters of all."""
    prompts = prompts_of(rng, 20, 30, 7, 64, 120)
    sampled = [
        SamplingParams(temperature=2.0, top_k=100, top_p=0.95, seed=SEED, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=20, min_p=0.1, seed=SEED + 1, ignore_eos=True),
    ]

    def requests() -> list[TextContext]:
        parameters = [GREEDY, *sampled, GREEDY, sampled[0]]
        return [request(prompt, 40, own) for prompt, own in zip(prompts, parameters, strict=True)]

    assert cycles_that_change_nothing(drafting, requests).count((6, DEPTH)) > 5


def test_penalties_go_without_cycles(drafting: AutoModel, rng: np.random.Generator) -> None:
    """They depend on the drafts' words, which the host does not know in time."""
    penalties = SamplingParams(temperature=0.8, repetition_penalty=1.3, seed=SEED, ignore_eos=True)
    prompts = prompts_of(rng, 20, 30)
    contexts = [request(prompts[0], 30, GREEDY), request(prompts[1], 30, penalties)]
    with recorded(drafting.pipeline, contexts, cycles=True) as (_, cycles):
        generate(drafting, contexts)
    assert 2 not in {size for size, _ in cycles}


def test_batches_are_filled_up_to_few_sizes() -> None:
    sizes = [padded_size(batch, 64) for batch in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(batch <= size <= 1.5 * batch for batch, size in enumerate(sizes, start=1))
    assert padded_size(50, 60) == 60
