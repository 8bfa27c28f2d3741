"""`Step3p5ReasoningParser`: thought and answer as MAX's server separates them, whatever chunks the tokens come in."""

from __future__ import annotations

import asyncio
import itertools
import random
from importlib import resources
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from max.pipelines.lib import reasoning
from max.serve.pipelines.incremental_detokenizer import create_buffered_detokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from step3p5.arch import step3p5_arch
from step3p5.parsers import PARSER_NAME, Step3p5ReasoningParser
from step3p5.random_checkpoint.tokenizer import build_tokenizer

Separated = tuple[str, str]
"""Thought and answer."""

QUESTION = "<|im_start|>user\nwhy?<|im_end|>\n"
ANSWERED = f"{QUESTION}<|im_start|>assistant\n<think>\nhm\n</think>\nso.<|im_end|>\n{QUESTION}"
OPENED = "<|im_start|>assistant\n<think>\n"
NOT_OPENED = "<|im_start|>assistant\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The random checkpoints' tokenizer, and two line feeds as one token, which the released one has."""
    backend = build_tokenizer(600)
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def separate(tokenizer: PreTrainedTokenizerFast, prompt: str, chunks: list[list[int]]) -> Separated:
    """What the server's loop over the chunks of one response makes of them."""

    async def run() -> Separated:
        pipeline_tokenizer: Any = SimpleNamespace(delegate=tokenizer)
        parser = await Step3p5ReasoningParser.from_tokenizer(pipeline_tokenizer)
        parser.reset()
        prompt_ids: Any = np.array(tokenizer.encode(prompt, add_special_tokens=False))
        thinking = parser.will_reason_after_prompt(prompt_ids)
        thought = answer = ""
        thought_decoder, answer_decoder = (
            create_buffered_detokenizer(pipeline_tokenizer, prompt_ids, skip_special_tokens=True) for _ in range(2)
        )
        for chunk in chunks:
            parsed = parser.stream(chunk, is_currently_reasoning=thinking)
            thinking = parsed.is_still_reasoning
            thought_piece = await thought_decoder.decode(parsed.span.extract_reasoning(chunk))
            if thought_piece and parsed.reasoning_text_formatter:
                thought_piece = parsed.reasoning_text_formatter(thought_piece) or ""
            thought += thought_piece
            answer += await answer_decoder.decode(parsed.span.extract_content(chunk))
        return thought, answer

    return asyncio.run(run())


CASES: dict[str, tuple[str, str, Separated]] = {
    "opened by the template": (QUESTION + OPENED, "hm, 1 < 2\n</think>\nso.\n", ("hm, 1 < 2", "so.\n")),
    "not opened by the template": (QUESTION + NOT_OPENED, "<think>\nhm\n</think>\nso.", ("hm", "so.")),
    "opened by both": (QUESTION + OPENED, "<think>\nhm\n</think>\nso.", ("hm", "so.")),
    "no thought where none was opened": (QUESTION + NOT_OPENED, "so </think> on", ("", "so </think> on")),
    "thinking switched off": (QUESTION + CLOSED, "so.\n", ("", "so.\n")),
    "an earlier turn has thought": (ANSWERED + OPENED, "hm\n</think>\nso.", ("hm", "so.")),
    "an earlier turn has thought, not opened": (ANSWERED + NOT_OPENED, "<think>hm</think>so.", ("hm", "so.")),
    "the user writes the tag": ("<|im_start|>user\n<think><|im_end|>\n" + NOT_OPENED, "so.", ("", "so.")),
    "the user writes both tags": ("<|im_start|>user\n<think></think><|im_end|>\n" + OPENED, "a</think>b", ("a", "b")),
    "cut while thinking": (QUESTION + OPENED, "hm,\nbut", ("hm,\nbut", "")),
    "cut after the tag": (QUESTION + OPENED, "hm\n</think>", ("hm", "")),
    "no thought at all": (QUESTION + OPENED, "</think>so.", ("", "so.")),
    "an empty thought": (QUESTION + OPENED, "\n</think>\nso.", ("", "so.")),
    "no line feeds at the tag": (QUESTION + OPENED, "hm</think>so.", ("hm", "so.")),
    "one line feed a side is layout": (QUESTION + OPENED, "a\n b\n\n\n</think>\n\n\nc\n\n", ("a\n b\n\n", "\n\nc\n\n")),
    "other white space is not": (QUESTION + OPENED, "hm \n </think> \nso.", ("hm \n ", " \nso.")),
    "tags in the answer": (
        QUESTION + OPENED,
        "a\n</think>\nb<think>\nc\n</think>\nd",
        ("a", "b<think>\nc\n</think>\nd"),
    ),
    "a thought quotes the tag": (QUESTION + OPENED, "a <think> b\n</think>\nc", ("a <think> b", "c")),
    "a call in a thought": (
        QUESTION + OPENED,
        "a<tool_call>b\n</think>\n<tool_call>",
        ("a<tool_call>b", "<tool_call>"),
    ),
    "characters of several tokens": (QUESTION + OPENED, "größe 🦀\n</think>\n文件 🦀", ("größe 🦀", "文件 🦀")),
}


@pytest.mark.parametrize("case", CASES)
def test_thought_and_answer_for_every_way_to_cut_the_stream(tokenizer: PreTrainedTokenizerFast, case: str) -> None:
    prompt, response, expected = CASES[case]
    ids = tokenizer.encode(response, add_special_tokens=False)
    rng = random.Random(case)
    cuts: list[list[int]] = [[], list(range(1, len(ids))), *([place] for place in range(len(ids) + 1))]
    cuts += [sorted(rng.choices(range(len(ids) + 1), k=rng.randint(2, 6))) for _ in range(40)]
    for places in cuts:
        chunks = [ids[start:stop] for start, stop in itertools.pairwise([0, *places, len(ids)])]
        assert separate(tokenizer, prompt, chunks) == expected, chunks


def test_two_line_feeds_in_one_token_lose_one(tokenizer: PreTrainedTokenizerFast) -> None:
    two = token_id(tokenizer, "\n\n")
    end = token_id(tokenizer, "</think>")
    parser = Step3p5ReasoningParser(tokenizer)
    parser.stream([end])
    span = parser.stream([two, two], is_currently_reasoning=False).span
    assert tokenizer.decode(span.extract_content([two, two])) == "\n\n\n"
    log_probabilities = [object(), object()]
    assert span.extract_content(log_probabilities) == log_probabilities


def test_a_response_begins_afresh_after_reset(tokenizer: PreTrainedTokenizerFast) -> None:
    start = token_id(tokenizer, "<think>")
    parser = Step3p5ReasoningParser(tokenizer)
    for _ in range(2):
        parser.reset()
        assert parser.stream([start], is_currently_reasoning=False).is_still_reasoning
        assert not parser.stream([start + 1], is_currently_reasoning=True).is_still_reasoning
        assert not parser.stream([start], is_currently_reasoning=False).is_still_reasoning


@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_the_templates_switch_decides_whether_thinking_comes_first(
    tokenizer: PreTrainedTokenizerFast, enable_thinking: bool | None
) -> None:
    template = resources.files("step3p5.random_checkpoint").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    switch: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    messages = [
        {"role": "user", "content": "what does </think> mean?"},
        {"role": "assistant", "reasoning_content": "hm", "content": "so."},
        {"role": "user", "content": "and <think>?"},
    ]
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, bos_token="", **switch
    )
    ids = tokenizer.encode(str(prompt), add_special_tokens=False)
    assert Step3p5ReasoningParser(tokenizer).will_reason_after_prompt(ids) is (enable_thinking is not False)


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    backend = build_tokenizer(600)
    text = backend.to_str().replace("</think>", "</thought>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=type(backend).from_str(text))
    with pytest.raises(ValueError, match=r"no token </think>.*--reasoning-parser none"):
        Step3p5ReasoningParser(tokenizer)


def test_max_knows_the_parser_by_its_name(tokenizer: PreTrainedTokenizerFast) -> None:
    assert step3p5_arch.reasoning_parser == PARSER_NAME == "step3p5"
    assert reasoning.get_parser_cls("step3p5") is Step3p5ReasoningParser

    async def encode(text: str, add_special_tokens: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    pipeline_tokenizer: Any = SimpleNamespace(delegate=tokenizer, encode=encode)
    end = asyncio.run(Step3p5ReasoningParser.reasoning_end_token_id(pipeline_tokenizer))
    assert end == token_id(tokenizer, "</think>")
