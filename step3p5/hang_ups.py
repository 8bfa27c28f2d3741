"""Ends the requests of clients that hang up.

MAX's model worker reads cancellations after each step and forgets those of requests that it has not read yet: such a
request then runs to its last token for nobody. So a cancellation without a first token is sent again for a while.

A stream that has begun is left to the garbage collector, for tracebacks that hold one another hold it too: minutes
later, on a server that is not busy. So what a response streams is closed with its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

from max.pipelines.modeling.types import RequestID
from max.serve.pipelines.llm import TokenGeneratorOutput
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask

from .stop_strings import Chunks

PAUSES = (0.5, 1, 2, 4, 8, 16, 32)
"""Seconds before each repetition: the worker reads requests once a step, and a step is seconds at most."""

_repeating: set[asyncio.Task[None]] = set()


def cancelled_for_sure(
    ask: Callable[..., Awaitable[Chunks]], cancel: Callable[[RequestID], None]
) -> Callable[..., Awaitable[Chunks]]:
    """`TokenGeneratorPipeline.next_token_chunk` whose requests end if they are given up before their first chunk.

    Args:
        ask: The same without that.
        cancel: Tells the worker to end a request; one that it does not know is none of its concern.
    """

    async def next_token_chunk(request: Any, **options: Any) -> Chunks:
        try:
            chunks = await ask(request, **options)
        except asyncio.CancelledError:
            _repeat(cancel, request.request_id)
            raise
        return _watched(chunks, cancel, request.request_id)

    return next_token_chunk


def ended_with_connection(answer: EventSourceResponse, *streams: AsyncGenerator[Any]) -> EventSourceResponse:
    """`answer` with the payloads of the first of `streams`, all of which are closed when its connection ends."""
    answer.body_iterator = streams[0]
    answer.background = BackgroundTask(close_all, streams)
    return answer


async def close_all(streams: Iterable[AsyncGenerator[Any]]) -> None:
    """Ends async generators, begun or not, one after the other."""
    for stream in streams:
        await stream.aclose()


async def _watched(
    chunks: Chunks, cancel: Callable[[RequestID], None], request_id: RequestID
) -> AsyncGenerator[TokenGeneratorOutput, None]:
    begun = False
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                begun = True
                yield chunk
    except asyncio.CancelledError:
        if not begun:
            _repeat(cancel, request_id)
        raise


def _repeat(cancel: Callable[[RequestID], None], request_id: RequestID) -> None:
    async def repeat() -> None:
        for pause in PAUSES:
            await asyncio.sleep(pause)
            cancel(request_id)

    task = asyncio.get_running_loop().create_task(repeat())
    _repeating.add(task)  # the loop alone would not keep it
    task.add_done_callback(_repeating.discard)
