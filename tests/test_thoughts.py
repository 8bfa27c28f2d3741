"""Thoughts stay thoughts in answers that have nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from max.pipelines.context import GenerationStatus
from max.serve.pipelines.llm import TokenGeneratorOutput
from max.serve.schemas.openai import CreateChatCompletionResponse

from step3p5.thoughts import SAID, Said, keep_thought, taken_down

CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def answered(finish_reason: str, **message: Any) -> CreateChatCompletionResponse:
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant"} | message}
    fields = {"id": "1", "created": 0, "model": "m", "object": "chat.completion", "choices": [choice]}
    return CreateChatCompletionResponse.model_validate(fields)


@pytest.mark.parametrize(
    ("said", "message", "finish_reason"),
    [
        (Said(["h", "m"], [""]), {"content": "hm"}, "stop"),
        (Said(["hm"], ["", "\n"]), {"content": "hm"}, "stop"),
        (Said(["hm"], ["STOP!"]), {"content": "hm"}, "stop"),
        (Said(["hm"], []), {"content": "", "tool_calls": [CALL]}, "tool_calls"),
        (Said(["hm"], []), {"content": "", "reasoning_content": "hm"}, "length"),
    ],
)
def test_a_thought_without_an_answer_is_no_content(said: Said, message: dict[str, Any], finish_reason: str) -> None:
    answer = answered(finish_reason, **message)
    keep_thought(answer, said, ["STOP"])
    (choice,) = answer.choices
    assert choice.message.reasoning_content == "hm"
    assert (choice.message.content or "").strip() == ""
    assert choice.message.tool_calls is None
    assert choice.finish_reason == ("length" if finish_reason == "length" else "stop")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Said(["hm"], ["so"]), {"content": "so", "reasoning_content": "hm"}),
        (Said([""], ["so"]), {"content": "so"}),
        (Said([], []), {"content": ""}),
        (Said(["hm"], ["<tool_call>…"]), {"content": "", "reasoning_content": "hm", "tool_calls": [CALL]}),
    ],
)
def test_other_answers_are_left_as_they_are(said: Said, message: dict[str, Any]) -> None:
    answer, same = answered("stop", **message), answered("stop", **message)
    keep_thought(answer, said, ["STOP"])
    assert answer == same


def test_each_request_is_taken_down_for_itself() -> None:
    async def ask(text: str) -> AsyncGenerator[TokenGeneratorOutput]:
        async def chunks() -> AsyncGenerator[TokenGeneratorOutput]:
            for letter in text:
                await asyncio.sleep(0)
                yield TokenGeneratorOutput(GenerationStatus.ACTIVE, decoded_tokens=letter, decoded_reasoning_tokens="h")

        return chunks()

    async def answer(text: str) -> Said:
        said = Said()
        SAID.set(said)
        assert "".join([chunk.decoded_tokens or "" async for chunk in await taken_down(ask)(text)]) == text
        return said

    async def run() -> Sequence[Said]:
        assert [chunk async for chunk in await taken_down(ask)("nobody listens")]
        return list(await asyncio.gather(answer("one"), answer("two")))

    assert asyncio.run(run()) == [Said(["h"] * 3, list("one")), Said(["h"] * 3, list("two"))]
