"""Which types of JSON value a JSON schema accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, TypeGuard
from urllib.parse import unquote

Schema = Any
"""A JSON schema as a request states it: a mapping or a boolean if it is valid, and nothing says that it is."""


class JsonType(StrEnum):
    """The kinds of JSON value, with integers apart from other numbers."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NULL = "null"
    ARRAY = "array"
    OBJECT = "object"


ANY_TYPE = frozenset(JsonType)

_BY_NAME = {str(kind): frozenset({kind}) for kind in JsonType} | {
    "number": frozenset({JsonType.NUMBER, JsonType.INTEGER})
}


def json_type(value: object) -> JsonType:
    """The type of a value that `json.loads` gave."""
    match value:
        case bool():
            return JsonType.BOOLEAN
        case int():
            return JsonType.INTEGER
        case float():
            return JsonType.NUMBER
        case str():
            return JsonType.STRING
        case None:
            return JsonType.NULL
        case list():
            return JsonType.ARRAY
        case _:
            return JsonType.OBJECT


def accepted_types(schema: Schema, root: Schema) -> frozenset[JsonType]:
    """The types that `schema` leaves open, by `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and `$ref`.

    Args:
        root: The schema that `#` in a `$ref` stands for. A reference that leads nowhere, or in a circle, says nothing.
    """
    return _accepted(schema, root, frozenset())


def string_members(schema: Schema, root: Schema) -> frozenset[str]:
    """The strings that `enum` and `const` of `schema`, or of the schemas it is made of, list."""
    return frozenset(
        member
        for part in _parts(schema, root, frozenset())
        for member in _listed(part) or ()
        if isinstance(member, str)
    )


def _accepted(schema: Schema, root: Schema, followed: frozenset[str]) -> frozenset[JsonType]:
    if schema is False:
        return frozenset()
    if not isinstance(schema, Mapping):
        return ANY_TYPE
    accepted = _named(schema.get("type"))
    listed = _listed(schema)
    if listed is not None:
        accepted &= frozenset(map(json_type, listed))
    for keyword in ("anyOf", "oneOf"):
        branches = schema.get(keyword)
        if _is_list(branches):
            accepted &= frozenset().union(*(_accepted(branch, root, followed) for branch in branches))
    if _is_list(schema.get("allOf")):
        for branch in schema["allOf"]:
            accepted &= _accepted(branch, root, followed)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        accepted &= _accepted(_resolve(reference, root), root, followed | {reference})
    return accepted


def _named(names: object) -> frozenset[JsonType]:
    known = [
        _BY_NAME[name] for name in (names if _is_list(names) else [names]) if isinstance(name, str) and name in _BY_NAME
    ]
    return frozenset().union(*known) if known else ANY_TYPE


def _listed(schema: Mapping[str, Any]) -> Sequence[object] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if _is_list(schema.get("enum")) else None


def _parts(schema: Schema, root: Schema, followed: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    """`schema` and what it is made of."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for keyword in ("anyOf", "oneOf", "allOf"):
        if _is_list(schema.get(keyword)):
            for branch in schema[keyword]:
                yield from _parts(branch, root, followed)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        yield from _parts(_resolve(reference, root), root, followed | {reference})


def _resolve(reference: str, root: Schema) -> Schema:
    """What a JSON pointer in a URI fragment (RFC 6901) points at in `root`; `True`, which accepts all, if nothing."""
    if not reference.startswith("#"):
        return True
    found = root
    for step in unquote(reference[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and key in found:
            found = found[key]
        elif _is_list(found) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return True
    return found


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
