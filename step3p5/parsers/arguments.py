"""The arguments of a call, typed by its function's JSON schema.

A value arrives as text without quotes. Where the schema accepts only strings it is a string, whatever it looks like;
where the schema accepts other types, it is the value of such a type that it spells, and otherwise a string, so that
nothing the model wrote is lost. JSON is handed on as it was written: numbers keep their digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .json_types import JsonType, Schema, accepted_types, json_type, string_members

_STRING: Schema = {"type": "string"}

# The published chat template writes an earlier call's arguments as Python does, and the model copies what it reads.
_PYTHON_SPELLING = {"True": "true", "False": "false", "None": "null"}


def arguments_json(arguments: tuple[tuple[str, str], ...], parameters: Schema) -> str:
    """The JSON object of a call's arguments. Of a key that comes twice, the last value counts.

    Args:
        arguments: Key and value as written.
        parameters: The function's JSON schema; `None` for a function that the request does not offer.
    """
    values = {key: value_json(text, parameter_schema(key, parameters), parameters) for key, text in arguments}
    return "{" + ", ".join(f"{_string(key)}: {value}" for key, value in values.items()) + "}"


def parameter_schema(key: str, parameters: Schema) -> Schema:
    """The schema of the parameter `key`; a string's where `parameters` does not tell."""
    if not isinstance(parameters, Mapping):
        return _STRING
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return properties[key]
    others = parameters.get("additionalProperties")
    return others if isinstance(others, Mapping) else _STRING


def value_json(text: str, schema: Schema, root: Schema) -> str:
    """The JSON of the value that `text` spells under `schema`, whose references are into `root`."""
    accepted = accepted_types(schema, root)
    if accepted <= {JsonType.STRING}:
        return _string(_member(text, schema, root))
    spelled = _PYTHON_SPELLING.get(text.strip(), text.strip())
    try:
        value = json.loads(spelled, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        return _string(_member(text, schema, root))
    kind = json_type(value)
    if kind is JsonType.STRING:  # its quotes are the value's
        return _string(_member(text, schema, root))
    if kind in accepted:
        return spelled
    if isinstance(value, float) and value.is_integer() and JsonType.INTEGER in accepted:
        return str(int(value))
    return _string(_member(text, schema, root))


def _member(text: str, schema: Schema, root: Schema) -> str:
    """The string that the schema lists, if `text` is one with white space around it."""
    members = string_members(schema, root)
    return text.strip() if text not in members and text.strip() in members else text


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits} is beyond a double")
    return value
