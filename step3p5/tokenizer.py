"""Requests into token ids: MAX's text tokenizer, with requests refused that have nothing to read or no embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from max.pipelines.context import TextContext
from max.pipelines.context.exceptions import InputError
from max.pipelines.lib import PipelineConfig, TextTokenizer
from max.pipelines.modeling.types import TextGenerationRequest
from typing_extensions import override

from .parsers import TAGS, think_token_ids
from .pretrained_config import as_step3p5_config
from .structured_output import allow_on_cpu


class Step3p5Tokenizer(TextTokenizer):
    """A `TextTokenizer` that raises `InputError`, which a server answers with status 400, for requests it cannot take.

    Args:
        model_path: The checkpoint, whose tokenizer is loaded.
        pipeline_config: The pipeline's configuration. On a CPU its `sampling.enable_structured_output` is set.
        options: As of `TextTokenizer`.

    Attributes:
        skipped_special_token_ids: The special tokens that responses do not show: all but the tags that parsers read.
        reasoning_start_token_id, reasoning_end_token_id: Of `<think>` and `</think>`, if a reasoning parser is in use;
            MAX's overlapped pipeline then asks for them.

    Raises:
        ValueError: A reasoning parser is in use, and the vocabulary lacks a tag.
    """

    def __init__(self, model_path: str, pipeline_config: PipelineConfig, **options: Any) -> None:
        super().__init__(model_path, pipeline_config, **options)
        self._vocab_size = as_step3p5_config(pipeline_config.model.huggingface_config).model_config.vocab_size
        self.skipped_special_token_ids = {
            token_id
            for token_id, token in self.delegate.added_tokens_decoder.items()
            if token.special and token.content not in TAGS
        }
        if pipeline_config.runtime.reasoning_parser is not None:
            self.reasoning_start_token_id, self.reasoning_end_token_id = think_token_ids(self.delegate)
        allow_on_cpu(pipeline_config)

    @override
    async def encode(
        self, prompt: str | Sequence[int], add_special_tokens: bool = True
    ) -> npt.NDArray[np.integer[Any]]:
        """The token ids of `prompt`, `[tokens]`; ids are passed through.

        Raises:
            InputError: An id is outside the model's vocabulary, or the ids are more than `--max-length`.
        """
        if not isinstance(prompt, str):
            check_token_ids(prompt, self._vocab_size)
        return await super().encode(prompt, add_special_tokens)

    @override
    async def new_context(self, request: TextGenerationRequest) -> TextContext:
        """The state of a new request.

        Raises:
            InputError: As of `encode`; or the prompt is empty, or no message of the chat says anything.
        """
        if not request.prompt and not any(_says_something(message.flatten_content()) for message in request.messages):
            raise InputError("prompt: found nothing, expected at least one character or token. Give a prompt.")
        context = await super().new_context(request)
        # A parser has to answer MAX with a string. Were the empty one left, the request would count as constrained.
        context.grammar = context.grammar or None
        return context


def check_token_ids(token_ids: Sequence[int] | npt.NDArray[np.integer[Any]], vocab_size: int) -> None:
    """Refuses ids `[tokens]` that have no row in the embedding.

    Raises:
        InputError: An id is negative, or `vocab_size` or more.
    """
    ids = np.asarray(token_ids)
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        raise InputError(
            f"prompt[{outside[0]}]: found token {token_ids[outside[0]]}, expected 0 to {vocab_size - 1} (vocab_size in "
            "config.json). Encode the prompt with this model's tokenizer."
        )


def _says_something(message: dict[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))
