"""Requests whose clients hang up: before their first token they are cancelled until the worker must have heard of it,
later their streams end with the connection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from max.pipelines.context import GenerationStatus
from max.serve.pipelines.llm import TokenGeneratorOutput
from max.serve.router.openai_routes import _start_stream
from sse_starlette.sse import AppStatus, EventSourceResponse

from step3p5 import hang_ups

REQUEST = SimpleNamespace(request_id="mine")


def cancellations(monkeypatch: pytest.MonkeyPatch, waits_in: str) -> list[Any]:
    """What the worker is told when a client hangs up while the request waits for what `waits_in` says."""
    monkeypatch.setattr(hang_ups, "PAUSES", (0.01, 0.01, 0.01))
    told: list[Any] = []

    async def run() -> None:
        reached = asyncio.Event()

        async def wait(where: str) -> None:
            if where == waits_in:
                reached.set()
                await asyncio.sleep(60)

        async def ask(request: Any) -> AsyncGenerator[TokenGeneratorOutput]:
            await wait("submission")

            async def chunks() -> AsyncGenerator[TokenGeneratorOutput]:
                await wait("the first token")
                yield TokenGeneratorOutput(GenerationStatus.ACTIVE, decoded_tokens="a")
                await wait("the second token")

            return chunks()

        async def read() -> list[str | None]:
            chunks = await hang_ups.cancelled_for_sure(ask, told.append)(REQUEST)
            return [chunk.decoded_tokens async for chunk in chunks]

        task = asyncio.create_task(read())
        if waits_in == "nothing":
            assert await task == ["a"]
        else:
            await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        while hang_ups._repeating:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    return told


@pytest.mark.parametrize("waits_in", ["submission", "the first token"])
def test_a_request_without_a_first_token_is_cancelled_again(monkeypatch: pytest.MonkeyPatch, waits_in: str) -> None:
    assert cancellations(monkeypatch, waits_in) == ["mine"] * 3


@pytest.mark.parametrize("waits_in", ["the second token", "nothing"])
def test_others_are_left_to_max(monkeypatch: pytest.MonkeyPatch, waits_in: str) -> None:
    assert cancellations(monkeypatch, waits_in) == []


@pytest.mark.parametrize("filtered", [False, True])
def test_a_stream_ends_with_its_connection_before_any_garbage_is_collected(
    monkeypatch: pytest.MonkeyPatch, filtered: bool
) -> None:
    monkeypatch.setattr(AppStatus, "should_exit_event", None)  # belongs to the loop that made it
    ended: list[str] = []

    async def endless() -> AsyncGenerator[str]:
        try:
            while True:
                await asyncio.sleep(0)
                yield "token"
        finally:
            ended.append("the model's tokens")

    async def through(events: AsyncGenerator[str]) -> AsyncGenerator[str]:
        async for event in events:
            yield event

    async def run() -> None:
        written = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                written.set()
            await asyncio.sleep(0)

        async def receive() -> dict[str, str]:
            await written.wait()
            return {"type": "http.disconnect"}

        _, events = await _start_stream(endless())
        streams = [through(events), events] if filtered else [events]
        await hang_ups.ended_with_connection(EventSourceResponse(events), *streams)({"type": "http"}, receive, send)
        del events, streams
        await asyncio.sleep(0.01)

        assert ended == ["the model's tokens"]

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()
