"""Checks of a request to the OpenAI endpoints that MAX's server does not make, or answers without naming the field.

What MAX's own model of a request checks (types, unknown fields, roles) is left to it, and so is what only the tokenizer
can know (`tokenizer.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from .config_fields import shown

MAX_SEED = 2**63 - 1


class Endpoint(Enum):
    """What a request asks for."""

    COMPLETION = "/v1/completions"
    CHAT = "/v1/chat/completions"


class RequestError(ValueError):
    """A request that cannot be answered; the message names field, found, expected and remedy.

    Args:
        message: What is sent to the client.
        status: The HTTP status to answer with.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Range:
    """The values that a numeric field may have."""

    minimum: float
    maximum: float = math.inf
    minimum_excluded: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.minimum if self.minimum_excluded else value >= self.minimum
        return above and value <= self.maximum

    def __str__(self) -> str:
        if self.minimum_excluded:
            return f"a number above {self.minimum:g}"
        return f"{self.minimum} or more" if self.maximum == math.inf else f"{self.minimum} to {self.maximum}"


RANGES = {
    "n": Range(1, 128),
    "max_tokens": Range(1),
    "max_completion_tokens": Range(1),
    "min_tokens": Range(0),
    "temperature": Range(0, 2),
    "thinking_temperature": Range(0, 2),
    "top_k": Range(-1),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, minimum_excluded=True),
    "seed": Range(-MAX_SEED - 1, MAX_SEED),
}
"""What MAX's sampling takes: most of it refused without the field's name, or (`seed`) with status 500."""

NO_GRAMMAR = "Grammar provided in request cannot be compiled."
"""How MAX begins its errors about schemas."""

NOT_SUPPORTED: Mapping[Endpoint, Mapping[str, Sequence[object]]] = {
    Endpoint.COMPLETION: {"best_of": (1,), "suffix": ("",), "logit_bias": ({},)},
    Endpoint.CHAT: {
        "logit_bias": ({},),
        "modalities": (["text"], []),
        "functions": ([],),
        "function_call": ("none", "auto"),
    },
}
"""Fields that MAX accepts and ignores, with the values (besides null) for which that changes nothing."""


def check_request(body: bytes, endpoint: Endpoint, models: Sequence[str]) -> dict[str, Any]:
    """Refuses a request that would be answered wrongly, or with an error that does not say what is wrong.

    Args:
        body: The request's body as it was sent.
        endpoint: Where it was sent.
        models: Names under which the model is served.

    Returns:
        The request's fields.

    Raises:
        RequestError: It cannot be answered.
    """
    request = _read_object(body)
    model = request.get("model")
    if isinstance(model, str) and model and model not in models:
        _fail("model", shown(model), " or ".join(map(repr, models)), "See GET /v1/models.", status=404)
    for name, allowed in RANGES.items():
        _check_range(name, request.get(name), allowed)
    if not isinstance(count := request.get("n"), int | None):
        _fail("n", shown(count), "a whole number", "Correct the field.")
    for name, harmless in NOT_SUPPORTED[endpoint].items():
        value = request.get(name)
        if value is not None and value not in harmless:
            expected = " or ".join(json.dumps(one) for one in harmless)
            _fail(name, shown(value), expected, "This server does not support it; leave the field out.")
    if endpoint is Endpoint.COMPLETION:
        _check_prompt(request)
    else:
        _check_tool_choice(request)
        _check_response_format(request)
    return request


def with_field(message: str, request: Mapping[str, Any]) -> str:
    """MAX's error about a schema that makes no grammar, with the field that holds the schema; others as they are."""
    if not message.startswith(NO_GRAMMAR):
        return message
    names = [name for name in ("response_format", "tools") if request.get(name)]
    return f"{' or '.join(names)}: found a schema that cannot be enforced.{message.removeprefix(NO_GRAMMAR)}"


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{body[error.start]:02x} at position {error.start}"
        _fail("request body", found, "UTF-8", "Encode the JSON as UTF-8.")
    try:
        request = json.loads(text)
    except RecursionError:
        _fail("request body", "JSON nested too deeply", "a JSON object", "Send the fields of the API's reference.")
    except ValueError as error:
        _fail("request body", f"no valid JSON ({error})", "a JSON object", "Check quotes, commas and braces.")
    if not isinstance(request, dict):
        _fail("request body", f"a {type(request).__name__}", "a JSON object", "Send the fields as one object.")
    return request


def _check_range(name: str, value: object, allowed: Range) -> None:
    if isinstance(value, bool) or (isinstance(value, int | float) and value not in allowed):
        _fail(name, shown(value), str(allowed), "Correct the field.")


def _check_prompt(request: Mapping[str, Any]) -> None:
    prompt = request.get("prompt")
    if not isinstance(prompt, list):
        return
    if not prompt:
        _fail("prompt", "an empty list", "text, token ids, or a list of such", "Give a prompt.")
    several = len(prompt) > 1 and isinstance(prompt[0], str | list)
    if several and request.get("stream"):
        _fail("prompt", f"{len(prompt)} prompts with stream", "one", "Stream each in a request of its own.")


def _check_tool_choice(request: Mapping[str, Any]) -> None:
    choice = request.get("tool_choice")
    tools = request.get("tools")
    if choice in (None, "none", "auto") or not isinstance(tools, list | None):
        return
    names = [tool["function"].get("name") for tool in tools or () if isinstance(tool, dict) and _is_function(tool)]
    if not names:
        _fail("tool_choice", f"{shown(choice)} without tools", "a function among tools", "Give tools, or leave it out.")
    if isinstance(choice, dict) and _is_function(choice) and choice["function"].get("name") not in names:
        named = shown(choice["function"].get("name"))
        _fail("tool_choice.function.name", named, f"one of tools: {', '.join(map(str, names))}", "Correct the name.")


def _check_response_format(request: Mapping[str, Any]) -> None:
    answer = request.get("response_format")
    if isinstance(answer, dict) and answer.get("type") == "json_schema" and not answer.get("json_schema"):
        found = shown(answer.get("json_schema"))
        _fail("response_format.json_schema", found, "an object with a schema", "Give the schema, or use json_object.")


def _is_function(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("function"), dict)


def _fail(name: str, found: str, expected: str, remedy: str, status: int = 400) -> NoReturn:
    raise RequestError(f"{name}: found {found}, expected {expected}. {remedy}", status)
