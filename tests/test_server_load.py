"""A server under many clients: each gets its own answer, and those that hang up leave nothing behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from greedy import assert_equal_but_for_ties, clear_continuation
from harness import FIRST_TEXT_TOKEN, Prompt
from openai import AsyncOpenAI
from reference import Reference
from server import CHUNK, MAX_BATCH_SIZE, Server, wait_for

HANG_UPS = 200
AT_ONCE = 50
"""Clients that stream at a time, of those that hang up."""


async def stream(client: AsyncOpenAI, options: dict[str, Any]) -> tuple[str, Prompt]:
    """Text and tokens of a streamed completion."""
    text, tokens = "", Prompt()
    async for chunk in await client.completions.create(stream=True, **options):
        text += chunk.choices[0].text
        tokens += getattr(chunk.choices[0], "token_ids", None) or []
    return text, tokens


async def complete(client: AsyncOpenAI, options: dict[str, Any]) -> tuple[str, Prompt]:
    """Text and tokens of a completion in one piece."""
    choice: Any = (await client.completions.create(**options)).choices[0]
    return choice.text, choice.token_ids


def mixed_requests(model: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Greedy requests of 1 to 300 prompt tokens and 1 to 12 new ones; some end at an end token, some have logprobs."""
    requests = []
    for index in range(MAX_BATCH_SIZE):
        prompt = rng.integers(FIRST_TEXT_TOKEN, 500, size=rng.integers(1, 300 if index % 8 == 0 else 60)).tolist()
        options: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": int(rng.integers(1, 13))}
        extra = {"ignore_eos": index % 3 != 0, "return_token_ids": True}
        if index % 5 == 0:
            options["logprobs"] = 2
        requests.append(options | {"temperature": 0, "extra_body": extra})
    return requests


def test_each_of_many_concurrent_clients_gets_the_answer_that_it_gets_alone(
    server: Server, steady_reference: Reference, rng: np.random.Generator
) -> None:
    requests = mixed_requests(server.model, rng)
    ways: list[Callable[..., Any]] = [stream if index % 2 else complete for index in range(len(requests))]

    async def run() -> tuple[list[Any], list[Any]]:
        async with server.async_client() as client:
            alone = [await way(client, options) for way, options in zip(ways, requests, strict=True)]
            httpx.post(f"{server.address}/reset_prefix_cache").raise_for_status()
            together = await asyncio.gather(*map(lambda way, options: way(client, options), ways, requests))
        return alone, together

    for options, (text, tokens), (want, want_tokens) in zip(requests, *asyncio.run(run()), strict=True):
        assert len(want_tokens) >= 1
        assert_equal_but_for_ties(steady_reference, options["prompt"], tokens, want_tokens)
        assert text == want or tokens != want_tokens


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

    def idle() -> bool:
        seconds_of_a_short_answer()  # the server counts its cache blocks when it does something
        return all(server.metric(f"maxserve_{name}") == 0 for name in ("num_requests_running", "cache_num_used_blocks"))

    def settled() -> tuple[float, float, float]:
        """Memory in MiB, cache blocks and the least seconds of a short answer, once nothing runs any more."""
        wait_for(idle, 120, "requests to end and give their cache blocks back")
        blocks = server.metric("maxserve_cache_num_used_blocks")
        return server.resident_mib(), blocks, min(seconds_of_a_short_answer() for _ in range(7))

    asyncio.run(hang_up_all(AT_ONCE))  # the first load has the allocators and pools take what they then keep
    memory, blocks, seconds = settled()
    steps = server.metric("maxserve_batch_size_sum", "TG")
    asyncio.run(hang_up_all(HANG_UPS))
    memory_after, blocks_after, seconds_after = settled()
    generated = server.metric("maxserve_batch_size_sum", "TG") - steps
    record_property(f"resident MiB before and after {HANG_UPS} hang-ups", f"{memory:.0f}, {memory_after:.0f}")
    record_property("cache blocks used", f"{blocks:.0f}, {blocks_after:.0f}")
    record_property("least ms of a short answer", f"{1e3 * seconds:.0f}, {1e3 * seconds_after:.0f}")
    record_property("tokens generated of those asked for", f"{generated:.0f} of {sum(choices) * 400}")
    assert generated < sum(choices) * 400 / 4, "requests went on without their clients"
    assert memory_after < memory + 64
    assert seconds_after < 2 * seconds + 0.05
