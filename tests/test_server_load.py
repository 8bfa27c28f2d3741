"""A server under many clients: each gets its own answer, and those that hang up leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from greedy import assert_equal_but_for_ties, clear_continuation
from harness import FIRST_TEXT_TOKEN, Prompt
from openai import AsyncOpenAI
from reference import Reference
from server import CHUNK, MAX_BATCH_SIZE, Server, wait_for

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
        },
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
SCHEMA = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "unit", "schema": SCHEMA}}

HANG_UPS = 200
AT_ONCE = 50
"""Clients that stream at a time, of those that hang up."""


@dataclass
class Choice:
    """One choice of an answer, with all that a client sees of it but ids; `prompt` and `tokens` as token ids."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: Prompt = field(default_factory=list)
    tokens: Prompt = field(default_factory=list)

    def add(self, choice: Any) -> None:
        """Appends a piece of the answer, or all of it."""
        said = getattr(choice, "delta", None) or getattr(choice, "message", None)
        self.text += (said.content if said else choice.text) or ""
        self.thought += getattr(said, "reasoning_content", None) or ""
        functions = [call.function for call in getattr(said, "tool_calls", None) or ()]
        self.calls += [(function.name, function.arguments) for function in functions]
        self.finish_reason = choice.finish_reason or self.finish_reason
        self.prompt = getattr(choice, "prompt_token_ids", None) or self.prompt
        self.tokens += getattr(choice, "token_ids", None) or []


async def answer(client: AsyncOpenAI, options: dict[str, Any]) -> dict[int, Choice]:
    """The choices of an answer, streamed or not."""
    create: Any = (client.chat.completions if "messages" in options else client.completions).create
    got = await create(**options)
    pieces = [piece async for piece in got] if options.get("stream") else [got]
    choices = defaultdict[int, Choice](Choice)
    for choice in (choice for piece in pieces for choice in piece.choices):
        choices[choice.index].add(choice)
    return choices


def mixed_requests(model: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Greedy completions and chats of 1 to 300 prompt tokens, every other one streamed.

    Among them are such as end at an end token, at a stop string or within a thought, with log probabilities, with
    several choices, and with answers that a grammar forces into a call or a JSON schema.
    """
    ways: list[dict[str, Any]] = [{}, {"logprobs": 2}, {"stop": ["e", "th"]}, {"n": 2}]
    chats: list[dict[str, Any]] = [{"thinks": True}, {"logprobs": True, "top_logprobs": 2}, {"tools": [TOOL]}]
    chats += [{"tools": [TOOL], "tool_choice": NAMED, "max_tokens": 200}, {"response_format": FORMAT, "max_tokens": 60}]
    requests = []
    for index in range(MAX_BATCH_SIZE):
        options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": int(rng.integers(1, 13))}
        extra: dict[str, Any] = {"ignore_eos": index % 3 != 0, "return_token_ids": True}
        if index % 2:
            length = rng.integers(1, 300 if index % 8 == 1 else 60)
            options["prompt"] = rng.integers(FIRST_TEXT_TOKEN, 500, size=length).tolist()
            options |= ways[index // 2 % len(ways)]
        else:
            options["messages"] = [{"role": "user", "content": f"Tell me {index} times {index}."}]
            options |= chats[index // 2 % len(chats)]
            if not options.pop("thinks", False):
                extra["chat_template_kwargs"] = {"enable_thinking": False}
            if "tool_choice" in options or "response_format" in options:  # the grammar ends where it ends
                extra["ignore_eos"] = False
        requests.append(options | {"stream": index % 4 < 2, "extra_body": extra})
    return requests


def test_each_of_many_concurrent_clients_gets_the_answer_that_it_gets_alone(
    server: Server, steady_reference: Reference, rng: np.random.Generator
) -> None:
    requests = mixed_requests(server.model, rng)

    async def run() -> tuple[list[dict[int, Choice]], list[dict[int, Choice]]]:
        async with server.async_client() as client:
            alone = [await answer(client, options) for options in requests]
            httpx.post(f"{server.address}/reset_prefix_cache").raise_for_status()
            return alone, await asyncio.gather(*(answer(client, options) for options in requests))

    for options, alone, together in zip(requests, *asyncio.run(run()), strict=True):
        assert sorted(alone) == sorted(together) == list(range(options.get("n", 1)))
        for want, got in ((alone[index], together[index]) for index in alone):
            assert want.tokens
            assert want.prompt
            if "stop" in options:  # the server goes on until it hears of the stop string
                count = min(len(want.tokens), len(got.tokens))
                del want.tokens[count:], got.tokens[count:]
            if got != want:
                assert got.tokens != want.tokens, (options, got, want)
                assert_equal_but_for_ties(steady_reference, want.prompt, got.tokens, want.tokens)
            if "tool_choice" in options:
                ((name, arguments),) = got.calls
                assert (name, list(json.loads(arguments))) == ("weather", ["city"])
            if "response_format" in options:
                assert json.loads(got.text)["unit"] in ("C", "F")


def test_cached_prefixes_and_prompts_read_in_pieces_change_no_token(
    server: Server, steady_reference: Reference, rng: np.random.Generator
) -> None:
    first, first_tokens, _ = clear_continuation(steady_reference, rng, length=2 * CHUNK + 60, steps=3)
    second, second_tokens, _ = clear_continuation(steady_reference, rng, length=40, steps=3)
    longer = first[: 2 * CHUNK] + second
    client = server.client()

    def ask(prompt: Prompt) -> Any:
        extra = {"ignore_eos": True, "return_token_ids": True}
        return client.completions.create(
            model=server.model, prompt=prompt, max_tokens=3, temperature=0, extra_body=extra
        )

    httpx.post(f"{server.address}/reset_prefix_cache").raise_for_status()
    steps = server.metric("maxserve_batch_size_count", "CE")
    fresh = ask(first)
    wait_for(lambda: server.metric("maxserve_batch_size_count", "CE") >= steps + 3, 20, "three pieces of the prompt")
    again, forked = ask(first), ask(longer)
    assert fresh.choices[0].token_ids == again.choices[0].token_ids == first_tokens
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in (fresh, again, forked)] == [
        0,
        2 * CHUNK,
        2 * CHUNK,
    ]
    want: Prompt = []
    for _ in range(3):
        want.append(int(steady_reference.logits([*longer, *want])[-1].argmax()))
    assert_equal_but_for_ties(steady_reference, longer, forked.choices[0].token_ids, want)
    assert ask(second).choices[0].token_ids == second_tokens


def test_clients_that_hang_up_leave_no_memory_no_cache_blocks_and_no_delay(
    server: Server, record_property: Callable[[str, object], None]
) -> None:
    long = {"model": server.model, "max_tokens": 400, "temperature": 0, "stream": True, "ignore_eos": True}
    choices = [3 if index % 5 < 2 else 1 for index in range(HANG_UPS)]

    async def hang_up(client: httpx.AsyncClient, gate: asyncio.Semaphore, index: int) -> None:
        body = long | {"prompt": f"{index} bottles", "n": choices[index]}
        async with gate:
            if index % 5 == 0:  # waits for the whole answer, and loses patience
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.post("/v1/completions", json=body | {"stream": False}), 0.5)
                return
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        return  # closes the connection

    async def hang_up_all(count: int) -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(base_url=server.address, timeout=120, limits=httpx.Limits()) as client:
            await asyncio.gather(*(hang_up(client, gate, index) for index in range(count)))

    patient = server.client()

    def seconds_of_a_short_answer() -> float:
        start = time.perf_counter()
        patient.completions.create(model=server.model, prompt="Something short", max_tokens=8, temperature=0)
        return time.perf_counter() - start

    def in_use() -> list[float]:
        return [server.metric(f"maxserve_{name}") for name in ("num_requests_running", "cache_num_used_blocks")]

    def idle() -> bool:
        seconds_of_a_short_answer()  # the server counts its cache blocks when it does something, and tells after that
        deadline = time.monotonic() + 5
        while any(in_use()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return not any(in_use())

    def settled() -> tuple[float, float, float]:
        """Memory in MiB, cache blocks and the least seconds of a short answer, once nothing runs any more."""
        wait_for(idle, 240, "requests to end and give their cache blocks back")
        return server.resident_mib(), in_use()[1], min(seconds_of_a_short_answer() for _ in range(7))

    def least_seconds_again(seconds: float, enough: float) -> float:
        """The least seconds of a short answer: `seconds` so far, or fewer where others held the machine up then."""
        deadline = time.monotonic() + 60
        while seconds > enough and time.monotonic() < deadline:
            seconds = min(seconds, seconds_of_a_short_answer())
        return seconds

    asyncio.run(hang_up_all(AT_ONCE))  # the first load has the allocators and pools take what they then keep
    memory, blocks, seconds = settled()
    steps = server.metric("maxserve_batch_size_sum", "TG")
    asyncio.run(hang_up_all(HANG_UPS))
    memory_after, blocks_after, seconds_after = settled()
    seconds_after = least_seconds_again(seconds_after, enough=2 * seconds + 0.05)
    generated = server.metric("maxserve_batch_size_sum", "TG") - steps
    record_property(f"resident MiB before and after {HANG_UPS} hang-ups", f"{memory:.0f}, {memory_after:.0f}")
    record_property("cache blocks used", f"{blocks:.0f}, {blocks_after:.0f}")
    record_property("least ms of a short answer", f"{1e3 * seconds:.0f}, {1e3 * seconds_after:.0f}")
    record_property("tokens generated of those asked for", f"{generated:.0f} of {sum(choices) * 400}")
    assert generated < sum(choices) * 400 / 2, "requests went on without their clients"
    assert memory_after < memory + 64
    assert seconds_after < 2 * seconds + 0.05
