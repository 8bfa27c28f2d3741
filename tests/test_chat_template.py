"""The random checkpoints' chat template, rendered by transformers: each role, tools, calls and results, the switch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedConfig

from step3p5.parsers import Step3p5ToolParser
from step3p5.random_checkpoint.tokenizer import CONTROL_TOKENS, tokenizer_files

Message = dict[str, Any]

SYSTEM: Message = {"role": "system", "content": "Be brief."}
USER: Message = {"role": "user", "content": "Hi"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Wetter für <Städte>", "parameters": {"type": "object"}},
}
REPLY = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files(600, 1024).items():
        (folder / name).write_text(text)
    return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig())


def render(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert text.startswith(CONTROL_TOKENS[0])
    return text.removeprefix(CONTROL_TOKENS[0])


def calling(**arguments: object) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [call(**arguments)]}


def call(**arguments: object) -> Message:
    return {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def test_a_reply_begins_with_an_open_thought(tokenizer: Any) -> None:
    expected = f"<|im_start|>user\nHi<|im_end|>\n{REPLY}"
    assert render(tokenizer, [USER], add_generation_prompt=True) == expected
    assert render(tokenizer, [USER], add_generation_prompt=True, enable_thinking=True) == expected


def test_enable_thinking_off_closes_the_thought(tokenizer: Any) -> None:
    text = render(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    assert text == f"<|im_start|>user\nHi<|im_end|>\n{REPLY}\n</think>\n\n"


def test_system_messages(tokenizer: Any) -> None:
    later = {"role": "system", "content": "Be kind."}
    assert render(tokenizer, [SYSTEM, USER, later]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>system\nBe kind.<|im_end|>\n"
    )


def test_content_in_parts(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "We"}, {"type": "text", "text": "ather?"}]
    assert render(tokenizer, [{"role": "user", "content": parts}]) == "<|im_start|>user\nWeather?<|im_end|>\n"


def test_tools_are_listed_with_and_without_a_system_message(tokenizer: Any) -> None:
    alone, beside = render(tokenizer, [USER], tools=[TOOL]), render(tokenizer, [SYSTEM, USER], tools=[TOOL])
    assert f"<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>" in alone
    assert alone.startswith("<|im_start|>system\n# Tools\n")
    assert beside == alone.replace("system\n#", "system\nBe brief.\n\n#", 1)


def test_earlier_calls_and_their_results(tokenizer: Any) -> None:
    messages = [
        USER,
        {
            "role": "assistant",
            "reasoning_content": "Ask.",
            "content": "Wait.",
            "tool_calls": [call(city="Köln", days=2, exact=True, near=["Bonn"]), call()],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sun"}]},
        calling(city="Bonn"),
        {"role": "tool", "tool_call_id": "call_1", "content": "snow"},
    ]
    assert render(tokenizer, messages, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nAsk.\n</think>\nWait.<tool_call>\n<function=weather>\n"
        "<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        '<parameter=exact>\nTrue\n</parameter>\n<parameter=near>\n["Bonn"]\n</parameter>\n'
        "</function>\n</tool_call><tool_call>\n<function=weather>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>tool_response\n<tool_response>rain</tool_response><tool_response>sun</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n<function=weather>\n<parameter=city>\nBonn\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        f"<|im_start|>tool_response\n<tool_response>snow</tool_response><|im_end|>\n{REPLY}"
    )


def test_thoughts_before_the_last_user_message_are_left_out(tokenizer: Any) -> None:
    turn: Message = {"role": "assistant", "reasoning_content": "hm", "content": "so."}
    with_thought, without = "<think>\nhm\n</think>\nso.", "<|im_start|>assistant\nso."
    text = render(tokenizer, [USER, turn, USER, turn, turn])
    assert (text.count(with_thought), text.count(without)) == (2, 1)
    assert text.index(without) < text.index(with_thought)


@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\nso.", "hm</think>so.", "\nhm\n</think>\n\nso."])
def test_a_thought_within_the_content_is_told_apart(tokenizer: Any, content: str) -> None:
    turn: Message = {"role": "assistant", "content": content}
    assert "assistant\n<think>\nhm\n</think>\nso.<|im_end|>" in render(tokenizer, [USER, turn])
    assert "assistant\nso.<|im_end|>" in render(tokenizer, [turn, USER])


@pytest.mark.parametrize("arguments", ["", '{"city": "Bonn"}'])
def test_a_call_with_unparsed_arguments_keeps_their_text(tokenizer: Any, arguments: str) -> None:
    answer = calling()
    answer["tool_calls"][0]["function"]["arguments"] = arguments
    body = f"{arguments}\n" if arguments else ""
    expected = f"assistant\n<tool_call>\n<function=weather>\n{body}</function>\n</tool_call><|im_end|>"
    assert expected in render(tokenizer, [USER, answer])


def test_what_the_template_writes_the_tool_parser_reads(tokenizer: Any) -> None:
    arguments = {
        "string": " a <b> & </parameter>\n",
        "integer": -5,
        "number": 2.5e-7,
        "boolean": False,
        "null": None,
        "array": [1, "zwei", None],
        "object": {"x": {"y": [True]}},
    }
    parser = Step3p5ToolParser()
    parser.set_tool_schemas({"weather": {"properties": {name: {"type": name} for name in arguments}}})
    parsed = parser.parse_complete(render(tokenizer, [calling(**arguments)]))
    (parsed_call,) = parsed.tool_calls
    assert json.loads(parsed_call.arguments) == arguments


def test_an_unknown_role_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="message role is critic"):
        render(tokenizer, [{"role": "critic", "content": "no"}])
