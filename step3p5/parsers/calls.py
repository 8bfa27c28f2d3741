"""The tool calls in a text, and the text around them.

A call is

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

with any number of parameters and any white space between the tags. One line feed after `<parameter=KEY>` and one
before `</parameter>` are layout; every other character of a value is the value's, tags among them: a value ends at
the `</parameter>` that the next `<parameter=KEY>`, or `</function>` and `</tool_call>`, follow. A whole call quoted in
a value belongs to the value, too.

What is not such a call is text. A call can turn out not to be one until its last tag, and a name or an argument that a
client has received cannot be taken back; so a call is held until it is complete, and then appears in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from .tags import Kind, Lexeme, Lexer


@dataclass(frozen=True)
class Call:
    """A complete call.

    Attributes:
        arguments: Key and value as they were written, in order.
    """

    name: str
    arguments: tuple[tuple[str, str], ...]


class _State(Enum):
    """Where in a call the text has come to; the comment shows the last tag."""

    OPENED = auto()  # <tool_call>
    BODY = auto()  # <function=NAME>
    VALUE = auto()  # <parameter=KEY>
    VALUE_ENDED = auto()  # </parameter>, if what follows bears it out
    CALL_ENDING = auto()  # </parameter> </function>, likewise
    FUNCTION_ENDED = auto()  # <function=NAME> </function>


@dataclass
class _Value:
    """A parameter's value as far as it has come.

    Attributes:
        written: Its characters.
        quoted: Calls that began within the value and have not ended.
        run: The tags just read, with nothing but white space between them, if none of them ended a quoted call.
        doubtful: The lexemes since a `</parameter>` that may be its end.
    """

    key: str
    written: list[str] = field(default_factory=list)
    quoted: int = 0
    run: list[Lexeme] = field(default_factory=list)
    doubtful: list[Lexeme] = field(default_factory=list)

    def argument(self) -> tuple[str, str]:
        return self.key, "".join(self.written).removeprefix("\n").removesuffix("\n")


@dataclass
class _OpenCall:
    """A call as far as it has come.

    Attributes:
        held: All of its lexemes.
    """

    held: list[Lexeme]
    state: _State = _State.OPENED
    name: str = ""
    values: list[_Value] = field(default_factory=list)


class CallReader:
    """Reads a text in pieces of any size; the pieces do not change what is read.

    White space before a call, and after the last call at the end of the text, is layout and dropped.
    """

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._call: _OpenCall | None = None
        self._space = ""  # not yet known to be text
        self._after_call = False  # no text since the last call

    def feed(self, piece: str) -> Iterator[str | Call]:
        """Text and calls that are certain once `piece` has followed what was fed before. Consume them all."""
        for lexeme in self._lexer.feed(piece):
            yield from self._read(lexeme)

    def end(self) -> Iterator[str]:
        """The rest of the text, in which no call is complete."""
        for lexeme in self._lexer.end():
            for item in self._read(lexeme):
                assert isinstance(item, str), "text alone completes no call"
                yield item
        yield from self._release()
        if self._space and not self._after_call:
            yield self._space

    def _read(self, lexeme: Lexeme) -> Iterator[str | Call]:
        call = self._call
        if call is None:
            yield from self._read_outside(lexeme)
            return
        call.held.append(lexeme)
        match call.state, lexeme.kind:
            case _State.VALUE, _:
                yield from self._read_value(call, lexeme)
            case ((_State.VALUE_ENDED | _State.CALL_ENDING), Kind.SPACE):
                call.values[-1].doubtful.append(lexeme)
            case _, Kind.SPACE:
                pass
            case _State.OPENED, Kind.FUNCTION:
                call.name, call.state = lexeme.name, _State.BODY
            case ((_State.BODY | _State.VALUE_ENDED), Kind.PARAMETER):
                call.values.append(_Value(lexeme.name))
                call.state = _State.VALUE
            case _State.BODY, Kind.FUNCTION_END:
                call.state = _State.FUNCTION_ENDED
            case _State.VALUE_ENDED, Kind.FUNCTION_END:
                call.values[-1].doubtful.append(lexeme)
                call.state = _State.CALL_ENDING
            case ((_State.FUNCTION_ENDED | _State.CALL_ENDING), Kind.CALL_END):
                self._call, self._space, self._after_call = None, "", True
                yield Call(call.name, tuple(value.argument() for value in call.values))
            case ((_State.VALUE_ENDED | _State.CALL_ENDING), _):
                yield from self._resume_value(call, lexeme)
            case _:
                call.held.pop()
                yield from self._release()
                yield from self._read_outside(lexeme)

    def _read_outside(self, lexeme: Lexeme) -> Iterator[str]:
        if lexeme.kind is Kind.CALL:
            self._call = _OpenCall([lexeme])
        else:
            yield from self._text(lexeme)

    def _text(self, lexeme: Lexeme) -> Iterator[str]:
        if lexeme.kind is Kind.SPACE:
            self._space += lexeme.text
        else:
            yield self._space + lexeme.text
            self._space, self._after_call = "", False

    def _read_value(self, call: _OpenCall, lexeme: Lexeme) -> Iterator[str]:
        value = call.values[-1]
        if lexeme.kind is Kind.PARAMETER_END and not value.quoted:
            value.doubtful = [lexeme]
            call.state = _State.VALUE_ENDED
            return
        value.written.append(lexeme.text)
        if lexeme.kind is Kind.SPACE:
            return
        before = value.run[-1].kind if value.run else None
        if lexeme.kind is Kind.TEXT:
            value.run = []
        elif lexeme.kind is Kind.FUNCTION and before is Kind.CALL:
            yield from self._begin_quoted(call, lexeme)
        elif lexeme.kind is Kind.CALL_END and before is Kind.FUNCTION_END:
            value.run = []
            if value.quoted:
                value.quoted -= 1
            else:  # the end of this call: its value's own end is missing
                yield from self._release()
        else:
            value.run.append(lexeme)

    def _begin_quoted(self, call: _OpenCall, function: Lexeme) -> Iterator[str]:
        """`<tool_call><function=NAME>` in a value: a quoted call, or the next one if an end tag stands before it."""
        value = call.values[-1]
        run, value.run = value.run, []
        if value.quoted or len(run) < 2 or run[-2].kind not in (Kind.FUNCTION_END, Kind.CALL_END):
            value.quoted += 1
            return
        start = next(index for index, lexeme in enumerate(call.held) if lexeme is run[-1])
        following = _OpenCall(call.held[start:], _State.BODY, function.name)
        del call.held[start:]
        yield from self._release()
        self._call = following

    def _resume_value(self, call: _OpenCall, lexeme: Lexeme) -> Iterator[str]:
        """What looked like the value's end was part of it."""
        value = call.values[-1]
        value.written.extend(earlier.text for earlier in value.doubtful)
        value.run.extend(earlier for earlier in value.doubtful if earlier.kind is not Kind.SPACE)
        call.state = _State.VALUE
        yield from self._read_value(call, lexeme)

    def _release(self) -> Iterator[str]:
        """What was held is text."""
        held = self._call.held if self._call else []
        self._call = None
        for lexeme in held:
            yield from self._text(lexeme)
