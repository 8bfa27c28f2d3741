"""Speculation is lossless over many long answers: 64 prompts of 256 new tokens each, at three batch sizes; minutes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from greedy import assert_equal_but_for_ties
from harness import FIRST_TEXT_TOKEN, Prompt
from max.pipelines.lib.auto_model import AutoModel
from reference import Reference
from speculation_harness import generate, load, request

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint

pytestmark = pytest.mark.skipif("STEP3P5_LONG_TESTS" not in os.environ, reason="minutes: make test-long")

NUM_PROMPTS, NEW_TOKENS, DEPTH = 64, 256, 3


def test_sixty_four_long_answers_are_those_of_the_plain_pipeline_at_every_batch_size(
    tmp_path: Path, rng: np.random.Generator, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "tiny"
    write_random_checkpoint(folder, "tiny", None, CheckpointDtype.FLOAT32, SEED, predictable=0.7)
    reference = Reference.from_checkpoint(folder)
    prompts = [
        rng.integers(FIRST_TEXT_TOKEN, 500, size=size).tolist() for size in rng.integers(1, 300, size=NUM_PROMPTS)
    ]
    with load(folder, 0) as plain, load(folder, DEPTH) as drafting:
        for batch_size in (1, 3, 8):
            want, got = (answers(model, prompts, batch_size) for model in (plain, drafting))
            assert {len(tokens) for tokens in got} == {NEW_TOKENS}
            ties = 0
            for prompt, tokens, others in zip(prompts, got, want, strict=True):
                assert_equal_but_for_ties(reference, prompt, tokens, others)
                ties += tokens != others
            record_property(f"answers of {NUM_PROMPTS} that part at a near tie, batch {batch_size}", ties)
        counts = drafting.pipeline.statistics
        record_property("acceptance by depth", [round(rate, 3) for rate in counts.acceptance])
        record_property("drafts verified", sum(counts.verified))


def answers(model: AutoModel, prompts: list[Prompt], batch_size: int) -> list[Prompt]:
    """Each prompt's greedy tokens, generated in batches of `batch_size`."""
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return [
        tokens for batch in batches for tokens in generate(model, [request(prompt, NEW_TOKENS) for prompt in batch])
    ]
