"""Requests for what a server must be started with: to one that was, and to one that was not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.context.exceptions import InputError
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_args import PipelineArgs
from max.pipelines.lib.registry import PIPELINE_REGISTRY
from max.pipelines.modeling.types import RequestID, TextGenerationRequest

OPTIONS = {"enable_echo": True, "enable_penalties": True, "enable_min_tokens": True}


def tokenizer(folder: Path, **options: bool) -> Any:
    args = PipelineArgs.from_flat_kwargs(
        model_path=str(folder),
        custom_architectures=["pipelines_registry"],
        device_specs="cpu",
        max_length=64,
        **options,
    )
    return PIPELINE_REGISTRY.retrieve_factory(PipelineConfig.from_args(args)).tokenizer


def context(made_by: Any, echo: bool = False, **sampling: Any) -> TextContext:
    request = TextGenerationRequest(
        request_id=RequestID(),
        model_name="model",
        prompt=[20] * 10,
        echo=echo,
        sampling_params=SamplingParams(max_new_tokens=4, **sampling),
    )
    new_context: TextContext = asyncio.run(made_by.new_context(request))
    return new_context


def test_what_the_server_was_not_started_with_is_refused_with_the_option_that_it_takes(tiny: Path) -> None:
    plain, able = tokenizer(tiny), tokenizer(tiny, **OPTIONS)
    for option, wanted in (
        ("--enable-echo", {"echo": True}),
        ("--enable-min-tokens", {"min_new_tokens": 2}),
        ("--enable-penalties", {"presence_penalty": -0.5}),
        ("--enable-penalties", {"repetition_penalty": 1.1}),
    ):
        with pytest.raises(InputError, match=option):
            context(plain, **wanted)
        assert context(able, **wanted).tokens.prompt_length == 10


def test_more_min_tokens_than_fit_are_refused(tiny: Path) -> None:
    with pytest.raises(InputError, match=r"min_tokens \(5\).*Lower min_tokens"):
        context(tokenizer(tiny, enable_min_tokens=True), min_new_tokens=5)
