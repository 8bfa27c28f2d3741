"""MAX's reasoning parser for Step-3.5: which tokens of a response are thought, and which are the answer.

Thinking begins with a `<think>` that the prompt ends in, or that the model generates first; it ends at the first
`</think>` generated. Both are one token each, so no chunk of tokens holds a part of one. What follows is the answer,
tags among it. One line feed on the inner side of `<think>`, and one on each side of `</think>`, are layout and dropped,
as vLLM's parser of the same name drops those at `</think>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from max.pipelines.lib.reasoning import register
from max.pipelines.lib.tokenizer import convert_token_to_id
from max.pipelines.modeling.types import ParsedReasoningDelta, PipelineTokenizer, ReasoningParser, ReasoningSpan
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from .names import PARSER_NAME

_Item = TypeVar("_Item")

_TURN_START = "<|im_start|>"


class _Span(ReasoningSpan):
    """A chunk of which `thought` is reasoning, what follows `answer_start` is the answer, and the rest is layout.

    Args:
        first_answer_id: What to put in the place of the answer's first token, if anything.
    """

    def __init__(self, thought: range, answer_start: int, first_answer_id: int | None = None) -> None:
        super().__init__((0, answer_start), (thought.start, thought.stop))
        self._first_answer_id = first_answer_id

    @override
    def extract_content(self, seq: Sequence[_Item]) -> list[_Item]:
        """The answer's part of the chunk's tokens, or of other things that stand one for each token."""
        content: list[Any] = super().extract_content(seq)
        if self._first_answer_id is not None and isinstance(content[0], int):
            content[0] = self._first_answer_id
        return content


@register(PARSER_NAME)
class Step3p5ReasoningParser(ReasoningParser):
    """Separates thought from answer in the generated tokens, whatever chunks they come in.

    Args:
        tokenizer: The checkpoint's tokenizer.

    Raises:
        ValueError: Its vocabulary lacks a tag.
    """

    REASONING_START: ClassVar[str] = "<think>"
    REASONING_END: ClassVar[str] = "</think>"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._start_id, self._end_id = think_token_ids(tokenizer)
        self._turn_start_id = _token_id(tokenizer, _TURN_START)
        self.reset()

    @override
    def reset(self) -> None:
        """Begins a new response."""
        self._first_token = True
        self._after_start_tag = False
        self._after_end_tag = False
        self._line_feed_held = False

    @override
    def will_reason_after_prompt(self, prompt_token_ids: Sequence[int]) -> bool:
        """Whether the prompt's last turn has an open `<think>`; earlier turns, and what users write, do not count."""
        for token_id in reversed(prompt_token_ids):
            if token_id == self._start_id:
                return True
            if token_id in (self._end_id, self._turn_start_id):
                return False
        return False

    @override
    def stream(self, delta_token_ids: Sequence[int], is_currently_reasoning: bool = True) -> ParsedReasoningDelta:
        """Which of the next tokens are thought.

        Args:
            delta_token_ids: The next tokens, `[tokens]`; possibly none.
            is_currently_reasoning: What the call before said in `is_still_reasoning`, or `will_reason_after_prompt`.
        """
        count = len(delta_token_ids)
        if count == 0:
            return ParsedReasoningDelta(_Span(range(0), 0), is_currently_reasoning)
        thought_start = 0
        if self._first_token and delta_token_ids[0] == self._start_id:
            is_currently_reasoning = self._after_start_tag = True
            thought_start = 1
        self._first_token = False
        if not is_currently_reasoning:
            return ParsedReasoningDelta(self._answer(delta_token_ids, range(0), 0), False)
        end = next((at for at in range(thought_start, count) if delta_token_ids[at] == self._end_id), None)
        thought = range(thought_start, count if end is None else end)
        if end is None:
            return ParsedReasoningDelta(_Span(thought, count), True, self._format_thought)
        self._after_end_tag = True
        return ParsedReasoningDelta(self._answer(delta_token_ids, thought, end + 1), False, self._format_thought)

    def _answer(self, token_ids: Sequence[int], thought: range, start: int) -> _Span:
        """The chunk whose answer begins at `start`, without the line feed that may follow `</think>`."""
        if not self._after_end_tag or start == len(token_ids):
            return _Span(thought, start)
        self._after_end_tag = False
        text = str(self._tokenizer.decode([token_ids[start]]))
        if text == "\n":
            return _Span(thought, start + 1)
        if text.startswith("\n"):
            shorter = self._tokenizer.encode(text[1:], add_special_tokens=False)
            if len(shorter) == 1:
                return _Span(thought, start, first_answer_id=shorter[0])
        return _Span(thought, start)

    def _format_thought(self, text: str) -> str | None:
        """`text` without the layout; a last line feed is held back until more thought follows it."""
        if self._after_start_tag:
            self._after_start_tag = False
            text = text.removeprefix("\n")
        if self._line_feed_held and text:
            text = "\n" + text
            self._line_feed_held = False
        if text.endswith("\n"):
            self._line_feed_held = True
            text = text[:-1]
        return text or None

    @classmethod
    @override
    async def from_tokenizer(cls, tokenizer: PipelineTokenizer[Any, Any, Any]) -> Step3p5ReasoningParser:
        """The parser for a pipeline's tokenizer.

        Raises:
            ValueError: Its vocabulary lacks a tag.
        """
        return cls(tokenizer.delegate)  # which every text tokenizer of MAX has

    @classmethod
    @override
    async def reasoning_end_token_id(cls, tokenizer: PipelineTokenizer[Any, Any, Any]) -> int | None:
        """The id of `</think>`, after which a grammar applies to a response that begins in thought."""
        return await convert_token_to_id(tokenizer, cls.REASONING_END)


def think_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids of `<think>` and `</think>`.

    Raises:
        ValueError: The tokenizer's vocabulary lacks one.
    """
    parser = Step3p5ReasoningParser
    return _tag_id(tokenizer, parser.REASONING_START), _tag_id(tokenizer, parser.REASONING_END)


def _tag_id(tokenizer: PreTrainedTokenizerBase, tag: str) -> int:
    token_id = _token_id(tokenizer, tag)
    if token_id is None:
        raise ValueError(
            f"the tokenizer has no token {tag}, which the reasoning parser {PARSER_NAME} goes by. Use the "
            "checkpoint's own tokenizer, or --reasoning-parser none."
        )
    return token_id


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == token else None
