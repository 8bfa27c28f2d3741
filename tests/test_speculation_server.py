"""Speculation under `max serve`: what a plain server answers, with acceptance by depth in the log and in `/metrics`."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import STEADY_SEED
from greedy import assert_equal_but_for_ties
from harness import FIRST_TEXT_TOKEN, Prompt, silence_unknown
from openai import AsyncOpenAI
from reference import Reference
from safetensors.numpy import load_file, save_file
from server import CHUNK, LONG_FORM, Server, wait_for

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.writer import write_random_checkpoint

AGREEMENT = 0.7
ALWAYS = [{"batch_start": 1, "batch_end": 64, "num_tokens": 3}]
COMMON = (*LONG_FORM, "--host", "127.0.0.1")
DRAFTING = (*COMMON, "--speculative-method", "mtp", "--num-speculative-tokens", "3")
CACHING = ("--enable-prefix-caching",)
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
NO_THOUGHT = {"chat_template_kwargs": {"enable_thinking": False}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}


class ChattyServer(Server):
    """A server that logs every batch."""

    def environment(self) -> dict[str, str]:
        return super().environment() | {"MAX_SERVE_SCHEDULER_STATS_LOG_INTERVAL_S": "0"}


@pytest.fixture(scope="module")
def predictable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tiny` checkpoint whose drafts are right more often than not, and whose best token the tokenizer knows."""
    folder = tmp_path_factory.mktemp("predictable") / "tiny"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.FLOAT32, STEADY_SEED, predictable=AGREEMENT)
    silence_unknown(folder)
    return folder


@pytest.fixture(scope="module")
def reference(predictable: Path) -> Reference:
    return Reference.from_checkpoint(predictable)


@pytest.fixture(scope="module")
def servers(predictable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """The same checkpoint served plainly and with drafts in every step."""
    schedule = ("--num-speculative-tokens-per-batch-size", json.dumps(ALWAYS))
    plain = Server(predictable, tmp_path_factory.mktemp("plain"), (*COMMON, *CACHING))
    drafting = ChattyServer(predictable, tmp_path_factory.mktemp("drafting"), (*DRAFTING, *schedule, *CACHING))
    with plain, drafting:
        yield plain, drafting


@pytest.fixture
def plain(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def drafting(servers: tuple[Server, Server]) -> Server:
    return servers[1]


def complete(server: Server, prompt: Prompt | str, max_tokens: int, **options: Any) -> Any:
    """A greedy completion."""
    return server.client().completions.create(
        model=server.model, prompt=prompt, max_tokens=max_tokens, **GREEDY | options
    )


def tokens_of(answer: Any) -> Prompt:
    tokens: Prompt = answer.choices[0].token_ids
    return tokens


def acceptance_metrics(server: Server) -> dict[int, tuple[float, float]]:
    """Sum and number of the acceptance rates, in percent, that `/metrics` holds of each depth."""
    text = httpx.get(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60).text
    found: dict[int, dict[str, float]] = {}
    line = r'^maxserve_spec_decode_acceptance_rate_per_position\w*_(sum|count){.*position="(\d)".*} (\S+)$'
    for kind, position, value in re.findall(line, text, re.MULTILINE):
        found.setdefault(int(position), {})[kind] = float(value)
    return {position: (values["sum"], values["count"]) for position, values in found.items()}


def test_metrics_and_log_show_acceptance_by_depth(drafting: Server, rng: np.random.Generator) -> None:
    prompt = rng.integers(FIRST_TEXT_TOKEN, 500, size=20).tolist()
    assert len(tokens_of(complete(drafting, prompt, 120))) == 120
    wait_for(lambda: len(acceptance_metrics(drafting)) == 3, 20, "acceptance of three depths in /metrics")
    rates = [total / count for _, (total, count) in sorted(acceptance_metrics(drafting).items())]
    assert 30 < rates[0] < 100  # over all requests so far; one request's may be far from AGREEMENT
    assert rates[0] >= rates[1] >= rates[2] > 0
    clauses = re.findall(
        r"Draft Tokens: (\d+)/(\d+) .*Per-Pos: \[p0=(\d+)%, p1=(\d+)%, p2=(\d+)%\]", drafting.log.read_text()
    )
    assert len(clauses) >= 20, "hardly a batch whose acceptance was logged"
    for accepted, drafted, *by_depth in clauses:
        assert 0 <= int(accepted) <= int(drafted)
        assert [int(rate) for rate in by_depth] == sorted(map(int, by_depth), reverse=True)
    logged = sum(int(accepted) for accepted, *_ in clauses) / sum(int(drafted) for _, drafted, *_ in clauses)
    assert 0.2 < logged < 1


def test_many_clients_get_the_plain_servers_answers_beside_clients_that_hang_up(
    plain: Server, drafting: Server, reference: Reference, rng: np.random.Generator
) -> None:
    prompts = [rng.integers(FIRST_TEXT_TOKEN, 500, size=size).tolist() for size in rng.integers(1, 200, size=12)]
    want = [tokens_of(complete(plain, prompt, 40)) for prompt in prompts]

    async def hang_up(client: AsyncOpenAI, prompt: Prompt) -> None:
        stream = await client.completions.create(
            model=drafting.model, prompt=[*prompt, 17], max_tokens=400, stream=True, **GREEDY
        )
        async for _ in stream:
            break
        await stream.close()

    async def run() -> list[Any]:
        async with drafting.async_client() as client:
            asked = [
                client.completions.create(model=drafting.model, prompt=prompt, max_tokens=40, **GREEDY)
                for prompt in prompts
            ]
            answers = await asyncio.gather(*asked, *(hang_up(client, prompt) for prompt in prompts))
        return answers[: len(prompts)]

    for prompt, answer, tokens in zip(prompts, asyncio.run(run()), want, strict=True):
        assert_equal_but_for_ties(reference, prompt, tokens_of(answer), tokens)

    def idle() -> bool:
        complete(drafting, [20], 1)  # the server counts when it does something, and tells a little later
        time.sleep(0.5)
        return all(
            drafting.metric(f"maxserve_{name}") == 0 for name in ("num_requests_running", "cache_num_used_blocks")
        )

    wait_for(idle, 120, "requests without clients to end and give their cache blocks back")


def test_an_answer_ends_before_the_stop_string_among_drafts(
    plain: Server, drafting: Server, rng: np.random.Generator
) -> None:
    stopped = 0
    for _ in range(4):
        prompt = rng.integers(FIRST_TEXT_TOKEN, 500, size=30).tolist()
        text = complete(plain, prompt, 60).choices[0].text
        for length, at in ((1, 11), (2, 22), (3, 33)):
            stop = text[at : at + length]
            if len(stop) < length or "\N{REPLACEMENT CHARACTER}" in stop:
                continue
            stopped += 1
            answers = [complete(server, prompt, 60, stop=[stop]).choices[0] for server in (plain, drafting)]
            assert {answer.text for answer in answers} == {text[: text.index(stop)]}
            assert {answer.finish_reason for answer in answers} == {"stop"}
            chunks = list(complete(drafting, prompt, 60, stop=[stop], stream=True))
            assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert stopped > 3


def test_cached_prefixes_and_prompts_in_pieces_change_no_token(
    plain: Server, drafting: Server, reference: Reference, rng: np.random.Generator
) -> None:
    first = rng.integers(FIRST_TEXT_TOKEN, 500, size=2 * CHUNK + 60).tolist()
    forked = first[: 2 * CHUNK] + rng.integers(FIRST_TEXT_TOKEN, 500, size=30).tolist()
    httpx.post(f"{drafting.address}/reset_prefix_cache").raise_for_status()
    cached = []
    for prompt in (first, first, forked):
        answer = complete(drafting, prompt, 30)
        assert_equal_but_for_ties(reference, prompt, tokens_of(answer), tokens_of(complete(plain, prompt, 30)))
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 2 * CHUNK, 2 * CHUNK]


def test_forced_calls_and_response_formats_hold_beside_requests_that_draft(
    plain: Server, drafting: Server, reference: Reference, rng: np.random.Generator
) -> None:
    named: dict[str, Any] = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    common: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "temperature": 1}
    forms: list[dict[str, Any]] = [named, {"response_format": SCHEMA}] * 2
    forced = [common | form | {"seed": seed, "extra_body": NO_THOUGHT} for seed, form in enumerate(forms, start=1)]
    prompts = [rng.integers(FIRST_TEXT_TOKEN, 500, size=25).tolist() for _ in range(3)]

    async def run(server: Server) -> list[Any]:
        async with server.async_client() as client:
            return await asyncio.gather(
                *(client.chat.completions.create(model=server.model, **options) for options in forced),
                *(
                    client.completions.create(model=server.model, prompt=prompt, max_tokens=60, **GREEDY)
                    for prompt in prompts
                ),
            )

    before = acceptance_metrics(drafting)[0][1]
    got, want = asyncio.run(run(drafting)), asyncio.run(run(plain))
    assert acceptance_metrics(drafting)[0][1] > before
    equal = 0
    for index, (answer, other) in enumerate(zip(got, want, strict=True)):
        if index >= len(forced):
            prompt = prompts[index - len(forced)]
            assert_equal_but_for_ties(reference, prompt, tokens_of(answer), tokens_of(other))
            continue
        messages = [choice.choices[0].message for choice in (answer, other)]
        if "tools" in forced[index]:
            texts = [message.tool_calls[0].function.arguments for message in messages]
        else:
            texts = [message.content for message in messages]
        assert all(isinstance(json.loads(text)["city"], str) for text in texts)
        equal += texts[0] == texts[1]
    # Servers batch by chance, and so do sums round: now and then a draw at temperature 1 falls between two tokens.
    assert equal >= len(forced) - 1


def test_a_checkpoint_with_fewer_mtp_layers_says_so_and_runs_with_what_it_has(
    predictable: Path, plain: Server, reference: Reference, tmp_path: Path, rng: np.random.Generator
) -> None:
    prompt = rng.integers(FIRST_TEXT_TOKEN, 500, size=30).tolist()
    want = tokens_of(complete(plain, prompt, 60))
    with ExitStack() as stack:
        started = {}
        for layers in (0, 1):
            folder = tmp_path / str(layers)
            checkpoint = with_mtp_layers(predictable, folder / "checkpoint", layers)
            started[layers] = ChattyServer(checkpoint, folder, DRAFTING)
            stack.callback(started[layers].__exit__)
        for layers, does in ((0, "Running without speculation."), (1, "Drafting 1 deep.")):
            with started[layers] as server:
                answer = complete(server, prompt, 60)
                log = server.log.read_text()
                message = f"found 3, but the checkpoint has {layers} MTP layers that could draft. {does}"
                assert log.count(message) == 1
                assert ("Per-Pos: [p0=" in log) == (layers > 0)
                assert "p1=" not in log
            assert_equal_but_for_ties(reference, prompt, tokens_of(answer), want)


def with_mtp_layers(source: Path, folder: Path, count: int) -> Path:
    """A copy of a checkpoint with the tensors of only the first `count` MTP layers."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    model = parse_model_config(json.loads((source / "config.json").read_text()))
    left_out = tuple(f"model.layers.{layer.index}." for layer in model.mtp_layers[count:])
    tensors = {name: array for path in sorted(source.glob("*.safetensors")) for name, array in load_file(path).items()}
    kept = {name: array for name, array in tensors.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
