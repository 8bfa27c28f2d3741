"""Text, in pieces of any size, into the tags of a tool call and what stands between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

_MAX_NAME = 256


class Kind(Enum):
    """What a `Lexeme` is."""

    TEXT = auto()
    SPACE = auto()
    CALL = auto()
    CALL_END = auto()
    FUNCTION = auto()
    FUNCTION_END = auto()
    PARAMETER = auto()
    PARAMETER_END = auto()


_LITERALS = {
    "<tool_call>": Kind.CALL,
    "</tool_call>": Kind.CALL_END,
    "</function>": Kind.FUNCTION_END,
    "</parameter>": Kind.PARAMETER_END,
}
_NAMED = {"<function=": Kind.FUNCTION, "<parameter=": Kind.PARAMETER}

_TAG = re.compile(
    "|".join(map(re.escape, _LITERALS))
    + "|(?P<opening>"
    + "|".join(map(re.escape, _NAMED))
    + rf")(?P<name>[^<>\n]{{1,{_MAX_NAME}}})>"
)
_PARTIAL_NAME = re.compile(rf"[^<>\n]{{0,{_MAX_NAME}}}")
_SPACE_OR_TEXT = re.compile(r"(?P<space>[ \t\r\n]+)|[^ \t\r\n](?:.*[^ \t\r\n])?", re.DOTALL)


@dataclass(frozen=True)
class Lexeme:
    """A tag, a run of white space, or text that begins and ends with something else.

    The pieces in which the text arrives may cut `SPACE` and `TEXT` anywhere, never a tag.

    Attributes:
        text: The characters, all of them: the texts of all lexemes in order are the input.
        name: Of a `FUNCTION` or `PARAMETER` tag, what follows its `=`; otherwise empty.
    """

    kind: Kind
    text: str
    name: str = ""


class Lexer:
    """Cuts a text into lexemes, and keeps back only an ending that may be the beginning of a tag."""

    def __init__(self) -> None:
        self._tail = ""

    def feed(self, piece: str) -> Iterator[Lexeme]:
        """The lexemes that are certain once `piece` has followed what was fed before. Consume them all."""
        text = self._tail + piece
        at = 0
        for match in _TAG.finditer(text):
            yield from _between(text[at : match.start()])
            yield _tag(match)
            at = match.end()
        last = text.rfind("<", at)
        cut = last if last >= 0 and _may_begin_tag(text[last:]) else len(text)
        self._tail = text[cut:]
        yield from _between(text[at:cut])

    def end(self) -> Iterator[Lexeme]:
        """What was kept back: text, since no more is coming."""
        tail, self._tail = self._tail, ""
        yield from _between(tail)


def _tag(match: re.Match[str]) -> Lexeme:
    if match["opening"]:
        return Lexeme(_NAMED[match["opening"]], match[0], match["name"])
    return Lexeme(_LITERALS[match[0]], match[0])


def _between(text: str) -> Iterator[Lexeme]:
    for match in _SPACE_OR_TEXT.finditer(text):
        yield Lexeme(Kind.SPACE if match["space"] else Kind.TEXT, match[0])


def _may_begin_tag(tail: str) -> bool:
    """Whether characters after `tail`, whose only `<` is its first character, could make it a tag."""
    if any(tag.startswith(tail) for tag in (*_LITERALS, *_NAMED)):
        return True
    return any(tail.startswith(tag) and _PARTIAL_NAME.fullmatch(tail, len(tag)) for tag in _NAMED)
