"""Requests that are given up before their first token are cancelled until the worker must have heard of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from max.pipelines.context import GenerationStatus
from max.serve.pipelines.llm import TokenGeneratorOutput

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
