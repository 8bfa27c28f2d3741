"""Chats on a real server through the `openai` client: thoughts, their switch, and a conversation with tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import OpenAI
from server import Server
from transformers import AutoTokenizer

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Say something."}]
NO_THOUGHT = {"enable_thinking": False}


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


class Answer:
    """The only choice of a greedy chat, put together as a client does."""

    def __init__(self, client: OpenAI, model: str, stream: bool, **options: Any) -> None:
        self.content = self.thought = ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        extra = {"return_token_ids": True} | options.pop("extra_body", {})
        if stream:
            options["stream_options"] = {"include_usage": True}
        create: Any = client.chat.completions.create
        got = create(model=model, temperature=0, stream=stream, extra_body=extra, **options)
        for piece in got if stream else (got,):
            self.usage = piece.usage
            for choice in piece.choices:
                self._add(choice, choice.delta if stream else choice.message)

    def _add(self, choice: Any, said: Any) -> None:
        self.content += said.content or ""
        self.thought += getattr(said, "reasoning_content", None) or ""
        for call in said.tool_calls or ():
            self.calls.append({"id": call.id, "type": "function", "function": call.function.model_dump()})
        self.tokens += choice.token_ids or ()
        self.finish_reason = choice.finish_reason or self.finish_reason

    @property
    def seen(self) -> tuple[object, ...]:
        """What does not differ between two runs."""
        functions = [call["function"] for call in self.calls]
        return self.content, self.thought, functions, self.finish_reason, self.tokens, self.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_within_its_thought_has_a_thought_and_no_content(
    client: OpenAI, server: Server, stream: bool
) -> None:
    cut = Answer(client, server.model, stream, messages=CHAT, max_tokens=12, extra_body={"ignore_eos": True})
    assert (cut.finish_reason, cut.content) == ("length", "")
    assert len(cut.tokens) == cut.usage.completion_tokens == 12
    # An answer that may not end has tokens that say so, which nobody reads.
    decoded = str(AutoTokenizer.from_pretrained(server.model).decode(cut.tokens, skip_special_tokens=True))
    decoded = decoded.rstrip("\N{REPLACEMENT CHARACTER}")
    assert cut.thought.rstrip("\N{REPLACEMENT CHARACTER}") == decoded != ""

    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
    for options in ({}, {"tools": tools}):
        first = Answer(client, server.model, stream, messages=CHAT, max_tokens=8, **options)
        extra = {"stop_token_ids": [first.tokens[5]]}
        ended = Answer(client, server.model, stream, messages=CHAT, max_tokens=12, extra_body=extra, **options)
        assert (ended.finish_reason, ended.content, ended.calls) == ("stop", "", [])
        assert ended.thought
        assert first.thought.startswith(ended.thought)


@pytest.mark.parametrize("stream", [False, True])
def test_without_a_thought_all_is_content(client: OpenAI, server: Server, stream: bool) -> None:
    extra = {"ignore_eos": True, "chat_template_kwargs": NO_THOUGHT}
    answer = Answer(client, server.model, stream, messages=CHAT, max_tokens=12, extra_body=extra)
    assert (answer.thought, answer.finish_reason, len(answer.tokens)) == ("", "length", 12)
    assert answer.content


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Temperatures of the coming days.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
MEAN = {
    "type": "function",
    "function": {
        "name": "mean",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 2},
            },
            "required": ["numbers"],
        },
    },
}


def weather(city: str, days: int) -> object:
    return {"city": city, "temperatures": list(range(days))}


def mean(numbers: list[int]) -> object:
    return sum(numbers) / len(numbers)


FUNCTIONS: dict[str, Callable[..., object]] = {"weather": weather, "mean": mean}


def conversation(client: OpenAI, model: str, stream: bool) -> Iterator[Answer]:
    """Two calls that are forced and executed, and the answer to their results."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You forecast the weather for those who ask."},
        {"role": "user", "content": "How warm will it be?"},
    ]
    for name in (*FUNCTIONS, None):
        choice = {"type": "function", "function": {"name": name}} if name else "auto"
        options: dict[str, Any] = {"tools": [WEATHER, MEAN], "tool_choice": choice, "max_tokens": 150 if name else 12}
        extra = {"chat_template_kwargs": NO_THOUGHT, "ignore_eos": name is None}
        answer = Answer(client, model, stream, messages=messages, extra_body=extra, **options)
        yield answer
        messages.append({"role": "assistant", "content": answer.content, "tool_calls": answer.calls})
        for call in answer.calls:
            function = call["function"]
            result = FUNCTIONS[function["name"]](**json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})


def test_a_conversation_with_tools(client: OpenAI, server: Server) -> None:
    whole = list(conversation(client, server.model, stream=False))
    for answer, (name, arguments) in zip(whole, (("weather", ["city", "days"]), ("mean", ["numbers"])), strict=False):
        (call,) = answer.calls
        assert (call["function"]["name"], list(json.loads(call["function"]["arguments"]))) == (name, arguments)
        assert (answer.finish_reason, answer.content, answer.thought) == ("tool_calls", "", "")
    assert whole[2].content
    assert (whole[2].finish_reason, whole[2].calls) == ("length", [])
    assert [answer.usage.prompt_tokens_details.cached_tokens > 0 for answer in whole] == [False, True, True]
    assert whole[0].usage.prompt_tokens < whole[1].usage.prompt_tokens < whole[2].usage.prompt_tokens

    streamed = list(conversation(client, server.model, stream=True))
    assert [answer.seen for answer in streamed] == [answer.seen for answer in whole]
    assert all(answer.usage.prompt_tokens_details.cached_tokens > 0 for answer in streamed)
