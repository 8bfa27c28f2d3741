"""Which drafts count: acceptance, and that what is emitted has the target's distribution."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef
from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.sampling import SamplingConfig, TopKSampler
from max.pipelines.sampling.sampling_logits_processor import PenaltyInputs, SamplerInputs
from speculation_harness import request

from step3p5.mtp import UNKNOWN_TOKEN
from step3p5.speculation.acceptance import commit, contexts_ahead, num_accepted
from step3p5.speculation.rows import Advance, draft_rows
from step3p5.speculation.statistics import Statistics, step_metrics

TOKENS = st.lists(st.integers(0, 3), max_size=5)


@given(TOKENS, st.integers(0, 3))
def test_drafts_count_up_to_the_first_that_was_not_drawn(drafts: list[int], bonus: int) -> None:
    assert num_accepted(drafts, [*drafts, bonus]) == len(drafts)
    for wrong in range(len(drafts)):
        drawn = [*drafts, bonus]
        drawn[wrong] += 1
        assert num_accepted(drafts, drawn) == wrong


def test_the_sampler_sees_each_position_as_if_the_drafts_were_the_requests_own() -> None:
    sampling = SamplingParams(temperature=0.7, seed=5, min_new_tokens=4, frequency_penalty=0.5, repetition_penalty=1.1)
    drafts = [7, 9, 7]
    context, alone = (request([3, 7, 5], 20, sampling, eos=[2]) for _ in range(2))
    ahead = contexts_ahead(context, drafts)
    for view, draft in zip(ahead, [*drafts, 0], strict=True):
        for ours, its in zip(sampler_inputs(view), sampler_inputs(alone), strict=True):
            np.testing.assert_array_equal(ours, its)
        alone.update(draft)
    assert context.tokens.all.tolist() == [3, 7, 5]


def sampler_inputs(context: TextContext) -> list[np.ndarray]:
    buffers = SamplerInputs.create([context], CPU()).as_list() + PenaltyInputs.create([context], CPU()).as_list()
    return [buffer.to_numpy() for buffer in buffers] + context.get_min_token_logit_mask(1)


def test_committing_stops_where_the_request_ends() -> None:
    context = request([3, 4], 10, eos=[8])
    assert commit(context, [5, 8, 6]) == 2
    assert context.is_done
    assert context.tokens.all.tolist() == [3, 4, 5, 8]
    full = request([3, 4], 2)
    assert commit(full, [5, 6, 7]) == 2
    assert full.is_done


def test_all_but_the_last_committed_token_count_as_processed() -> None:
    context = request([3, 4], 10)
    assert commit(context, [5, 6, 7]) == 3
    assert context.tokens.processed_length == 4
    assert context.tokens.active.tolist() == [7]


def test_the_rows_that_the_drafts_read() -> None:
    running = Advance(np.array([10, 11, 12, 13, 14, 15]), start=3, end=5, first_row=0, kept=2, drafts=True, keep=2)
    resting = Advance(np.array([30, 31, 32]), start=1, end=2, first_row=2, kept=0, drafts=False, keep=1)
    chunk = Advance(np.array([20, 21, 22, 23]), start=0, end=2, first_row=4, kept=0, drafts=True, keep=2)
    plan = draft_rows([running, resting, chunk], num_hidden_rows=6, depth=3)
    assert plan.rows.tolist() == [6, 7, 0, 1, 4, 5]
    assert plan.tokens.tolist() == [12, 13, 14, 15, 21, 22]
    assert plan.following.tolist() == [1, 2, 3, 6, 5, 7]
    assert plan.keep.tolist() == [0, 1, 2, 4, 5]
    assert plan.keep_counts == (2, 1, 2)
    assert [known.tolist() for known in plan.known] == [
        [UNKNOWN_TOKEN, 23],
        [UNKNOWN_TOKEN, UNKNOWN_TOKEN],
        [UNKNOWN_TOKEN, UNKNOWN_TOKEN],
    ]
    assert plan.input_row_offsets.tolist() == [0, 4, 6]
    assert plan.cache_lengths.tolist() == [1, 0]
    assert plan.max_prompt_length == 4


def test_acceptance_is_counted_among_drafts_whose_predecessors_were_right() -> None:
    statistics = Statistics(2)
    statistics.record_drafts([(2, 2), (2, 0), (1, 1)])
    assert statistics.acceptance == pytest.approx([2 / 3, 1 / 1])


def test_a_step_reports_its_acceptance() -> None:
    metrics = step_metrics([(2, 2), (2, 0), (1, 1)])
    assert (metrics.accepted_per_position, metrics.num_verifications) == ([2, 1], 3)


def test_what_is_emitted_has_the_targets_distribution() -> None:
    """20,000 draws for 5,000 requests of three drafts on one set of logits: chi-square over all that can come out."""
    rng = np.random.default_rng(3)
    num_requests, vocab_size, temperature = 5_000, 12, 0.8
    logits = rng.normal(size=(4, vocab_size)).astype(np.float32)
    drafts = [int(np.argsort(row)[-2]) for row in logits[:3]]
    sampling = [
        SamplingParams(temperature=temperature, top_k=-1, seed=16 * index, ignore_eos=True)
        for index in range(num_requests)
    ]
    contexts = [request([3, 4], 20, params) for params in sampling]
    ahead = [view for context in contexts for view in contexts_ahead(context, drafts)]
    drawn = sample(np.tile(logits, (num_requests, 1)), ahead).reshape(num_requests, 4)
    emitted = Counter(tuple(row[: num_accepted(drafts, row) + 1]) for row in drawn.tolist())

    probabilities = np.exp(logits / temperature)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    expected = {
        (*drafts[:accepted], token): float(
            np.prod([probabilities[i, drafts[i]] for i in range(accepted)]) * probabilities[accepted, token]
        )
        for accepted in range(4)
        for token in range(vocab_size)
        if accepted == 3 or token != drafts[accepted]
    }
    assert set(emitted) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1.0)
    cells = {outcome: num_requests * share for outcome, share in expected.items() if num_requests * share >= 5}
    statistic = sum((emitted[outcome] - count) ** 2 / count for outcome, count in cells.items())
    freedom = len(cells) - 1
    # Five standard deviations of the chi-square distribution; a draft that is kept too often shows as hundreds.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {statistic:.0f} with {freedom} degrees"


def sample(logits: np.ndarray, contexts: list[TextContext]) -> np.ndarray:
    """Draws one token a row with the sampler of the plain pipeline."""
    sampler = TopKSampler(SamplingConfig(), device=DeviceRef.CPU())
    graph = sampler.trace(*sampler.input_types, name=TopKSampler.GRAPH_NAME)
    model = InferenceSession(devices=[CPU()]).load(graph)
    inputs = SamplerInputs.create(contexts, CPU()).as_list()
    previous = Buffer(shape=(len(contexts), 0), dtype=DType.int64, device=CPU())
    return np.array(model.execute(Buffer.from_numpy(logits), previous, *inputs)[0].to_numpy())
