"""`Step3p5ToolParser`: what is a call and what is text, the same for every way to cut the stream; types by schema."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from max.pipelines.lib import tool_parsing
from max.pipelines.lib.tool_parsing import StructuralTagToolParser

from step3p5.arch import step3p5_arch
from step3p5.parsers import PARSER_NAME, Step3p5ToolParser

Parsed = tuple[str, list[tuple[str, str]]]
"""Content, and name and arguments of each call."""

SCHEMAS: dict[str, Any] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "write": {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}


def written(name: str, *parameters: tuple[str, str]) -> str:
    """A call as the chat template writes it."""
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def parse_whole(text: str, schemas: dict[str, Any] = SCHEMAS) -> Parsed:
    parser = Step3p5ToolParser()
    parser.set_tool_schemas(schemas)
    parsed = parser.parse_complete(text)
    return parsed.content or "", [(call.name, call.arguments) for call in parsed.tool_calls]


def parse_pieces(pieces: list[str]) -> Parsed:
    """The deltas of a stream, put together as a client does."""
    parser = Step3p5ToolParser()
    parser.set_streaming_tool_schemas(SCHEMAS)
    content = ""
    calls: dict[int, tuple[str, str]] = {}
    ids: set[str | None] = set()
    for piece in pieces:
        for delta in parser.parse_delta(piece):
            content += delta.content or ""
            if delta.arguments is not None:
                assert delta.name is not None
                assert delta.index == len(calls)
                calls[delta.index] = (delta.name, delta.arguments)
                ids.add(delta.id)
    assert None not in ids
    assert len(ids) == len(calls), "every call has an id of its own"
    return content + (parser.flush() or ""), list(calls.values())


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(places), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(bounds)]


WEATHER = written("weather", ("city", "Köln"), ("days", "3"))
WEATHER_CALL = ("weather", '{"city": "Köln", "days": 3}')
NOW = written("now")
NOW_CALL = ("now", "{}")
DOCUMENT = f"A call looks like this:\n{WEATHER}\n"

EXPECTED: dict[str, tuple[str, Parsed]] = {
    "text": ("The answer is 42, and 1 < 2.\n", ("The answer is 42, and 1 < 2.\n", [])),
    "one call": (WEATHER, ("", [WEATHER_CALL])),
    "no parameters": (NOW, ("", [NOW_CALL])),
    "calls without a gap": (WEATHER + NOW + WEATHER, ("", [WEATHER_CALL, NOW_CALL, WEATHER_CALL])),
    "text around calls": (
        f"Let me look.\n\n{WEATHER}\n{NOW}\n\nDone. \n",
        ("Let me look.\n\nDone. \n", [WEATHER_CALL, NOW_CALL]),
    ),
    "no layout": (
        "<tool_call><function=weather><parameter=city>Ulm</parameter><parameter=days>2</parameter></function></tool_call>",
        ("", [("weather", '{"city": "Ulm", "days": 2}')]),
    ),
    "markup in a value": (
        written("write", ("content", "<p class='a'>1 &amp; 2 <b</p> </parameter </parameter\n</function>")),
        ("", [("write", '{"content": "<p class=\'a\'>1 &amp; 2 <b</p> </parameter </parameter\\n</function>"}')]),
    ),
    "end tags in a value": (
        written("write", ("content", "a</parameter> b </tool_call> c </parameter>\n</function>\nd")),
        ("", [("write", '{"content": "a</parameter> b </tool_call> c </parameter>\\n</function>\\nd"}')]),
    ),
    "a call quoted in a value": (
        written("write", ("path", "a.md"), ("content", DOCUMENT)) + NOW,
        ("", [("write", json.dumps({"path": "a.md", "content": DOCUMENT}, ensure_ascii=False)), NOW_CALL]),
    ),
    "line feeds in a value": (
        written("write", ("content", "\n\none\n\n  two\n")),
        ("", [("write", '{"content": "\\n\\none\\n\\n  two\\n"}')]),
    ),
    "empty values": (
        written("write", ("path", "")).replace("</function>", "<parameter=content></parameter>\n</function>"),
        ("", [("write", '{"path": "", "content": ""}')]),
    ),
    "characters beyond ASCII": (
        written("write", ("path", "größe/文件/🦀\u2028"), ("content", 'say "\\n"\t')),
        ("", [("write", '{"path": "größe/文件/🦀\u2028", "content": "say \\"\\\\n\\"\\t"}')]),
    ),
    "unknown function and parameter": (
        written("fly", ("height", "3")) + written("weather", ("wind", "3")),
        ("", [("fly", '{"height": "3"}'), ("weather", '{"wind": "3"}')]),
    ),
    "cut in a value": (f"Hm.\n{WEATHER[:50]}", (f"Hm.\n{WEATHER[:50]}", [])),
    "cut in the last tag": (NOW + WEATHER[:-1], (WEATHER[:-1], [NOW_CALL])),
    "a value without an end": (
        f"<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</function>\n</tool_call> then {NOW}",
        ("<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</function>\n</tool_call> then", [NOW_CALL]),
    ),
    "a call without its inner ends": (
        f"<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</tool_call>\n{NOW}",
        ("<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</tool_call>", [NOW_CALL]),
    ),
    "a call without its own end": (
        f"<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n{NOW}",
        ("<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>", [NOW_CALL]),
    ),
    "tags out of place": (
        f"</tool_call> <function=now> <tool_call> <tool_call>\n{{}}</tool_call><tool_call><function=>{NOW} </function>",
        (
            "</tool_call> <function=now> <tool_call> <tool_call>\n{}</tool_call><tool_call><function=> </function>",
            [NOW_CALL],
        ),
    ),
    "beginnings of tags": (
        f"<tool <tool_call <tool_call<tool_call> <functio <function=now\n{NOW}<tool_cal",
        ("<tool <tool_call <tool_call<tool_call> <functio <function=now<tool_cal", [NOW_CALL]),
    ),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_calls_and_content_of_a_whole_response(case: str) -> None:
    text, expected = EXPECTED[case]
    assert parse_whole(text) == expected


def test_there_are_twenty_texts_to_cut() -> None:
    assert len(EXPECTED) == 20


@pytest.mark.parametrize("case", EXPECTED)
def test_a_stream_cut_at_any_place_gives_the_whole_response(case: str) -> None:
    text, expected = EXPECTED[case]
    for place in range(len(text) + 1):
        assert parse_pieces(cut(text, [place])) == expected, f"cut at {place}: {text[:place]!r}"
    assert parse_pieces(list(text)) == expected


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "</function>", "</parameter>", "<function=now>", "<parameter=city>"),
    *("<tool_call", "</tool", "<function=", "<parameter=", "</parameter", "<", ">", "</", "=", "&"),
    *("\n", "\n\n", " ", "\r\n", "\t", "\u00a0", "text", "7", "null", '{"a": 1}', "größe", "🦀"),
    *(WEATHER, NOW, written("write", ("content", DOCUMENT)), WEATHER[:-13], WEATHER[30:]),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=10).map("".join)


@settings(max_examples=2000, deadline=None)
@given(texts, st.integers(0, 2**32))
def test_a_stream_cut_anywhere_gives_the_whole_response(text: str, seed: int) -> None:
    expected = parse_whole(text)
    rng = random.Random(seed)
    for count in (1, 1, 2, 2, 3, 4, 6, 8, 16, 32):
        pieces = cut(text, [rng.randint(0, len(text)) for _ in range(count)])
        assert parse_pieces(pieces) == expected, pieces


@settings(max_examples=300, deadline=None)
@given(texts)
def test_what_is_no_call_is_content_to_the_last_character(text: str) -> None:
    content, calls = parse_whole(text)
    if not calls:
        assert content == text
    else:  # in order and complete, but for calls and the white space at them
        rest = iter(text)
        assert all(character in rest for character in content)


# Independent of the parser: what a call is, as one pattern, for texts whose calls are all well-formed.
REFERENCE_CALL = re.compile(
    r"\s*<tool_call>\s*<function=(?P<name>\w+)>\s*"
    r"(?P<parameters>(?:<parameter=\w+>.*?</parameter>\s*(?=<parameter=\w+>|</function>\s*</tool_call>))*)"
    r"</function>\s*</tool_call>",
    re.DOTALL,
)
REFERENCE_PARAMETER = re.compile(
    r"<parameter=(\w+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=\w+>|$)",
    re.DOTALL,
)

values = st.lists(
    st.sampled_from(
        ["<", ">", "&", "</parameter", "</parameter> x", "<b>", "</tool_call> x", "\n", "5", "x", "é🦀", '"']
    )
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=4),
    max_size=6,
).map("".join)
calls = st.tuples(
    st.sampled_from(["write", "weather", "now", "fly"]),
    st.dictionaries(st.sampled_from(["path", "content", "a", "b"]), values, max_size=3),
)
words = st.sampled_from(["", "One moment.", "a < b", "1 <tool_call 2", "\n", "done\n\nnow"])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(words, calls), max_size=4), words)
def test_well_formed_responses_agree_with_a_reference(turns: list[tuple[str, Any]], last: str) -> None:
    text = "".join(before + written(name, *parameters.items()) for before, (name, parameters) in turns) + last
    expected_calls = [
        (match["name"], dict(REFERENCE_PARAMETER.findall(match["parameters"])))
        for match in REFERENCE_CALL.finditer(text)
    ]
    expected_content = REFERENCE_CALL.sub("", text)
    if turns and not last.strip():
        expected_content = expected_content.rstrip() if not last else expected_content.removesuffix(last)
    content, parsed = parse_whole(text)
    assert [(name, json.loads(arguments)) for name, arguments in parsed] == expected_calls
    assert content == expected_content
    assert expected_calls == [call for _, call in turns]


def test_two_calls_that_meet_in_one_chunk() -> None:
    middle = "</tool_call><tool_call><"
    start, rest = (WEATHER + NOW.replace(">\n<", "><", 1)).split(middle)
    assert parse_pieces([start, middle, rest]) == ("", [WEATHER_CALL, NOW_CALL])


def test_text_is_streamed_at_once_and_a_call_in_one_piece() -> None:
    parser = Step3p5ToolParser()
    parser.set_streaming_tool_schemas(SCHEMAS)
    assert [delta.content for delta in parser.parse_delta("Let me see ")] == ["Let me see"]
    assert [delta.content for delta in parser.parse_delta("< now.")] == [" < now."]
    for character in WEATHER[:-1]:
        assert parser.parse_delta(character) == []
    (delta,) = parser.parse_delta(WEATHER[-1])
    assert (delta.index, delta.name, delta.arguments) == (0, *WEATHER_CALL)
    assert parser.flush() is None


def test_a_parser_can_be_used_again() -> None:
    parser = Step3p5ToolParser()
    parser.parse_delta(WEATHER[:40])
    parser.reset()
    for _ in range(2):
        assert len(parser.parse_complete(WEATHER).tool_calls) == 1


STRING = {"type": "string"}
POINT = {"type": "object", "properties": {"x": {"type": "number"}}}
ROOT = {
    "$defs": {
        "Point": POINT,
        "Alias": {"$ref": "#/$defs/Point"},
        "Nested": {"$defs": {"Count": {"type": "integer"}}},
        "a/b": {"type": "boolean"},
        "Loop": {"$ref": "#/$defs/Loop"},
    }
}

TYPED: list[tuple[Any, str, object]] = [
    # Strings stay strings, whatever they look like.
    *((STRING, text, text) for text in ["5", "-1.5e3", "true", "null", '{"a": 1}', "[1]", '"q"', "", " 5 ", "None"]),
    ({"type": "string", "enum": ["red", "5"]}, " red ", "red"),
    ({"enum": ["red", "5"]}, "5", "5"),
    ({"const": "7"}, "7", "7"),
    # Other types are what they spell, or strings where they do not spell one.
    ({"type": "integer"}, "5", 5),
    ({"type": "integer"}, " -12\n", -12),
    ({"type": "integer"}, "5.0", 5),
    ({"type": "integer"}, "123456789012345678901234567890", 123456789012345678901234567890),
    *(({"type": "integer"}, text, text) for text in ["5.5", "five", "", "0x10", "1_000", "true"]),
    ({"type": "number"}, "5", 5),
    ({"type": "number"}, "0.1000000000000000055", 0.1),
    ({"type": "number"}, "-2E-3", -0.002),
    *(({"type": "number"}, text, text) for text in ["NaN", "Infinity", "-Infinity", "1e999", ".5", "+5", "1,5"]),
    ({"type": "boolean"}, "true", True),
    ({"type": "boolean"}, "False", False),
    ({"type": "boolean"}, "1", "1"),
    ({"type": "null"}, "null", None),
    ({"type": "null"}, "None", None),
    ({"type": "array"}, '[1, "a", [null]]', [1, "a", [None]]),
    ({"type": "array"}, "[1,", "[1,"),
    ({"type": "array"}, '{"a": 1}', '{"a": 1}'),
    ({"type": "object"}, '{\n "zip": "01234", "n": 1.50}\n', {"zip": "01234", "n": 1.5}),
    ({"type": "object"}, "[" * 100_000, "[" * 100_000),
    # Several types: the one that the text spells, a string last.
    ({"type": ["integer", "null"]}, "null", None),
    ({"type": ["string", "null"]}, "5", "5"),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": ["string", "integer"]}, "5", 5),
    ({"anyOf": [STRING, {"type": "null"}]}, "true", "true"),
    ({"anyOf": [STRING, {"type": "array"}]}, '["a"]', ["a"]),
    ({"oneOf": [{"type": "integer"}, {"type": "boolean"}]}, "true", True),
    ({"allOf": [{"type": ["string", "integer"]}, {"type": ["integer", "null"]}]}, "null", "null"),
    ({"enum": [1, "auto", None]}, "1", 1),
    ({"enum": [1, "auto", None]}, "auto\n", "auto"),
    ({"const": 3}, "3", 3),
    # References.
    ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
    ({"$ref": "#/$defs/Alias"}, '{"x": 1}', {"x": 1}),
    ({"$ref": "#/$defs/Nested/$defs/Count"}, "5", 5),
    ({"$ref": "#/$defs/a~1b"}, "true", True),
    ({"$ref": "#/properties/sibling"}, "5", "5"),
    ({"anyOf": [{"$ref": "#/$defs/Alias"}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"$ref": "#/$defs/Alias"}, STRING]}, "5", "5"),
    *(({"$ref": to}, "5", 5) for to in ["#/$defs/Loop", "#/nowhere", "https://example.com/schema"]),
    # Schemas that say nothing leave the type to the text.
    *((schema, "5", 5) for schema in [{}, True, {"description": "any"}, {"type": "unheard"}, {"type": {}}, [], 7]),
    ({}, "five", "five"),
    (False, "5", "5"),
]


@pytest.mark.parametrize(("schema", "text", "expected"), TYPED)
def test_a_value_has_the_type_that_the_schema_gives_it(schema: object, text: str, expected: object) -> None:
    parameters = ROOT | {"type": "object", "properties": {"value": schema, "sibling": STRING}}
    _, calls = parse_whole(written("f", ("value", text)), {"f": parameters})
    (got,) = json.loads(calls[0][1], parse_constant=pytest.fail).values()
    assert got == expected
    assert type(got) is type(expected)


def test_other_parameters_have_the_type_of_additional_properties() -> None:
    parameters = {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}
    assert parse_whole(written("f", ("n", "5")), {"f": parameters}) == ("", [("f", '{"n": 5}')])


def test_the_last_of_equal_parameters_counts() -> None:
    assert parse_whole(written("weather", ("days", "1"), ("days", "2"))) == ("", [("weather", '{"days": 2}')])


def test_max_knows_the_parser_by_its_name() -> None:
    assert step3p5_arch.tool_parser == PARSER_NAME == "step3p5"
    assert isinstance(tool_parsing.create("step3p5"), Step3p5ToolParser)
    assert isinstance(tool_parsing.create("step3p5"), StructuralTagToolParser), "MAX would not call flush()"
