"""Putting several answers together as the choices of one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from sse_starlette.sse import EventSourceResponse

from step3p5.several_choices import gather_answers, merged_events, summed_usage

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


def event(text: str, index: int = 0, **fields: Any) -> str:
    return json.dumps({"id": text, "choices": [{"index": index, "text": text}], **fields})


def merge(*streams: list[str]) -> list[Any]:
    async def source(stream: list[str]) -> AsyncGenerator[str]:
        for one in stream:
            await asyncio.sleep(0)
            yield one

    async def run() -> list[str]:
        return [one async for one in merged_events([source(stream) for stream in streams])]

    return [one if one == "[DONE]" else json.loads(one) for one in asyncio.run(run())]


def test_streams_are_merged_under_one_id_with_one_usage_and_one_end() -> None:
    usages = [json.dumps({"id": "x", "choices": [], "usage": USAGE | {"completion_tokens": n}}) for n in (2, 4)]
    *events, usage, end = merge([event("a"), event("b"), usages[0], "[DONE]"], [event("A", 1), usages[1], "[DONE]"])
    assert {one["id"] for one in (*events, usage)} == {"a"}
    texts = dict.fromkeys(range(4), "")
    for one in events:
        texts[one["choices"][0]["index"]] += one["choices"][0]["text"]
    assert texts == {0: "ab", 1: "", 2: "", 3: "A"}
    assert usage["usage"] == USAGE | {"completion_tokens": 6, "total_tokens": 11}
    assert end == "[DONE]"


def test_an_error_within_one_stream_passes_and_the_other_goes_on() -> None:
    error = json.dumps({"error": {"message": "x"}})
    got = merge([error], [event("a"), event("b"), "[DONE]"])
    assert json.loads(error) in got
    assert [one["choices"][0]["text"] for one in got[:-1] if "choices" in one] == ["a", "b"]
    assert got[-1] == "[DONE]"


def test_a_reader_that_leaves_ends_every_stream() -> None:
    ended = []

    async def endless(name: str) -> AsyncGenerator[str]:
        try:
            while True:
                await asyncio.sleep(0)
                yield event(name)
        finally:
            ended.append(name)

    async def run() -> None:
        merged = merged_events([endless("a"), endless("b")])
        await anext(merged)
        await merged.aclose()

    asyncio.run(run())
    assert sorted(ended) == ["a", "b"]


def test_the_first_failure_ends_the_other_requests() -> None:
    ended = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("refused")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def run() -> None:
        await gather_answers([waits(), fails()])

    with pytest.raises(ValueError, match="refused"):
        asyncio.run(run())
    assert ended == [True]


def test_a_failure_ends_the_streams_that_have_begun() -> None:
    ended = []

    async def endless() -> AsyncGenerator[str]:
        try:
            while True:
                yield event("a")
        finally:
            ended.append(True)

    async def streams() -> EventSourceResponse:
        events = endless()
        await anext(events)
        return EventSourceResponse(events)

    async def fails() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("refused")

    async def run() -> None:
        with pytest.raises(ValueError, match="refused"):
            await gather_answers([streams(), fails()])
        assert ended == [True]

    asyncio.run(run())


def test_what_is_no_answer_stands_for_all() -> None:
    async def refusal() -> str:
        return "refused"

    async def run() -> Any:
        return await gather_answers([refusal(), refusal()])

    assert asyncio.run(run()) == "refused"


def test_the_prompt_counts_once() -> None:
    details = {"completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": None}}
    total = summed_usage([USAGE | details, USAGE | details])
    assert (total["prompt_tokens"], total["completion_tokens"], total["total_tokens"]) == (5, 4, 9)
    assert total["completion_tokens_details"] == {"reasoning_tokens": 6, "audio_tokens": None}
