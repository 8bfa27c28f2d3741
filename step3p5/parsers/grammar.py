"""The grammar that MAX's structured output holds the model to when a request demands a tool call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .json_types import Schema

Format = dict[str, Any]
"""A format of an xgrammar structural tag, https://xgrammar.mlc.ai/docs/tutorials/structural_tag.html."""

_NO_PARAMETERS: Schema = {"type": "object", "properties": {}}


def tool_call_grammar(
    tools: list[dict[str, Any]],
    tool_choice: str | dict[str, Any] | None,
    response_format_schema: Schema = None,
    reject_unsupported: bool = False,
) -> str:
    """The grammar of the responses that a request allows, as the JSON of an xgrammar structural tag.

    Args:
        tools: The functions that may be called, in OpenAI's form; for a named function that one alone.
        tool_choice: `"required"` allows one call or more, a named function one call. Anything else leaves the choice
            to the model, which a grammar serves only where there is a `response_format_schema` to choose instead.
        response_format_schema: The JSON schema of a response that makes no call, or `None`.
        reject_unsupported: Refuse a schema that the grammar cannot enforce in full, instead of enforcing what it can.

    Returns:
        The grammar; empty, which MAX takes for none, where any response is allowed.
    """
    call = _one_of([_call(tool["function"], reject_unsupported) for tool in tools])
    if isinstance(tool_choice, dict):
        return _structural_tag(_sequence(_optional("\n"), call))
    calls = _sequence(_optional("\n"), {"type": "plus", "content": _sequence(call, _optional("\n"))})
    if tool_choice == "required":
        return _structural_tag(calls)
    if response_format_schema is None:
        return ""
    answer = {
        "type": "json_schema",
        "json_schema": response_format_schema,
        "any_whitespace": False,
        "separators": [",", ":"],
        "reject_unsupported": True,
    }
    return _structural_tag(_one_of([calls, answer]))


def _call(function: Mapping[str, Any], reject_unsupported: bool) -> Format:
    arguments = {
        "type": "json_schema",
        "style": "qwen_xml",  # <parameter=KEY>VALUE</parameter>, white space around each
        "json_schema": function.get("parameters") or _NO_PARAMETERS,
        "max_whitespace_cnt": 1,  # the format's line feeds, and no endless run of them
        "reject_unsupported": reject_unsupported,
    }
    return _sequence(
        _constant(f"<tool_call>\n<function={function['name']}>\n"),
        arguments,
        _optional("\n"),
        _constant("</function>\n</tool_call>"),
    )


def _structural_tag(content: Format) -> str:
    return json.dumps({"type": "structural_tag", "format": content})


def _one_of(formats: list[Format]) -> Format:
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": formats}


def _sequence(*formats: Format) -> Format:
    return {"type": "sequence", "elements": list(formats)}


def _constant(text: str) -> Format:
    return {"type": "const_string", "value": text}


def _optional(text: str) -> Format:
    return {"type": "optional", "content": _constant(text)}
