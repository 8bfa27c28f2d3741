"""The checks of a request that come before MAX's; what a server makes of them is in `test_server_bad_requests.py`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from max.pipelines.context.exceptions import InputError
from tokenizers import AddedToken, normalizers

from step3p5.random_checkpoint.tokenizer import build_tokenizer
from step3p5.request_checks import NO_GRAMMAR, NOT_SUPPORTED, RANGES, Endpoint, RequestError, check_request, with_field
from step3p5.tokenizer import check_text_length, most_bytes_of_a_token

MODELS = ["step3p5", "other"]


def check(endpoint: Endpoint = Endpoint.COMPLETION, /, **fields: Any) -> None:
    check_request(json.dumps({"model": "step3p5"} | fields).encode(), endpoint, MODELS)


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_plain_request_passes(endpoint: Endpoint) -> None:
    check(endpoint, prompt="x", messages=[], max_tokens=1, temperature=0.7, seed=0, stop="a", stream=True, n=1)
    check(endpoint, **dict.fromkeys(RANGES))
    check(endpoint, **dict.fromkeys(NOT_SUPPORTED[endpoint]))


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_pass_and_what_lies_beyond_does_not(name: str) -> None:
    allowed = RANGES[name]
    if not allowed.minimum_excluded:
        check(**{name: allowed.minimum})
    for beyond in (allowed.minimum - 1, float("nan"), True, *([allowed.minimum] if allowed.minimum_excluded else [])):
        with pytest.raises(RequestError, match=rf"^{name}: found "):
            check(**{name: beyond})
    if allowed.maximum != float("inf"):
        check(**{name: allowed.maximum})
        with pytest.raises(RequestError, match=rf"^{name}: found "):
            check(**{name: allowed.maximum + 1})


@pytest.mark.parametrize(
    ("endpoint", "name"), [(endpoint, name) for endpoint in Endpoint for name in NOT_SUPPORTED[endpoint]]
)
def test_a_field_without_effect_passes_only_where_it_asks_for_none(endpoint: Endpoint, name: str) -> None:
    for harmless in NOT_SUPPORTED[endpoint][name]:
        check(endpoint, **{name: harmless})
    with pytest.raises(RequestError, match=rf"^{name}: found 'odd' \(str\), expected .*leave the field out"):
        check(endpoint, **{name: "odd"})


def test_types_are_left_to_max() -> None:
    check(model=5, prompt={"a": 1}, temperature="hot", seed=[1], max_tokens="many")
    check(Endpoint.CHAT, messages="x", tools="x", tool_choice=5)


def test_every_served_name_passes_and_an_unknown_one_is_not_found() -> None:
    for name in (*MODELS, ""):
        check(model=name)
    with pytest.raises(RequestError, match="expected 'step3p5' or 'other'") as unknown:
        check(model="step")
    assert unknown.value.status == 404


def test_a_tool_is_chosen_among_those_given() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "subtract")]
    for choice in ("none", "auto", "required", {"type": "function", "function": {"name": "subtract"}}):
        check(Endpoint.CHAT, tools=tools, tool_choice=choice)
    with pytest.raises(RequestError, match=r"found 'divide' .*expected one of tools: add, subtract"):
        check(Endpoint.CHAT, tools=tools, tool_choice={"type": "function", "function": {"name": "divide"}})
    with pytest.raises(RequestError, match="without tools"):
        check(Endpoint.CHAT, tools=[], tool_choice="required")


def test_a_schema_that_makes_no_grammar_is_named_by_its_field() -> None:
    message = f"{NO_GRAMMAR} From xgrammar: no"
    expected = "response_format: found a schema that cannot be enforced. From xgrammar: no"
    assert with_field(message, {"response_format": {"type": "json_schema"}, "tools": None}) == expected
    assert with_field(message, {"response_format": {}, "tools": [{}]}).startswith("tools: found")
    assert with_field(message, {"response_format": {"a": 1}, "tools": [{}]}).startswith("response_format or tools: ")
    assert with_field("something else", {"tools": [{}]}) == "something else"


def test_a_response_format_of_a_schema_has_one() -> None:
    check(Endpoint.CHAT, response_format={"type": "json_schema", "json_schema": {"schema": {}}})
    check(Endpoint.CHAT, response_format={"type": "json_object"})
    nothing: list[Any] = [None, {}]
    for found in nothing:
        with pytest.raises(RequestError, match=r"^response_format\.json_schema: found "):
            check(Endpoint.CHAT, response_format={"type": "json_schema", "json_schema": found})


def test_a_text_that_fits_in_no_way_is_refused_and_one_that_might_is_not() -> None:
    tokenizer = build_tokenizer(500)
    longest = most_bytes_of_a_token(tokenizer)
    assert longest is not None
    control = "<|begin_of_sentence|>"
    assert longest == len(control)
    assert len(tokenizer.encode(control * 8).ids) == 8
    check_text_length(control * 8, longest, max_length=8)
    with pytest.raises(InputError, match="found 169 characters, at least 9 tokens, expected at most 8 tokens"):
        check_text_length(control * 8 + "a", longest, max_length=8)


def test_there_is_no_longest_token_where_text_may_vanish() -> None:
    normalizing = build_tokenizer(500)
    normalizing.normalizer = normalizers.Strip()
    assert most_bytes_of_a_token(normalizing) is None
    swallowing = build_tokenizer(500)
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert most_bytes_of_a_token(swallowing) is None
