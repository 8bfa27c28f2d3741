"""Keeps a thought a thought where the answer has nothing else.

When a model ends its turn within its thought, or right after it, MAX moves the thought into `content` in answers that
are not streamed. Agents would take it for the answer, and a call in it for a call; streams keep it apart.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from max.serve.pipelines.llm import TokenGeneratorOutput
from max.serve.schemas.openai import CreateChatCompletionResponse

from .stop_strings import Chunks, before_stop


@dataclass
class Said:
    """What the model has said in answer to one request."""

    thought: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)

    def add(self, chunk: TokenGeneratorOutput) -> None:
        """Appends what has just come."""
        self.thought.append(chunk.decoded_reasoning_tokens or "")
        self.content.append(chunk.decoded_tokens or "")


SAID: ContextVar[Said] = ContextVar("SAID")
"""Where the request that the current task answers is taken down."""


def taken_down(ask: Callable[..., Awaitable[Chunks]]) -> Callable[..., Awaitable[Chunks]]:
    """`TokenGeneratorPipeline.next_token_chunk` that appends its chunks to `SAID`, where that is set."""

    async def next_token_chunk(*args: Any, **options: Any) -> Chunks:
        chunks, said = await ask(*args, **options), SAID.get(None)
        return chunks if said is None else _take_down(chunks, said)

    return next_token_chunk


async def _take_down(chunks: Chunks, said: Said) -> AsyncGenerator[TokenGeneratorOutput, None]:
    async with aclosing(chunks):
        async for chunk in chunks:
            said.add(chunk)
            yield chunk


def keep_thought(answer: CreateChatCompletionResponse, said: Said, stops: Sequence[str]) -> None:
    """Moves the thought of an answer with no content before a stop string back to `reasoning_content`."""
    thought, content = "".join(said.thought), before_stop("".join(said.content), stops)
    if not thought or content.strip():
        return
    for choice in answer.choices:
        choice.message.content, choice.message.reasoning_content = content, thought
        choice.message.tool_calls = None
        choice.finish_reason = "stop" if choice.finish_reason == "tool_calls" else choice.finish_reason
