"""Puts this package's handlers of `/v1/completions` and `/v1/chat/completions` before MAX's own.

MAX's API server mounts the routers of its table `ROUTES` in order, and the first that knows a path answers it. This
module's router is added at the front. It checks a request, hands it to MAX's handler, once for each of `n` choices,
ends the answer before a stop string, where MAX leaves it and may go on, and keeps thoughts out of `content`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from max.serve.api_server import ROUTES
from max.serve.config import APIType
from max.serve.router.openai_routes import openai_create_chat_completion, openai_create_completion
from max.serve.schemas.openai import CreateChatCompletionResponse, CreateCompletionResponse
from sse_starlette.sse import EventSourceResponse
from typing_extensions import override

from .hang_ups import cancelled_for_sure, ended_with_connection
from .request_checks import MAX_SEED, Endpoint, RequestError, check_request, with_field
from .several_choices import gather_answers
from .stop_strings import before_stop, ended_at_stop, without_stops
from .thoughts import SAID, Said, keep_thought, taken_down
from .tokenizer import Step3p5Tokenizer

HANDLERS: Mapping[Endpoint, Callable[[Request], Awaitable[Any]]] = {
    Endpoint.COMPLETION: openai_create_completion,
    Endpoint.CHAT: openai_create_chat_completion,
}
"""MAX's own."""

DEFAULTS: Mapping[Endpoint, Mapping[str, Any]] = {Endpoint.COMPLETION: {"reasoning_split": False}, Endpoint.CHAT: {}}
"""Fields that a request has unless it says otherwise. MAX takes thoughts out of completions, whose answers have no
field for them: a completion is all that the model says."""

router = APIRouter()


class RewrittenRequest(Request):
    """The request for choice `number`, with other fields and an id of its own."""

    def __init__(self, request: Request, fields: Mapping[str, Any], number: int) -> None:
        state = {**request.scope["state"], "request_id": f"{request.state.request_id}-{number}"}
        super().__init__({**request.scope, "state": state}, request.receive)
        self._rewritten = json.dumps(fields).encode()

    @override
    async def body(self) -> bytes:
        return self._rewritten


@router.post(Endpoint.COMPLETION.value, response_model=None)
async def create_completion(request: Request) -> Any:
    """MAX's answer to a completion request that passes the checks; else an error that names the field."""
    return await _answer(request, Endpoint.COMPLETION)


@router.post(Endpoint.CHAT.value, response_model=None)
async def create_chat_completion(request: Request) -> Any:
    """MAX's answer to a chat request that passes the checks; else an error that names the field."""
    return await _answer(request, Endpoint.CHAT)


def register_routes() -> None:
    """Puts this module's router first among the API server's; once. Servers of other models are not changed by it."""
    routes = ROUTES[APIType.OPENAI]
    module = sys.modules[__name__]
    if module not in routes:
        ROUTES[APIType.OPENAI] = (module, *routes)


async def _answer(request: Request, endpoint: Endpoint) -> Any:
    pipeline = request.app.state.pipeline
    handler = HANDLERS[endpoint]
    if not isinstance(pipeline.tokenizer, Step3p5Tokenizer):
        return await handler(request)
    if "next_token_chunk" not in vars(pipeline):  # once a server
        ask, cancel = pipeline.next_token_chunk, pipeline.model_worker.cancel
        pipeline.next_token_chunk = taken_down(ended_at_stop(cancelled_for_sure(ask, cancel), cancel))
    loras = pipeline.lora_queue.list_loras() if pipeline.lora_queue else []
    try:
        fields = check_request(await request.body(), endpoint, [pipeline.model_name, *loras])
    except RequestError as error:
        raise HTTPException(error.status, str(error)) from error
    stop = fields.get("stop")
    stops = [text for text in (stop if isinstance(stop, list) else [stop]) if text and isinstance(text, str)]
    fields = {**DEFAULTS[endpoint], **fields}
    count, seed = fields.get("n") or 1, fields.get("seed")
    own = [{"n": 1, "seed": _seed(seed, number)} for number in range(count)]
    requests = [RewrittenRequest(request, fields | one, number) for number, one in enumerate(own)]
    asking = [_ask(handler, one, stops) for one in requests]
    try:
        answer = await (gather_answers(asking) if count > 1 else asking[0])
    except HTTPException as error:
        raise HTTPException(error.status_code, with_field(str(error.detail), fields)) from error
    if isinstance(answer, JSONResponse):  # an error before the first token of a stream
        content = json.loads(bytes(answer.body))
        raise HTTPException(answer.status_code, with_field(content.get("error", content)["message"], fields))
    return answer


async def _ask(handler: Callable[[Request], Awaitable[Any]], request: Request, stops: Sequence[str]) -> Any:
    said = Said()
    before = SAID.set(said)
    try:
        answer = await handler(request)
    finally:
        SAID.reset(before)
    if isinstance(answer, CreateChatCompletionResponse):
        keep_thought(answer, said, stops)
    if stops and isinstance(answer, CreateCompletionResponse):
        for choice in answer.choices:
            choice.text = before_stop(choice.text, stops)
    elif stops and isinstance(answer, CreateChatCompletionResponse):
        for message in (choice.message for choice in answer.choices):
            message.content = message.content and before_stop(message.content, stops)
    elif isinstance(answer, EventSourceResponse):
        events = answer.body_iterator
        assert isinstance(events, AsyncGenerator)
        return ended_with_connection(answer, *([without_stops(events, stops)] if stops else []), events)
    return answer


def _seed(seed: object, number: int) -> object:
    """The seed of choice `number`; never 0, which MAX takes for none."""
    if not isinstance(seed, int):
        return seed
    return (seed + number + MAX_SEED + 1) % (2 * MAX_SEED + 2) - MAX_SEED - 1 or MAX_SEED
