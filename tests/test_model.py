"""The model in MAX against the float64 reference, on a `tiny` checkpoint with every kind of layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flash_config import flash_config
from harness import Runner, assert_close, clear_prompt, is_clear
from reference import Reference

from step3p5.config_parser import parse_model_config
from step3p5.step3p5 import rope_configs


@pytest.mark.parametrize("length", [1, 5, 129, 300, 700])
def test_logits_after_a_prompt(
    tiny_model: Runner, tiny_reference: Reference, rng: np.random.Generator, length: int
) -> None:
    prompt = clear_prompt(tiny_reference, rng, length)
    _, (logits,) = tiny_model.run([prompt])
    assert_close(logits, tiny_reference.logits(prompt)[-1:])


@pytest.mark.parametrize("length", [1, 120, 700])
def test_logits_of_sixteen_decode_steps(
    tiny_model: Runner, tiny_reference: Reference, rng: np.random.Generator, length: int
) -> None:
    check_requests(tiny_model, tiny_reference, [clear_prompt(tiny_reference, rng, length)], steps=16)


def test_a_batch_of_mixed_lengths(tiny_model: Runner, tiny_reference: Reference, rng: np.random.Generator) -> None:
    prompts = [clear_prompt(tiny_reference, rng, length) for length in (300, 1, 129)]
    check_requests(tiny_model, tiny_reference, prompts, steps=16)


@pytest.mark.parametrize("chunk", [1, 128, 200])
def test_a_prompt_read_in_chunks(
    tiny_model: Runner, tiny_reference: Reference, rng: np.random.Generator, chunk: int
) -> None:
    prompts = [clear_prompt(tiny_reference, rng, length) for length in (300, 150)]
    check_requests(tiny_model, tiny_reference, prompts, steps=4, chunk=chunk)


def test_a_cached_prefix_gives_the_same_logits(tiny: Path, tiny_reference: Reference, rng: np.random.Generator) -> None:
    runner = Runner(tiny, enable_prefix_caching=True)
    prefix = clear_prompt(tiny_reference, rng, 384)
    for tail in (1, 40, 200):
        prompt = prefix + clear_prompt(tiny_reference, rng, tail)
        while not is_clear(tiny_reference, prompt):
            prompt = prefix + clear_prompt(tiny_reference, rng, tail)
        check_requests(runner, tiny_reference, [prompt], steps=4)
        assert runner.cached_blocks(prefix) > 0, "nothing of the prefix is in the cache"


def test_the_same_prompt_gives_the_same_bits(tiny_model: Runner, rng: np.random.Generator) -> None:
    prompt = rng.integers(16, 500, size=200).tolist()
    first, second = (tiny_model.run([prompt], steps=8)[1][0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def check_requests(
    runner: Runner, reference: Reference, prompts: list[list[int]], steps: int, chunk: int | None = None
) -> None:
    """Compares every step's logits, up to the first near tie that the generated tokens bring."""
    generated, logits = runner.run(prompts, steps, chunk)
    for prompt, tokens, got in zip(prompts, generated, logits, strict=True):
        assert len(tokens) == len(got) == steps
        sequence = prompt + tokens[:-1]
        compared = steps if is_clear(reference, sequence) else clear_steps(reference, prompt, tokens)
        want = reference.logits(sequence)[len(prompt) - 1 :]
        assert_close(got[:compared], want[:compared])
        # MAX never samples an id that the tokenizer has no token for.
        assert tokens[:compared] == want[:compared, : runner.num_tokens].argmax(axis=-1).tolist()


def clear_steps(reference: Reference, prompt: list[int], tokens: list[int]) -> int:
    """How many steps of a generation come before a router's near tie; at least the first."""
    steps = 1
    while steps < len(tokens) and is_clear(reference, prompt + tokens[:steps]):
        steps += 1
    return steps


def test_the_order_of_the_rotary_embeddings_is_that_of_the_layers() -> None:
    # Taken from a set, their order, and with it the graph's key in the cache of compiled graphs, was the process's own.
    layers = parse_model_config(flash_config()).layers
    thetas = [float(theta) for theta in range(2000, 1000, -25)]
    assert layers[0].attention.rope is not None
    ropes = [replace(layers[0].attention.rope, theta=theta) for theta in thetas]
    rotating = [
        replace(layers[0], attention=replace(layers[0].attention, rope=rope)) for rope in (*ropes, None, *ropes)
    ]
    assert rope_configs(rotating) == ropes
