"""What decoding steps of the same requests share, without a GPU: the parts of the pipeline that decide it."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from max import tree
from max.driver import Buffer
from max.nn.kv_cache import KVCacheInputsPerDevice
from max.pipelines.context.logit_processors_type import BatchProcessorInputs
from max.pipelines.modeling.types import BatchType

from step3p5.model import cache_leaves
from step3p5.pipelines import FutureTokens, GreedyDraws, OverlapPipeline
from step3p5.steady_batch import same_requests


def context(**changes: Any) -> Any:
    parameters = SimpleNamespace(top_k=1, logits_processors=None, needs_penalties=False)
    free = {"matcher": None, "json_schema": None, "grammar": None, "min_tokens": 0, "sampling_params": parameters}
    return SimpleNamespace(**(free | changes))


class OwnTokens:
    """Stands for MAX's processor; counts its calls."""

    calls = 0

    def realize_future_tokens(self, **_: Any) -> None:
        self.calls += 1


def step(batch: list[Any], batch_type: BatchType = BatchType.TG) -> Any:
    return SimpleNamespace(flat_batch=batch, batch_type=batch_type)


@pytest.mark.parametrize(
    ("before", "now", "own"),
    [
        (step([0, 1]), step([0, 1]), 0),
        (step([0, 1]), step([1, 0]), 1),
        (step([0, 1]), step([0]), 1),
        (step([0], BatchType.CE), step([0]), 1),
        (step([0]), step([0], BatchType.CE), 1),
    ],
    ids=["the same", "another order", "one has ended", "after a prompt", "a prompt"],
)
def test_drawn_tokens_are_the_next_step_s_where_the_requests_are_the_same(before: Any, now: Any, own: int) -> None:
    requests = [context(), context()]
    for inputs in (before, now):
        inputs.flat_batch = [requests[index] for index in inputs.flat_batch]
    drawn, model_inputs, other = object(), SimpleNamespace(tokens=None), OwnTokens()
    FutureTokens(other).realize_future_tokens(
        SimpleNamespace(inputs=before, generated_tokens_device=drawn), now, model_inputs
    )
    assert other.calls == own
    assert (model_inputs.tokens is drawn) == (own == 0)


def test_a_request_that_a_grammar_binds_is_not_the_same() -> None:
    free, bound = context(), context(grammar="root ::= [0-9]")
    assert same_requests([free], [free])
    assert not same_requests([bound], [bound])
    assert not same_requests([free], [context()])


def test_an_unchanged_batch_keeps_its_sampling_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def create(self: Any, batch: list[Any]) -> Any:
        made.append(SimpleNamespace(penalty_inputs=None, min_tokens_masks=None, generated_tokens="none", batch=batch))
        return made[-1], None

    parent = OverlapPipeline.__mro__[1]
    monkeypatch.setattr(parent, "_create_sampling_processor", create)
    pipeline = object.__new__(OverlapPipeline)
    batch = [context(), context()]
    first, _ = pipeline._create_sampling_processor(batch)
    first.generated_tokens = "drawn"
    again, bitmask = pipeline._create_sampling_processor(list(batch))
    assert again is first
    assert again.generated_tokens == "none"
    assert bitmask is None
    assert pipeline._create_sampling_processor(batch[::-1])[0] is not first
    assert len(made) == 2


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"grammar": "root ::= [0-9]"},
        {"matcher": object()},
        {"min_tokens": 3},
        {"sampling_params": SimpleNamespace(top_k=4, logits_processors=None, needs_penalties=False)},
        {"sampling_params": SimpleNamespace(top_k=1, logits_processors=None, needs_penalties=True)},
    ],
    ids=["greedy", "grammar", "matcher", "min_tokens", "sampled", "penalties"],
)
def test_only_greedy_requests_are_drawn_without_max_s_sampler(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    of_max = SimpleNamespace(penalty_inputs=None, min_tokens_masks=None, generated_tokens="none")
    monkeypatch.setattr(OverlapPipeline.__mro__[1], "_create_sampling_processor", lambda *_: (of_max, None))
    pipeline = object.__new__(OverlapPipeline)
    pipeline._greedy = GreedyDraws(cast(Any, Greatest()), Buffer.from_numpy(np.array([3])))
    drawing, bitmask = pipeline._create_sampling_processor([context(), context(**other)])
    assert bitmask is None
    assert (drawing is of_max) == bool(other)


class Greatest:
    """Stands for the compiled `GreedyDraw`."""

    def execute(self, logits: Buffer, known: Buffer) -> tuple[Buffer]:
        return (Buffer.from_numpy(logits.to_numpy()[:, : known.to_numpy()[0]].argmax(-1)),)


def test_greedy_draws_are_a_column_of_the_last_tokens_logits(rng: np.random.Generator) -> None:
    draws = GreedyDraws(cast(Any, Greatest()), Buffer.from_numpy(np.array([3])))
    own, others = (Buffer.from_numpy(rng.standard_normal((2, 5), np.float32)) for _ in range(2))
    for last in (None, own):
        logits, offsets = draws.logits_for_sampling(
            logits=own if last is None else others, next_token_logits=last, logit_offsets=None
        )
        assert logits is own
        assert offsets is None
    draws(BatchProcessorInputs(logits=own, logit_offsets=None, context_batch=[]))
    np.testing.assert_array_equal(draws.generated_tokens.to_numpy(), own.to_numpy()[:, :3].argmax(-1)[:, None])


@pytest.mark.parametrize("kinds", [dict, OrderedDict])
def test_cache_inputs_are_listed_as_max_lists_them(kinds: type[dict[str, Any]]) -> None:
    def buffer(dtype: str = "int64") -> Buffer:
        return Buffer.from_numpy(np.zeros(1, dtype))

    def cache() -> Any:
        required = [buffer() for _ in range(6)]
        return KVCacheInputsPerDevice(*required, attention_dispatch_metadata=buffer())

    # A plain dict is listed by its keys, an ordered one as it was made.
    inputs = kinds([("sliding", [cache(), cache()]), ("full", [cache()])])
    for found, expected in zip(cache_leaves(inputs), tree.leaves(inputs), strict=True):
        assert found is expected
