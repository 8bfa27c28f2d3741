"""Data-parallel batching: whatever the requests, splits and offsets rebuild every replica's batch."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from max.driver import CPU, Buffer
from max.nn.transformer import ReturnLogits
from max.pipelines.context import EOSTracker, TextContext, TokenBuffer
from max.pipelines.lib.interfaces.batch_processor import BatchProcessorRuntime

from step3p5.batch_processor import Step3p5BatchProcessor
from step3p5.model import Step3p5Inputs

MAX_BATCH_SIZE = 5
MAX_LENGTH = 40

Requests = list[list[int]]


def processor(data_parallel_degree: int) -> Step3p5BatchProcessor:
    config = SimpleNamespace(model=SimpleNamespace(data_parallel_degree=data_parallel_degree))
    runtime = BatchProcessorRuntime(
        pipeline_config=cast(Any, config),
        devices=[CPU()],
        return_logits=ReturnLogits.LAST_TOKEN,
        max_batch_size=MAX_BATCH_SIZE,
        max_seq_len=MAX_LENGTH,
        max_batch_input_tokens=MAX_BATCH_SIZE * MAX_LENGTH,
        data_parallel_degree=data_parallel_degree,
    )
    return Step3p5BatchProcessor(cast(Any, None), runtime)


PROCESSORS = {degree: processor(degree) for degree in (1, 2, 3, 8)}


@st.composite
def replica_batches(draw: st.DrawFn) -> list[list[tuple[list[int], int]]]:
    """For each replica its requests: the tokens, and how many of them the cache has."""
    request = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=MAX_LENGTH).flatmap(
        lambda tokens: st.tuples(st.just(tokens), st.integers(0, len(tokens) - 1))
    )
    replica = st.lists(request, max_size=MAX_BATCH_SIZE)
    degree = draw(st.sampled_from(list(PROCESSORS)))
    return draw(st.lists(replica, min_size=degree, max_size=degree))


def context(tokens: list[int], cached: int) -> TextContext:
    buffer = TokenBuffer(np.asarray(tokens, dtype=np.int64))
    buffer.skip_processing(cached)
    return TextContext(max_length=MAX_LENGTH, tokens=buffer, eos_tracker=EOSTracker(eos_token_ids=set()))


def prepare(replicas: list[list[tuple[list[int], int]]]) -> Step3p5Inputs:
    contexts = [[context(tokens, cached) for tokens, cached in replica] for replica in replicas]
    return PROCESSORS[len(replicas)].prepare_initial_token_inputs(contexts)


@settings(max_examples=300, deadline=None)
@given(replica_batches())
def test_splits_and_offsets_rebuild_the_batch(replicas: list[list[tuple[list[int], int]]]) -> None:
    inputs = prepare(replicas)
    tokens, offsets = inputs.tokens.to_numpy().tolist(), inputs.input_row_offsets.to_numpy().tolist()
    rows = [tokens[start:end] for start, end in pairwise(offsets)]
    assert [offsets[0], offsets[-1]] == [0, len(tokens)]
    if len(replicas) == 1:
        assert (inputs.host_input_row_offsets, inputs.data_parallel_splits) == (None, None)
        rebuilt = [rows]
    else:
        assert isinstance(inputs.host_input_row_offsets, Buffer)
        assert isinstance(inputs.data_parallel_splits, Buffer)
        assert inputs.host_input_row_offsets.to_numpy().tolist() == offsets
        splits = inputs.data_parallel_splits.to_numpy().tolist()
        assert len(splits) == len(replicas) + 1
        rebuilt = [rows[start:end] for start, end in pairwise(splits)]
    assert rebuilt == [[request[cached:] for request, cached in replica] for replica in replicas]


def test_the_graph_gets_offsets_and_splits_between_logits_and_signals() -> None:
    inputs = prepare([[([5, 6, 7], 1)], [([8], 0)]])
    assert [buffer.to_numpy().tolist() for buffer in inputs.buffers] == [
        [6, 7, 8],
        [0, 2, 3],
        [1],
        [0, 2, 3],
        [0, 1, 2],
    ]


def test_as_many_batches_as_replicas() -> None:
    with pytest.raises(ValueError, match="replica batches must match data parallel degree"):
        PROCESSORS[2].prepare_initial_token_inputs([[]])
