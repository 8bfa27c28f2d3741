"""`tool_choice`, `response_format` and thinking on a real server: grammars force a random model into form, on a CPU."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from harness import edit_head
from server import Server

THINKING_OFF = {"chat_template_kwargs": {"enable_thinking": False}}
MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"$ref": "#/$defs/Unit"},
                "exact": {"type": "boolean"},
            },
            "required": ["city", "days", "unit", "exact"],
            "$defs": {"Unit": {"enum": ["C", "F"]}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = {"tools": [WEATHER, NOW]}
NAMED = {"type": "function", "function": {"name": "weather"}}
ANSWER = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "unit": {"enum": ["C", "F"]}},
    "required": ["n", "unit"],
    "additionalProperties": False,
}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER}}}

SEEDS = range(1, 60)
"""MAX takes seed 0 for none."""


@pytest.fixture(scope="module")
def talker(steady: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`steady`, with the logit of `</think>` twice as wide: most thoughts end, at places that vary."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    shutil.copytree(steady, folder)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    (think_end_id,) = (token["id"] for token in added if token["content"] == "</think>")

    def widen(head: npt.NDArray[np.float32]) -> None:
        head[think_end_id] *= 2

    edit_head(folder, widen)
    return folder


@pytest.fixture(scope="module")
def address(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server on `talker`, with no flag about parsers."""
    with Server(talker, tmp_path_factory.mktemp("server")) as running:
        yield running.address


def chat(address: str, **options: Any) -> Any:
    """The only choice of a response, streamed ones put together."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = {"model": model, "messages": MESSAGES, "max_tokens": 300, **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        if not options.get("stream"):
            return json.load(response)["choices"][0]
        return put_together(line.decode().removeprefix("data: ") for line in response if line.startswith(b"data: {"))


def put_together(chunks: Iterator[str]) -> Any:
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish_reason = None
    for chunk in chunks:
        for choice in json.loads(chunk)["choices"]:
            delta = choice["delta"]
            finish_reason = choice.get("finish_reason") or finish_reason
            for text in ("content", "reasoning_content"):
                message[text] += delta.get(text) or ""
            for call in delta.get("tool_calls") or []:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append(call)
    return {"message": message, "finish_reason": finish_reason}


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    calls = [call["function"] for call in choice["message"]["tool_calls"] or []]
    return [(call["name"], json.loads(call["arguments"])) for call in calls]


def assert_weather(arguments: Any) -> None:
    assert list(arguments) == ["city", "days", "unit", "exact"]
    assert isinstance(arguments["city"], str)
    assert arguments["days"] in range(1, 10)
    assert arguments["unit"] in ("C", "F")
    assert isinstance(arguments["exact"], bool)


def thinking_choice(address: str, **options: Any) -> tuple[int, Any]:
    """The first seed with a thought that is not empty and that something follows, and what came of it."""
    for seed in SEEDS:
        choice = chat(address, seed=seed, **options)
        message = choice["message"]
        if message["reasoning_content"] and (message["content"] or message["tool_calls"]):
            return seed, choice
    raise AssertionError(f"no thought ended: seeds {SEEDS}")


@pytest.mark.parametrize("seed", [1, 2])
def test_required_forces_well_formed_calls(address: str, seed: int) -> None:
    choice = chat(address, tool_choice="required", seed=seed, **TOOLS, **THINKING_OFF)
    if choice["finish_reason"] == "length":  # more calls than there is room for: those that are complete count
        choice["message"]["content"] = ""
    calls = calls_of(choice)
    assert calls
    assert not choice["message"]["content"]
    for name, arguments in calls:
        if name == "weather":
            assert_weather(arguments)
        else:
            assert (name, arguments) == ("now", {})


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_function_is_called_once(address: str, seed: int) -> None:
    options: dict[str, Any] = {"tool_choice": NAMED, "seed": seed, **TOOLS, **THINKING_OFF}
    whole, streamed = chat(address, **options), chat(address, stream=True, **options)
    ((name, arguments),) = calls_of(whole)
    assert name == "weather"
    assert_weather(arguments)
    assert calls_of(streamed) == calls_of(whole)
    assert whole["finish_reason"] == streamed["finish_reason"] == "tool_calls"
    assert not whole["message"]["content"]
    assert not streamed["message"]["content"]


def test_a_forced_call_follows_the_thought(address: str) -> None:
    _, choice = thinking_choice(address, tool_choice=NAMED, **TOOLS)
    ((_, arguments),) = calls_of(choice)
    assert_weather(arguments)
    assert "<tool_call>\n<function=weather>" not in choice["message"]["reasoning_content"]


@pytest.mark.parametrize("tool_choice", ["auto", "none"])
def test_other_choices_leave_the_model_alone(address: str, tool_choice: str) -> None:
    options = {"max_tokens": 20, "ignore_eos": True}
    message = chat(address, tool_choice=tool_choice, seed=1, **options, **TOOLS, **THINKING_OFF)["message"]
    assert message["content"] or message["reasoning_content"]
    assert not message["tool_calls"]


def test_a_response_format_holds_without_thinking(address: str) -> None:
    for seed in (1, 2):
        answer = json.loads(chat(address, seed=seed, **FORMAT, **THINKING_OFF)["message"]["content"])
        assert answer["n"] in range(100)
        assert answer["unit"] in ("C", "F")


def test_a_response_format_holds_after_the_thought_only(address: str) -> None:
    seed, choice = thinking_choice(address, **FORMAT)
    message = choice["message"]
    answer = json.loads(message["content"])
    assert answer["n"] in range(100)
    assert answer["unit"] in ("C", "F")
    with pytest.raises(json.JSONDecodeError):
        json.loads(message["reasoning_content"])
    streamed = chat(address, seed=seed, stream=True, **FORMAT)["message"]
    assert streamed["reasoning_content"] == message["reasoning_content"]
    assert streamed["content"] == message["content"]


def test_a_response_format_and_tools_leave_the_choice(address: str) -> None:
    for seed in (1, 2):
        choice = chat(address, seed=seed, **TOOLS, **FORMAT, **THINKING_OFF)
        if choice["message"]["tool_calls"]:
            assert {name for name, _ in calls_of(choice)} <= {"weather", "now"}
        else:
            assert json.loads(choice["message"]["content"])["unit"] in ("C", "F")
