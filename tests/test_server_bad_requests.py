"""What a server answers to requests that are wrong: a 4xx that names the field, and nothing to anyone else."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from max.serve.schemas.openai import CreateChatCompletionRequest, CreateCompletionRequest
from server import MAX_LENGTH, Server

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "look_up"}}
BAD_TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "poem"}}}
TEXT_OF_10_MB = "ten million characters, or so ".ljust(40) * 250_000


def schema_of(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"prompt": []}, "prompt: found an empty list"),
    (COMPLETION, {"prompt": ""}, "prompt: found nothing"),
    (COMPLETION, {"prompt": [5, -1]}, "prompt[1]: found token -1"),
    (COMPLETION, {"prompt": [20] * (MAX_LENGTH + 1)}, f"Prompt is too long: {MAX_LENGTH + 1} tokens"),
    (COMPLETION, {"prompt": TEXT_OF_10_MB}, "prompt: found 10000000 characters"),
    (COMPLETION, {"prompt": ["a", "b"], "stream": True}, "prompt: found 2 prompts with stream"),
    (COMPLETION, {"max_tokens": 0}, "max_tokens: found 0"),
    (COMPLETION, {"max_tokens": True}, "max_tokens: found true"),
    (COMPLETION, {"max_tokens": "many"}, "max_tokens"),
    (COMPLETION, {"min_tokens": 3}, "min_tokens: found 3"),
    (COMPLETION, {"presence_penalty": 0.5}, "presence_penalty, repetition_penalty: found 0.0, 0.5, 1.0"),
    (COMPLETION, {"temperature": float("nan")}, "temperature: found nan"),
    (COMPLETION, {"temperature": -0.5}, "temperature: found -0.5"),
    (COMPLETION, {"top_p": 1.5}, "top_p: found 1.5"),
    (COMPLETION, {"top_k": -2}, "top_k: found -2"),
    (COMPLETION, {"min_p": -1}, "min_p: found -1"),
    (COMPLETION, {"repetition_penalty": 0}, "repetition_penalty: found 0"),
    (COMPLETION, {"seed": 2**63}, f"seed: found {2**63}"),
    (COMPLETION, {"stop": [1]}, "stop"),
    (COMPLETION, {"stop": 1}, "stop"),
    (COMPLETION, {"stream": "perhaps"}, "stream"),
    (COMPLETION, {"logprobs": 100}, "`logprobs` must be in [0, 7]"),
    (COMPLETION, {"echo": True, "logprobs": 1}, "echo: found true"),
    (COMPLETION, {"n": 0}, "n: found 0"),
    (COMPLETION, {"n": "2"}, "n: found '2'"),
    (COMPLETION, {"n": 2, "top_k": "all"}, "top_k"),
    (COMPLETION, {"best_of": 3}, "best_of: found 3"),
    (COMPLETION, {"suffix": "the end"}, "suffix: found 'the end'"),
    (COMPLETION, {"max_tokns": 5}, "max_tokns"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "nobody", "content": "hi"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, "prompt: found nothing"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 1000}]}, "Prompt is too long"),
    (CHAT, {"messages": [{"role": "user", "content": TEXT_OF_10_MB}]}, "prompt: found 1000"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens: found -1"),
    (CHAT, {"n": 3, "stream": True, "messages": []}, "messages"),
    (CHAT, {"frequency_penalty": 3}, "frequency_penalty: found 3"),
    (CHAT, {"logprobs": True, "top_logprobs": 20}, "`top_logprobs` must be in [0, 7]"),
    (CHAT, {"logit_bias": {"5": 100}}, "logit_bias: found {'5': 100}"),
    (CHAT, {"response_format": {"type": "poem"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema: found"),
    (CHAT, {"response_format": schema_of({"type": "poem"})}, "response_format: found a schema that cannot be enforced"),
    (CHAT, {"response_format": schema_of({"pattern": "("}), "stream": True}, "response_format: found a schema"),
    (CHAT, {"response_format": schema_of({"$ref": "#/nowhere"}), "n": 2}, "response_format: found a schema"),
    (CHAT, {"tools": [BAD_TOOL], "tool_choice": "required"}, "tools: found a schema that cannot be enforced"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tool function name: 'no spaces'"),
    (CHAT, {"tool_choice": "required"}, "tool_choice: found 'required' (str) without tools"),
    (
        CHAT,
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}},
        "tool_choice.function.name: found 'look'",
    ),
]

BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "request body: found no valid JSON"),
    (b'{"model": "x", ', "request body: found no valid JSON"),
    (b'{"prompt": "\xff\xfe"}', "request body: found byte 0xff at position 12, expected UTF-8"),
    (b"[1, 2]", "request body: found a list"),
    (b"null", "request body: found a NoneType"),
    (b"[" * 100_000, "request body: found JSON nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "request body: found no valid JSON"),
]

FIELDS = {
    COMPLETION: sorted(CreateCompletionRequest.model_fields),
    CHAT: sorted(CreateChatCompletionRequest.model_fields),
}

ODD_VALUES: list[Any] = [None, True, -1, 0, 1, 2, 7, 2**31, 2**63 - 1, 1e308, 0.3, "", "x", "\ud83d", [], ["x"], [0]]
ODD_VALUES += [[[1, 2]], {}, {"type": "function"}, {"type": "json_object"}, [TOOL], ["\x00"], {"a": {"b": []}}]


def body(server: Server, path: str, **fields: Any) -> bytes:
    """A short greedy request with `fields` over its own."""
    what = {"prompt": "Once"} if path == COMPLETION else {"messages": [{"role": "user", "content": "Hi"}]}
    return json.dumps({"model": server.model, "max_tokens": 4, "temperature": 0} | what | fields).encode()


def bad_requests(server: Server) -> list[tuple[str, bytes, str]]:
    """Path, body and what the answer must say, of every bad request."""
    fields = [(path, body(server, path, **bad), says) for path, bad, says in BAD_FIELDS]
    return fields + [(path, bad, says) for path in (COMPLETION, CHAT) for bad, says in BAD_BODIES]


def test_a_bad_request_is_answered_with_the_name_of_its_field(server: Server) -> None:
    with httpx.Client(base_url=server.address, timeout=120) as client:
        for path, content, says in bad_requests(server):
            answer = client.post(path, content=content)
            assert answer.status_code == 400, (says, answer.status_code, answer.text)
            error = answer.json()["error"]
            assert says in error["message"], (says, error)
            assert error["type"] == "invalid_request_error"


def test_the_openai_client_sees_an_unknown_model_as_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match=r"model: found 'gpt-4' \(str\), expected"):
        server.client().completions.create(model="gpt-4", prompt="Once")


def test_bad_requests_disturb_no_other_client(server: Server) -> None:
    options: dict[str, Any] = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 80}
    options |= {"temperature": 0, "extra_body": {"ignore_eos": True}}
    alone = server.client().completions.create(**options).choices[0].text
    texts, statuses = list[str](), set[int]()

    async def run() -> None:
        async with server.async_client() as client, httpx.AsyncClient(base_url=server.address, timeout=120) as other:

            async def stream() -> None:
                while True:
                    chunks = [chunk async for chunk in await client.completions.create(stream=True, **options)]
                    texts.append("".join(chunk.choices[0].text for chunk in chunks))

            streaming = asyncio.create_task(stream())
            for path, content, _ in bad_requests(server):
                statuses.add((await other.post(path, content=content)).status_code)
            while not texts and not streaming.done():
                await asyncio.sleep(0.1)
            streaming.cancel()
            with suppress(asyncio.CancelledError):
                await streaming

    asyncio.run(run())
    assert set(texts) == {alone}
    assert statuses == {400}


def test_no_mixture_of_odd_values_ends_the_server(server: Server, rng: np.random.Generator) -> None:
    with httpx.Client(base_url=server.address, timeout=120) as client:
        for _ in range(300):
            path = (COMPLETION, CHAT)[rng.integers(2)]
            chosen = rng.choice(FIELDS[path], size=rng.integers(1, 4), replace=False)
            fields = {str(name): ODD_VALUES[rng.integers(len(ODD_VALUES))] for name in chosen}
            answer = client.post(path, content=body(server, path, **fields))
            assert answer.status_code < 500, (fields, answer.text)
        for path in FIELDS:
            assert client.post(path, content=body(server, path)).status_code == 200
