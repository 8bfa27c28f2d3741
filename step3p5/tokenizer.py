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
from tokenizers import Tokenizer, decoders
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
        self._enable_echo = pipeline_config.model.enable_echo
        self._enable_penalties = pipeline_config.sampling.enable_penalties
        self._enable_min_tokens = pipeline_config.sampling.enable_min_tokens
        self._token_bytes = most_bytes_of_a_token(self.delegate.backend_tokenizer)

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
        elif self._token_bytes is not None and self.max_length:
            check_text_length(prompt, self._token_bytes, self.max_length)
        return await super().encode(prompt, add_special_tokens)

    @override
    async def new_context(self, request: TextGenerationRequest) -> TextContext:
        """The state of a new request.

        Raises:
            InputError: As of `encode`; or the prompt is empty, no message of the chat says anything, what is asked for
                needs an option that the server was not started with, or `min_tokens` do not fit behind the prompt.
        """
        self._check_options(request)
        if not request.prompt and not any(_says_something(message.flatten_content()) for message in request.messages):
            raise InputError("prompt: found nothing, expected at least one character or token. Give a prompt.")
        try:
            context = await super().new_context(request)
        except InputError:
            raise
        except ValueError as error:
            if not str(error).startswith("min_tokens"):
                raise
            raise InputError(f"{error}. Lower min_tokens, or raise max_tokens or --max-length.") from error
        # A parser has to answer MAX with a string. Were the empty one left, the request would count as constrained.
        context.grammar = context.grammar or None
        return context

    def _check_options(self, request: TextGenerationRequest) -> None:
        # MAX finds the first out in the worker, whose end takes the server down, and ignores the others.
        sampling = request.sampling_params
        if request.echo and not self._enable_echo:
            raise InputError("echo: found true, expected false. Start the server with --enable-echo, or leave it out.")
        if sampling.min_new_tokens > 0 and not self._enable_min_tokens:
            raise InputError(
                f"min_tokens: found {sampling.min_new_tokens}, expected 0. Start the server with --enable-min-tokens, "
                "or leave it out."
            )
        if sampling.needs_penalties and not self._enable_penalties:
            raise InputError(
                f"frequency_penalty, presence_penalty, repetition_penalty: found {sampling.frequency_penalty}, "
                f"{sampling.presence_penalty}, {sampling.repetition_penalty}, expected 0, 0, 1. Start the server with "
                "--enable-penalties, or leave them out."
            )


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


def most_bytes_of_a_token(tokenizer: Tokenizer) -> int | None:
    """The longest text that one token can stand for, in UTF-8 bytes; nothing where there is no telling.

    The tokenizer must work on bytes (a token's spelling has a character a byte) and keep all of a text: no normalizer,
    no added token that swallows the white space around it.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if tokenizer.normalizer is not None or any(token.lstrip or token.rstrip for token in added):
        return None
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    return max(len(token.encode()) for token in tokenizer.get_vocab())


def check_text_length(text: str, token_bytes: int, max_length: int) -> None:
    """Refuses a text that is too long however it is cut into tokens, before the time is spent to cut it.

    Raises:
        InputError: It is at least `max_length + 1` tokens, of at most `token_bytes` bytes each.
    """
    if len(text) > token_bytes * max_length:
        at_least = -(-len(text) // token_bytes)
        raise InputError(
            f"prompt: found {len(text)} characters, at least {at_least} tokens, expected at most {max_length} tokens "
            "(--max-length). Shorten the prompt."
        )


def _says_something(message: dict[str, Any]) -> bool:
    return bool(message.get("content") or message.get("tool_calls"))
