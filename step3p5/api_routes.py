"""Puts this package's checks of a request before MAX's own handlers of `/v1/completions` and `/v1/chat/completions`.

MAX's API server mounts the routers of its table `ROUTES` in order, and the first that knows a path answers it. This
module's router is added at the front: it checks, then calls MAX's handler with the request untouched.
"""

from __future__ import annotations

import sys
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from max.serve.api_server import ROUTES
from max.serve.config import APIType
from max.serve.router.openai_routes import openai_create_chat_completion, openai_create_completion

from .request_checks import Endpoint, RequestError, check_request
from .tokenizer import Step3p5Tokenizer

router = APIRouter()


@router.post(Endpoint.COMPLETION.value, response_model=None)
async def create_completion(request: Request) -> Any:
    """MAX's answer to a completion request that passes the checks; else an error that names the field."""
    await _check(request, Endpoint.COMPLETION)
    return await openai_create_completion(request)


@router.post(Endpoint.CHAT.value, response_model=None)
async def create_chat_completion(request: Request) -> Any:
    """MAX's answer to a chat request that passes the checks; else an error that names the field."""
    await _check(request, Endpoint.CHAT)
    return await openai_create_chat_completion(request)


def register_routes() -> None:
    """Puts this module's router first among the API server's; once. Servers of other models are not changed by it."""
    routes = ROUTES[APIType.OPENAI]
    module = sys.modules[__name__]
    if module not in routes:
        ROUTES[APIType.OPENAI] = (module, *routes)


async def _check(request: Request, endpoint: Endpoint) -> None:
    pipeline = request.app.state.pipeline
    if not isinstance(pipeline.tokenizer, Step3p5Tokenizer):
        return
    loras = pipeline.lora_queue.list_loras() if pipeline.lora_queue else []
    try:
        check_request(await request.body(), endpoint, [pipeline.model_name, *loras])
    except RequestError as error:
        raise HTTPException(error.status, str(error)) from error
