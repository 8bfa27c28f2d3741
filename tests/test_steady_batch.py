"""Decoding steps of the same requests: what the short way from one to the next needs, and that it changes no token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import FIRST_TEXT_TOKEN, Runner

from step3p5.steady_batch import SteadyPipeline, SteadyStep, takes_the_best

PAGE = 128


def context(**changes: Any) -> Any:
    parameters = {"top_k": 1, "logits_processors": None, "needs_penalties": False}
    for name in parameters:
        parameters[name] = changes.pop(name, parameters[name])
    tokens = SimpleNamespace(active=[changes.pop("token", 7)], active_length=1, processed_length=5)
    for name in ("active_length", "processed_length"):
        setattr(tokens, name, changes.pop(name, getattr(tokens, name)))
    rest = {"matcher": None, "json_schema": None, "grammar": None, "min_tokens": 0} | changes
    return SimpleNamespace(tokens=tokens, sampling_params=SimpleNamespace(**parameters), **rest)


def step(batch: list[Any]) -> SteadyStep:
    lengths = [np.full(len(batch), 99, np.uint32) for _ in range(2)]
    return SteadyStep(batch, SimpleNamespace(), (), np.full(len(batch), -1), lengths)  # type: ignore[arg-type]


def test_the_next_step_has_the_last_tokens_and_the_lengths_before_them() -> None:
    last = step([context(token=3, processed_length=8), context(token=4, processed_length=9)])
    assert last.goes_on_in(list(last.batch), PAGE)
    last.advance()
    assert last.tokens.tolist() == [3, 4]
    assert [lengths.tolist() for lengths in last.cache_lengths] == [[8, 9]] * 2


@pytest.mark.parametrize(
    "changes",
    [{"active_length": 2}, {"processed_length": PAGE}, {"grammar": "root ::= [0-9]"}, {"json_schema": "{}"}],
    ids=["several tokens", "a new page", "a grammar", "a schema"],
)
def test_a_step_that_needs_more_is_prepared_anew(changes: dict[str, Any]) -> None:
    batch = [context(), context(**changes)]
    assert not step(batch).goes_on_in(batch, PAGE)
    assert step(batch[:1]).goes_on_in(batch[:1], PAGE)


def test_a_step_of_other_requests_is_prepared_anew() -> None:
    batch = [context(), context()]
    assert not step(batch).goes_on_in(batch[::-1], PAGE)
    assert not step(batch).goes_on_in(batch[:1], PAGE)
    after_a_prompt = SteadyStep(batch[:1], SimpleNamespace(), (), np.zeros(9), [])  # type: ignore[arg-type]
    assert not after_a_prompt.goes_on_in(batch[:1], PAGE)


@pytest.mark.parametrize(
    "changes", [{"top_k": 2}, {"logits_processors": [print]}, {"needs_penalties": True}, {"min_tokens": 1}]
)
def test_only_the_greatest_logit_is_chosen_here(changes: dict[str, Any]) -> None:
    assert takes_the_best(context())
    assert not takes_the_best(context(**changes))


def test_the_short_way_changes_no_token(
    tiny_model: Runner, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of several lengths, each past the end of a page of its own."""
    lengths, new_tokens = (PAGE - 20, PAGE - 3, 7), PAGE + 12
    prompts = [rng.integers(FIRST_TEXT_TOKEN, tiny_model.num_tokens, size=length).tolist() for length in lengths]
    advanced: list[int] = []
    advance = SteadyStep.advance

    def counted(self: SteadyStep) -> None:
        advanced.append(len(self.batch))
        advance(self)

    def generate() -> list[list[int]]:
        result = tiny_model.model.generate(prompts, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return [list(map(int, sequence)) for sequence in result.sequences]

    with monkeypatch.context() as short:
        short.setattr(SteadyStep, "advance", counted)
        quick = generate()
    assert advanced.count(3) >= new_tokens - 8
    with monkeypatch.context() as long:
        long.setattr(SteadyPipeline, "_goes_on_in", lambda self, batch: None)
        long.setattr(SteadyStep, "advance", None)
        assert generate() == quick
