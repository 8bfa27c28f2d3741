"""Puts this package's handlers of `/v1/completions` and `/v1/chat/completions` before MAX's own.

MAX's API server mounts the routers of its table `ROUTES` in order, and the first that knows a path answers it. This
module's router is added at the front. It checks a request, hands it to MAX's handler, and takes stop strings out of the
answer, where MAX leaves them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from max.serve.api_server import ROUTES
from max.serve.config import APIType
from max.serve.router.openai_routes import openai_create_chat_completion, openai_create_completion
from max.serve.schemas.openai import CreateCompletionResponse
from sse_starlette.sse import EventSourceResponse
from typing_extensions import override

from .request_checks import MAX_SEED, Endpoint, RequestError, check_request
from .stop_strings import before_stop, without_stops
from .tokenizer import Step3p5Tokenizer

HANDLERS = {
    Endpoint.COMPLETION: openai_create_completion,
    Endpoint.CHAT: openai_create_chat_completion,
}
"""MAX's own."""

router = APIRouter()


class RewrittenRequest(Request):
    """A request with another body."""

    def __init__(self, request: Request, body: bytes) -> None:
        super().__init__(request.scope, request.receive)
        self._rewritten = body

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
    loras = pipeline.lora_queue.list_loras() if pipeline.lora_queue else []
    try:
        fields = check_request(await request.body(), endpoint, [pipeline.model_name, *loras])
    except RequestError as error:
        raise HTTPException(error.status, str(error)) from error
    if fields.get("seed") == 0:  # which MAX takes for none
        request = RewrittenRequest(request, json.dumps(fields | {"seed": MAX_SEED}).encode())
    answer = await handler(request)
    stop = fields.get("stop")
    stops = [text for text in ([stop] if isinstance(stop, str) else stop or ()) if text]
    return _without_stops(answer, stops) if stops else answer


def _without_stops(answer: Any, stops: Sequence[str]) -> Any:
    if isinstance(answer, CreateCompletionResponse):
        for choice in answer.choices:
            choice.text = before_stop(choice.text, stops)
    elif isinstance(answer, EventSourceResponse):
        answer.body_iterator = without_stops(answer.body_iterator, stops)
    return answer
