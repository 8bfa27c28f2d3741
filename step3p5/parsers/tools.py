"""MAX's tool parser for Step-3.5: calls out of a response, whole or streamed, and the grammar that forces them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from max.pipelines.lib.tool_parsing import StructuralTagToolParser, generate_call_id, register
from max.pipelines.modeling.types import ParsedToolCall, ParsedToolCallDelta, ParsedToolResponse

from .arguments import arguments_json
from .calls import Call, CallReader
from .grammar import tool_call_grammar
from .json_types import Schema
from .names import PARSER_NAME


@register(PARSER_NAME)
class Step3p5ToolParser:
    """A `max.pipelines.modeling.types.ToolParser`; the format is described in `calls`, the typing in `arguments`.

    A streamed response gives, put together, what the whole response gives: `parse_complete` streams it in one piece.
    Calls appear when they are complete. Whatever is not a complete call is content, to the last character.
    """

    # MAX enforces the grammar of `tool_choice: auto` from the first appearance of such a marker, in a thought or in
    # prose about tools as well. Without markers it leaves `auto` to the model, and enforces the other choices only.
    SECTION_BEGIN: ClassVar[str] = ""
    SECTION_END: ClassVar[str] = ""
    CALL_BEGIN: ClassVar[str] = ""

    def __init__(self) -> None:
        self._schemas: Mapping[str, Schema] = {}
        self.reset()

    def reset(self) -> None:
        """Begins a new response; the schemas stay."""
        self._reader = CallReader()
        self._calls = 0

    def set_tool_schemas(self, schemas: Mapping[str, Schema]) -> None:
        """Sets the JSON schemas of the parameters by function name, for responses parsed whole."""
        self._schemas = schemas

    def set_streaming_tool_schemas(self, schemas: Mapping[str, Schema]) -> None:
        """Sets the JSON schemas of the parameters by function name, for streamed responses."""
        self._schemas = schemas

    def parse_complete(self, response: str) -> ParsedToolResponse:
        """Calls and content of a whole response; content is `None` where nothing is left of it."""
        self.reset()
        deltas = self.parse_delta(response)
        content = "".join(delta.content or "" for delta in deltas) + (self.flush() or "")
        calls = [
            ParsedToolCall(id=delta.id, name=delta.name, arguments=delta.arguments or "")
            for delta in deltas
            if delta.id is not None and delta.name is not None
        ]
        return ParsedToolResponse(content=content or None, tool_calls=calls)

    def parse_delta(self, delta: str) -> list[ParsedToolCallDelta]:
        """What `delta` makes certain: content, and calls with all of their arguments. Often nothing: an empty list."""
        return self._deltas(self._reader.feed(delta))

    def flush(self) -> str | None:
        """Ends the response.

        Returns:
            The content that was held back, such as the text of an incomplete call; `None` if there is none.
        """
        content = "".join(self._reader.end())
        self.reset()
        return content or None

    def generate_tool_call_grammar(
        self,
        *,
        tools: list[dict[str, Any]],
        tool_choice: str | dict[str, Any] | None,
        response_format_schema: dict[str, Any] | None = None,
        reject_unsupported: bool = False,
        **_: object,
    ) -> str:
        """As of `tool_call_grammar`; MAX asks for it if a request offers tools."""
        return tool_call_grammar(tools, tool_choice, response_format_schema, reject_unsupported)

    def _deltas(self, items: Iterable[str | Call]) -> list[ParsedToolCallDelta]:
        deltas = []
        content: list[str] = []
        for item in items:
            if isinstance(item, str):
                content.append(item)
                continue
            deltas.append(
                ParsedToolCallDelta(
                    index=self._calls,
                    id=generate_call_id(),
                    name=item.name,
                    arguments=arguments_json(item.arguments, self._schemas.get(item.name)),
                )
            )
            self._calls += 1
        if content:
            deltas.insert(0, ParsedToolCallDelta(index=0, content="".join(content)))
        return deltas


# MAX asks only parsers of this class for what they hold back when a stream ends. Its own parsing is not used.
StructuralTagToolParser.register(Step3p5ToolParser)
