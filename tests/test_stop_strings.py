"""Taking stop strings out of answers that come in pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from max.pipelines.context import GenerationStatus
from max.serve.pipelines.llm import TokenGeneratorOutput

from step3p5.stop_strings import StopFilter, before_stop, ended_at_stop, without_stops

pieces = st.lists(st.text("ab<", max_size=3), max_size=12)
stops = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3)


def test_a_text_ends_before_the_first_of_its_stops() -> None:
    assert before_stop("one two three", ["three", "two"]) == "one "
    assert before_stop("one two three", ["four"]) == "one two three"


def up_to_a_stop(pieces: list[str], stops: list[str]) -> list[str]:
    """The pieces that come until one completes a stop string, which is when a server stops."""
    for count in range(len(pieces)):
        if any(stop in "".join(pieces[: count + 1]) for stop in stops):
            return pieces[: count + 1]
    return pieces


@given(pieces, stops)
def test_pieces_put_together_are_the_text_before_the_stop(pieces: list[str], stops: list[str]) -> None:
    stop_filter = StopFilter(stops)
    passed = [stop_filter.feed(piece) for piece in pieces]
    passed.append(stop_filter.feed("", last=True))
    assert "".join(passed) == before_stop("".join(up_to_a_stop(pieces, stops)), stops)


@given(pieces, stops)
def test_no_more_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    stop_filter, passed, text = StopFilter(stops), "", ""
    for piece in up_to_a_stop(pieces, stops):
        passed, text = passed + stop_filter.feed(piece), text + piece
        held = before_stop(text, stops)[len(passed) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def filtered(events: list[Any], stops: list[str]) -> list[Any]:
    async def source() -> AsyncGenerator[Any]:
        for event in events:
            yield event if isinstance(event, str) else json.dumps(event)

    async def run() -> list[Any]:
        return [event async for event in without_stops(source(), stops)]

    return [event if event == "[DONE]" else json.loads(event) for event in asyncio.run(run())]


def test_a_streamed_completion_keeps_all_but_the_stop() -> None:
    texts = ["on", "e t", "wo", "!"]
    events: list[Any] = [
        {
            "id": "1",
            "choices": [{"index": 0, "text": text, "logprobs": {"token_logprobs": [-1]}, "finish_reason": None}],
        }
        for text in texts
    ]
    events[-1]["choices"][0]["finish_reason"] = "stop"
    usage = {"id": "1", "choices": [], "usage": {"completion_tokens": 4}}
    got = filtered([*events, usage, "[DONE]"], ["two"])
    assert [event["choices"][0]["text"] for event in got[:4]] == ["on", "e ", "", ""]
    for before, after in zip(events, got, strict=False):
        text = after["choices"][0]["text"]
        assert {**before["choices"][0], "text": text} == after["choices"][0]
    assert got[4:] == [usage, "[DONE]"]


def test_a_streamed_chat_keeps_reasoning_and_gets_what_was_held_back_at_its_end() -> None:
    deltas = [{"role": "assistant", "reasoning_content": "stop"}, {"content": "to st"}, {"content": None}]
    reasons = [None, None, "length"]
    events: list[Any] = [
        {"choices": [{"delta": delta, "finish_reason": reason}]} for delta, reason in zip(deltas, reasons, strict=True)
    ]
    got = [event["choices"][0]["delta"] for event in filtered(events, ["stop"])]
    assert got == [deltas[0], {"content": "to "}, {"content": "st"}]


def test_an_error_within_a_stream_passes() -> None:
    assert filtered([{"error": {"message": "x"}}], ["stop"]) == [{"error": {"message": "x"}}]


def chunks_up_to_stop(texts: list[str], stops: list[str] | None) -> tuple[list[TokenGeneratorOutput], list[str]]:
    """What of `texts` comes, and whether the source was closed and the request cancelled."""
    told: list[str] = []

    async def ask(request: Any, *, parse_reasoning: bool) -> AsyncGenerator[TokenGeneratorOutput]:
        async def chunks() -> AsyncGenerator[TokenGeneratorOutput]:
            try:
                for text in texts:
                    yield TokenGeneratorOutput(GenerationStatus.ACTIVE, decoded_tokens=text)
            finally:
                told.append("closed")

        assert parse_reasoning
        return chunks()

    async def run() -> list[TokenGeneratorOutput]:
        request = SimpleNamespace(request_id="cancelled", sampling_params=SimpleNamespace(stop=stops))
        chunks = await ended_at_stop(ask, lambda request_id: told.append(str(request_id)))(
            request, parse_reasoning=True
        )
        return [chunk async for chunk in chunks]

    return asyncio.run(run()), told


def test_what_a_model_says_until_it_hears_of_the_stop_is_dropped() -> None:
    got, told = chunks_up_to_stop(["a", "st", "op", "late"], ["nowhere", "stop"])
    assert [chunk.decoded_tokens for chunk in got] == ["a", "st", "op"]
    assert [chunk.stop_sequence for chunk in got] == [None, None, "stop"]
    assert got[-1].status == GenerationStatus.END_OF_SEQUENCE
    assert told == ["cancelled", "closed"]


def test_a_stop_is_seen_in_a_chunk_of_any_length() -> None:
    got, _ = chunks_up_to_stop(["x" * 100 + "stop" + "x" * 100, "late"], ["stop"])
    assert [chunk.stop_sequence for chunk in got] == ["stop"]


@given(pieces, stops)
def test_the_chunks_end_with_the_one_that_completes_a_stop(pieces: list[str], stops: list[str]) -> None:
    got, told = chunks_up_to_stop(pieces, stops)
    assert [chunk.decoded_tokens for chunk in got] == up_to_a_stop(pieces, stops)
    stopped = any(stop in "".join(pieces) for stop in stops)
    assert told == ["cancelled", "closed"][not stopped :]


def test_without_stops_nothing_is_dropped() -> None:
    got, told = chunks_up_to_stop(["a", "stop", "b"], None)
    assert [chunk.decoded_tokens for chunk in got] == ["a", "stop", "b"]
    assert told == ["closed"]
