"""A load of streaming clients on `/v1/completions`: what each waited for, token by token."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import numpy as np

TIMEOUT = 600
"""Seconds without a byte after which a request counts as failed."""


@dataclass(frozen=True)
class Quantiles:
    """How a measurement was spread over requests."""

    p50: float
    p95: float
    p99: float
    maximum: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles | None:
        """Summarises measurements; `None` if there are none."""
        if not samples:
            return None
        hundredths = statistics.quantiles(samples, n=100, method="inclusive") if len(samples) > 1 else [*samples] * 99
        return cls(hundredths[49], hundredths[94], hundredths[98], max(samples), len(samples))

    def text(self) -> str:
        """`p50 / p95 / p99` in milliseconds."""
        return " / ".join(f"{1e3 * value:.1f}" for value in (self.p50, self.p95, self.p99))


@dataclass
class Answer:
    """One request's fate; times by `time.perf_counter()`.

    `due` is when the request was to be sent, `arrivals` when each piece of the answer came; `error` says why it failed.
    """

    due: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Seconds between a piece and the next, which follow the steps of the server's decoding."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Workload:
    """What every client asks for: greedy completions of random prompts, past any end-of-text token.

    Attributes:
        model: The served name.
        prompt_tokens: Tokens of a prompt; drawn anew for each, so that no cached prefix helps.
        new_tokens: Tokens of an answer.
        num_token_ids: Prompts are drawn from the ids below it.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    num_token_ids: int

    def body(self, rng: np.random.Generator) -> dict[str, Any]:
        """The next request's."""
        return {
            "model": self.model,
            "prompt": rng.integers(self.num_token_ids, size=self.prompt_tokens).tolist(),
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Level:
    """What a load found: `clients` at a time (closed loop), or `rate` requests a second on average (open loop).

    Times are seconds: `first_token` from when a request was due, `token_gap` between two pieces of an answer,
    `per_token` the mean over an answer's tokens after its first, `whole` until the last token. Rates count the tokens
    of answers that came whole. `errors` counts the others by what was wrong.
    """

    clients: int | None
    rate: float | None
    requests: int
    errors: Mapping[str, int]
    seconds: float
    tokens_per_second: float
    first_token: Quantiles | None
    token_gap: Quantiles | None
    per_token: Quantiles | None
    whole: Quantiles | None

    HEADER: ClassVar[tuple[str, ...]] = (
        "load",
        "requests",
        "errors",
        "tokens/s",
        "first token, ms: p50 / p95 / p99",
        "per token, ms",
        "gap, ms",
    )

    @classmethod
    def of(cls, answers: Sequence[Answer], clients: int | None, rate: float | None) -> Level:
        """Summarises the answers of one load."""
        whole = [answer for answer in answers if answer.error is None]
        seconds = max((a.arrivals[-1] for a in whole), default=0.0) - min((a.due for a in whole), default=0.0)
        return cls(
            clients=clients,
            rate=rate,
            requests=len(answers),
            errors=dict(Counter(answer.error for answer in answers if answer.error is not None)),
            seconds=seconds,
            tokens_per_second=sum(answer.tokens for answer in whole) / seconds if seconds else 0.0,
            first_token=Quantiles.of([answer.arrivals[0] - answer.due for answer in whole]),
            token_gap=Quantiles.of([gap for answer in whole for gap in answer.gaps]),
            per_token=Quantiles.of([sum(a.gaps) / (a.tokens - 1) for a in whole if a.tokens > 1]),
            whole=Quantiles.of([answer.arrivals[-1] - answer.due for answer in whole]),
        )

    @property
    def name(self) -> str:
        """As a table calls it."""
        return f"{self.clients} clients" if self.rate is None else f"{self.rate:g} a second"

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        times = (self.first_token, self.per_token, self.token_gap)
        cells = (quantiles.text() if quantiles is not None else "-" for quantiles in times)
        numbers = (str(self.requests), str(sum(self.errors.values())), f"{self.tokens_per_second:.1f}")
        return (self.name, *numbers, *cells)


def http_client(address: str) -> httpx.AsyncClient:
    """A client for any number of connections."""
    return httpx.AsyncClient(base_url=address, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))


async def closed_loop(
    client: httpx.AsyncClient, workload: Workload, clients: int, rounds: int, seed: int, done: Callable[[], object]
) -> Level:
    """`clients` at a time, each sending its next request when it has its answer, `rounds` times.

    One more round before is not measured.
    """

    async def run(index: int, count: int) -> list[Answer]:
        rng = np.random.default_rng([seed, clients, index, count])
        answers = []
        for _ in range(count):
            answers.append(await ask(client, workload.body(rng), time.perf_counter()))
            done()
        return answers

    await asyncio.gather(*(run(index, 1) for index in range(clients)))
    answers = await asyncio.gather(*(run(index, rounds) for index in range(clients)))
    return Level.of([answer for one in answers for answer in one], clients, None)


async def open_loop(
    client: httpx.AsyncClient, workload: Workload, rate: float, count: int, seed: int, done: Callable[[], object]
) -> Level:
    """`count` requests that come at random, `rate` a second on average, whether or not those before are answered."""
    rng = np.random.default_rng([seed, count])
    due = time.perf_counter() + np.cumsum(rng.exponential(1 / rate, size=count))

    async def run(body: dict[str, Any], when: float) -> Answer:
        await asyncio.sleep(when - time.perf_counter())
        answer = await ask(client, body, when)
        done()
        return answer

    return Level.of(await asyncio.gather(*(run(workload.body(rng), float(when)) for when in due)), None, rate)


async def ask(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Answer:
    """Sends one request and takes the time of every piece of its answer."""
    answer = Answer(due)
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                answer.error = f"status {response.status_code}"
                return answer
            async for piece in events(response.aiter_raw()):
                if "error" in piece:
                    answer.error = "error within the stream"
                elif piece["choices"]:
                    answer.arrivals.append(time.perf_counter())
                elif piece.get("usage"):
                    answer.tokens = piece["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        answer.error = type(error).__name__
    if answer.error is None and (answer.tokens != body["max_tokens"] or not answer.arrivals):
        answer.error = f"{answer.tokens} tokens of {body['max_tokens']}"
    return answer


async def events(content: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`."""
    rest = b""
    async for chunk in content:
        *lines, rest = (rest + chunk).split(b"\n")
        for event in _data(lines):
            if event == b"[DONE]":
                return
            yield json.loads(event)


def _data(lines: Iterable[bytes]) -> Iterable[bytes]:
    return (line[len(b"data:") :].strip() for line in lines if line.startswith(b"data:"))
