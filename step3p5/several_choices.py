"""Puts together the answers to a request that was asked several times, as the choices of one: the API's `n`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from max.serve.schemas.openai import CreateChatCompletionResponse, CreateCompletionResponse
from sse_starlette.sse import EventSourceResponse

from .hang_ups import close_all, ended_with_connection

DONE = "[DONE]"


async def gather_answers(asking: Sequence[Coroutine[Any, Any, Any]]) -> Any:
    """Awaits the answers to `n` requests that differ in nothing but their seeds, and makes them one.

    Args:
        asking: MAX's handler of each.

    Returns:
        One answer; of `p` prompts, the choices `n * i` to `n * i + n - 1` are those of prompt `i`. What is no answer
        (an error) is returned in place of all.

    Raises:
        Exception: What the first handler raises that raises anything; the others are cancelled.
    """
    tasks = [asyncio.ensure_future(one) for one in asking]
    try:
        answers = await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await close_all(_streams(await asyncio.gather(*tasks, return_exceptions=True)))
        raise
    streams = _streams(answers)
    if len(streams) == len(answers):
        return ended_with_connection(answers[0], merged_events(streams), *streams)
    if all(isinstance(answer, CreateCompletionResponse | CreateChatCompletionResponse) for answer in answers):
        return _merged_answer(answers)
    await close_all(streams)
    return next(answer for answer in answers if not isinstance(answer, EventSourceResponse))


def _streams(answers: Iterable[Any]) -> list[Any]:
    return [answer.body_iterator for answer in answers if isinstance(answer, EventSourceResponse)]


async def merged_events(streams: Sequence[AsyncGenerator[Any]]) -> AsyncGenerator[Any]:
    """The payloads of `streams` as they come, each choice under its index, with one sum of usages and one end."""
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Any]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    await queue.put((number, event))
        finally:
            await queue.put((number, None))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    usages, first_id, open_streams = list[dict[str, Any]](), None, len(streams)
    try:
        while open_streams:
            number, event = await queue.get()
            if event is None:
                open_streams -= 1
            elif event != DONE:
                content = json.loads(event)
                first_id = first_id or content.get("id")
                if first_id is not None and "id" in content:
                    content["id"] = first_id
                for choice in content.get("choices", ()):
                    choice["index"] = choice["index"] * len(streams) + number
                if content.get("usage") and not content["choices"]:
                    usages.append(content)
                else:
                    yield _payload(content)
        if usages:
            yield _payload(usages[0] | {"usage": summed_usage([content["usage"] for content in usages])})
        yield DONE
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def summed_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The usage of one request whose choices had `usages`: the prompt counts once."""
    usage = dict(usages[0])
    usage["completion_tokens"] = sum(one["completion_tokens"] for one in usages)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    details = [one.get("completion_tokens_details") for one in usages]
    if all(details):
        reasoning = sum((one or {}).get("reasoning_tokens") or 0 for one in details)
        usage["completion_tokens_details"] = dict(details[0] or {}) | {"reasoning_tokens": reasoning}
    return usage


def _merged_answer(answers: Sequence[Any]) -> Any:
    first = answers[0]
    usage = summed_usage([answer.usage.model_dump() for answer in answers])
    choices = []
    for number, answer in enumerate(answers):
        for choice in answer.choices:
            choice.index = choice.index * len(answers) + number
            choices.append(choice)
    first.choices = sorted(choices, key=lambda choice: choice.index)
    first.usage = type(first.usage).model_validate(usage)
    return first


def _payload(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
