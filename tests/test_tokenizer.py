"""What `Step3p5Tokenizer` does for the parsers and for structured output, as MAX makes it for a server."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from max.pipelines.context import SamplingParams, TextContext, TextGenerationResponseFormat
from max.pipelines.lib import PIPELINE_REGISTRY, PipelineConfig
from max.pipelines.lib.pipeline_args import PipelineArgs
from max.pipelines.modeling.types import (
    ReasoningPipelineTokenizer,
    RequestID,
    TextGenerationRequest,
    TextGenerationRequestMessage,
)
from max.serve.pipelines.incremental_detokenizer import create_buffered_detokenizer

from step3p5.tokenizer import Step3p5Tokenizer

TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def configure(folder: Path, **options: Any) -> PipelineConfig:
    flags: dict[str, Any] = {"custom_architectures": ["pipelines_registry"], "device_specs": "cpu", "max_length": 512}
    return PipelineConfig.from_args(PipelineArgs.from_flat_kwargs(model_path=str(folder), **(flags | options)))


def made_for(config: PipelineConfig) -> Step3p5Tokenizer:
    tokenizer = PIPELINE_REGISTRY.retrieve_factory(config).tokenizer
    assert isinstance(tokenizer, Step3p5Tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Step3p5Tokenizer:
    return made_for(configure(tiny))


def rewritten(tiny: Path, folder: Path, change: Any) -> Path:
    """A copy of `tiny` with `change` made to its tokenizer."""
    shutil.copytree(tiny, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def context(tokenizer: Step3p5Tokenizer, grammar: str | None) -> TextContext:
    response_format = TextGenerationResponseFormat(
        type="grammar", grammar=grammar, json_schema=None, grammar_enforced=bool(grammar), tools_forced=bool(grammar)
    )
    request = TextGenerationRequest(
        request_id=RequestID(),
        model_name="model",
        messages=[TextGenerationRequestMessage(role="user", content="Hi")],
        sampling_params=SamplingParams(max_new_tokens=4),
        response_format=response_format,
    )
    return asyncio.run(tokenizer.new_context(request))


def test_the_overlapped_pipeline_gets_the_ids_that_it_asks_for(tokenizer: Step3p5Tokenizer) -> None:
    assert isinstance(tokenizer, ReasoningPipelineTokenizer)
    ids = [tokenizer.reasoning_start_token_id, tokenizer.reasoning_end_token_id]
    assert tokenizer.delegate.convert_ids_to_tokens(ids) == ["<think>", "</think>"]


def test_tags_that_are_special_tokens_reach_the_parsers(tiny: Path, tmp_path: Path) -> None:
    def mark_special(content: Any) -> None:
        for token in content["added_tokens"]:
            token["special"] = True

    tokenizer = made_for(configure(rewritten(tiny, tmp_path / "special", mark_special)))
    ids = tokenizer.delegate.encode("".join(TAGS) + "so.<|im_end|>", add_special_tokens=False)
    text = asyncio.run(create_buffered_detokenizer(tokenizer, [], skip_special_tokens=True).decode(ids))
    assert text == "".join(TAGS) + "so."


def test_a_tokenizer_without_the_tags_needs_the_parser_off(tiny: Path, tmp_path: Path) -> None:
    def rename(content: Any) -> None:
        for token in content["added_tokens"]:
            token["content"] = token["content"].replace("think", "thought")
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {
            name.replace("<think", "<thought").replace("</think", "</thought"): id_ for name, id_ in vocabulary.items()
        }

    folder = rewritten(tiny, tmp_path / "untagged", rename)
    with pytest.raises(ValueError, match=r"no token <think>.*--reasoning-parser none"):
        made_for(configure(folder))
    made_for(configure(folder, reasoning_parser="none"))


def test_a_grammar_waits_for_the_end_of_the_thought(tokenizer: Step3p5Tokenizer) -> None:
    state = context(tokenizer, '{"type": "structural_tag"}').grammar_state
    assert not state.grammar_enforced
    assert not state.update_enforcement_state(5)
    state.update_enforcement_state(tokenizer.reasoning_end_token_id)
    assert state.grammar_enforced


def test_no_grammar_leaves_the_request_unconstrained(tokenizer: Step3p5Tokenizer) -> None:
    made = context(tokenizer, "")
    assert made.grammar is None
    assert made.grammar_state.thinking_region_delimiters is None


def test_structured_output_is_on_where_its_flag_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="enable_structured_output is not currently supported on CPU"):
        configure(tiny, enable_structured_output=True)
    config = configure(tiny)
    made_for(config)
    assert config.sampling.enable_structured_output
