"""Ends answers before their stop strings.

MAX leaves the stop string in completions and in streams, overlooks one in a chunk of many tokens, and goes on with what
the model says until its request to stop arrives there: a second finish reason, or none at the end and status 500.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeAlias

from max.pipelines.context import GenerationStatus
from max.pipelines.modeling.types import RequestID
from max.serve.pipelines.llm import TokenGeneratorOutput

Chunks: TypeAlias = AsyncGenerator[TokenGeneratorOutput, None]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops` in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class StopFilter:
    """Passes a text that comes in pieces, up to the first stop string; holds back what may be the beginning of one.

    Args:
        stops: The stop strings, none empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._stopped = False

    def feed(self, piece: str, last: bool = False) -> str:
        """What can be passed on now that `piece` has come; all that remains with the `last` one."""
        if self._stopped:
            return ""
        text = self._held + piece
        passed = before_stop(text, self._stops)
        self._stopped = len(passed) < len(text)
        if self._stopped or last:
            self._held = ""
            return passed
        held = max(map(len, self._stops)) - 1
        while held > 0 and not any(stop.startswith(text[-held:]) for stop in self._stops):
            held -= 1
        held = min(held, len(text))
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def ended_at_stop(
    ask: Callable[..., Awaitable[Chunks]], cancel: Callable[[RequestID], None]
) -> Callable[..., Awaitable[Chunks]]:
    """`TokenGeneratorPipeline.next_token_chunk` whose chunks end with the one in which a stop string is complete.

    Args:
        ask: The same without that.
        cancel: Tells the worker to end a request.
    """

    async def next_token_chunk(request: Any, **options: Any) -> Chunks:
        chunks = await ask(request, **options)
        stops = request.sampling_params.stop
        return _up_to_stop(chunks, stops, lambda: cancel(request.request_id)) if stops else chunks

    return next_token_chunk


async def _up_to_stop(chunks: Chunks, stops: Sequence[str], cancel: Callable[[], None]) -> Chunks:
    tail, tail_length = "", max(map(len, stops)) - 1
    async with aclosing(chunks):
        async for chunk in chunks:
            text = tail + (chunk.decoded_tokens or "")
            tail = text[len(text) - min(tail_length, len(text)) :]
            found = min((stop for stop in stops if stop in text), key=text.index, default=None)
            if found is not None:
                cancel()
                yield replace(chunk, status=GenerationStatus.END_OF_SEQUENCE, stop_sequence=found)
                return
            yield chunk


async def without_stops(events: AsyncGenerator[Any], stops: Sequence[str]) -> AsyncGenerator[Any]:
    """A stream of a completion or a chat, without its stop string.

    Args:
        events: The payloads of server-sent events: JSON, then `[DONE]`; closed with this one.
        stops: The stop strings, none empty.
    """
    stop_filter = StopFilter(stops)
    async with aclosing(events):
        async for event in events:
            yield _filtered(event, stop_filter) if isinstance(event, str) and event.startswith("{") else event


def _filtered(event: str, stop_filter: StopFilter) -> str:
    content = json.loads(event)
    for choice in content.get("choices", ()):
        last = choice.get("finish_reason") is not None
        holder, name = (choice, "text") if "text" in choice else (choice["delta"], "content")
        if last or holder.get(name):
            holder[name] = stop_filter.feed(holder.get(name) or "", last)
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
