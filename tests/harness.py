"""What the tests use to run a model in MAX and to compare it with the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from max.pipelines.context import EOSTracker, ProcessorInputs, SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.lib.generate import GenerateIterator
from max.pipelines.modeling.types import RequestID
from reference import Reference
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint.writer import write_random_checkpoint

Logits = npt.NDArray[np.float32]
Prompt = list[int]

TOLERANCE = 1e-5
"""Largest difference from the float64 reference, as a share of its largest logit."""

NEAR_TIE = 1e-5
"""Two router scores this close may swap places in float32: such a prompt cannot tell right from wrong."""

FIRST_TEXT_TOKEN = 16
"""Special tokens stand before it."""


def write_checkpoint(folder: Path, seed: int, preset: str = "tiny") -> Path:
    """Writes a random float32 checkpoint and returns its folder."""
    write_random_checkpoint(folder, preset, None, CheckpointDtype.FLOAT32, seed)
    return folder


def edit_head(checkpoint: Path, edit: Callable[[npt.NDArray[np.float32]], None]) -> None:
    """Applies `edit` to the head `[vocab_size, hidden_size]` of a checkpoint in float32."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    file = checkpoint / index["weight_map"]["lm_head.weight"]
    tensors = load_file(file)
    edit(tensors["lm_head.weight"])
    save_file(tensors, file, metadata={"format": "pt"})


def silence_unknown(checkpoint: Path) -> None:
    """Zeroes the head's rows of what the tokenizer does not know, which a server never samples: none is ever best."""
    known = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size()

    def silence(head: npt.NDArray[np.float32]) -> None:
        head[known:] = 0

    edit_head(checkpoint, silence)


def clear_prompt(
    reference: Reference, rng: np.random.Generator, length: int, answer: Callable[[Prompt], Prompt] = lambda _: []
) -> Prompt:
    """A random prompt on which, with the tokens of an answer to it, no router choice is a near tie."""
    for _ in range(50):
        prompt = rng.integers(FIRST_TEXT_TOKEN, reference.config["vocab_size"], size=length).tolist()
        if is_clear(reference, prompt + answer(prompt)):
            return list(prompt)
    raise AssertionError(f"no prompt of {length} tokens without a near tie in 50 draws")


def is_clear(reference: Reference, tokens: Sequence[int]) -> bool:
    """Whether every router choice along `tokens` is wider than a float32 rounding."""
    reference.router_margin = np.inf
    reference.hidden_states(tokens)
    return reference.router_margin > NEAR_TIE


def assert_close(got: npt.NDArray[np.float32], want: npt.NDArray[np.float64]) -> None:
    """Holds logits `[..., vocab_size]` to `TOLERANCE`."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = float(np.abs(got - want).max() / np.abs(want).max())
    assert error <= TOLERANCE, f"logits differ by {error:.2e} of the largest"


class Runner:
    """A model in MAX on the CPU, driven step by step.

    Args:
        folder: The checkpoint.
        max_batch_size: Requests at a time.
        options: Flat pipeline arguments, over `AutoModel`'s own.
    """

    def __init__(self, folder: Path, max_batch_size: int = 3, **options: object) -> None:
        settings: dict[str, object] = {"custom_architectures": ["pipelines_registry"], "max_length": 1024} | options
        self.model = AutoModel(str(folder), max_batch_size=max_batch_size, devices="cpu", **settings)

    @property
    def num_tokens(self) -> int:
        """Tokens that the tokenizer knows; the vocabulary may have more rows."""
        return int(self.model.pipeline.tokenizer.tokenizer_vocab_size)

    def cached_blocks(self, prompt: Prompt) -> int:
        """Blocks of `prompt` that the prefix cache holds."""
        context = self._context(prompt, 1, [])
        hits = self.model.pipeline.kv_manager.get_prefix_cache_hit_counts(context)
        return sum(hit.total_blocks for hit in hits)

    def run(
        self, prompts: Sequence[Prompt], steps: int = 1, chunk: int | None = None
    ) -> tuple[list[Prompt], list[Logits]]:
        """Generates greedily, all prompts in one batch.

        Args:
            prompts: Token ids of each request.
            steps: New tokens of each request.
            chunk: Longest piece of a prompt that one step reads; all of it where absent.

        Returns:
            Each request's new tokens, and the logits `[steps, vocab_size]` that they were chosen from.
        """
        recorded: list[list[Logits]] = [[] for _ in prompts]
        contexts = [self._context(p, steps, rows) for p, rows in zip(prompts, recorded, strict=True)]
        generated: list[Prompt] = [[] for _ in prompts]
        with GenerateIterator.from_contexts(self.model.pipeline, contexts) as batch:
            while not batch.done:
                for context in contexts:
                    if chunk is not None and context.tokens.active_length > chunk:
                        context.tokens.chunk(chunk)
                for row, tokens in batch.step().items():
                    generated[row] += tokens
        return generated, [np.stack(rows[-steps:]) for rows in recorded]

    @staticmethod
    def _context(prompt: Prompt, steps: int, rows: list[Logits]) -> TextContext:
        def record(inputs: ProcessorInputs) -> None:
            rows.append(np.array(inputs.logits[-1, :].to_numpy(), dtype=np.float32))

        return TextContext(
            request_id=RequestID(),
            max_length=len(prompt) + steps,
            tokens=TokenBuffer(np.asarray(prompt, dtype=np.int64)),
            eos_tracker=EOSTracker(eos_token_ids=set()),
            sampling_params=SamplingParams(
                max_new_tokens=steps, temperature=0.0, top_k=1, ignore_eos=True, logits_processors=[record]
            ),
        )
