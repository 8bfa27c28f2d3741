"""Compares a model's decoding with another run's: the same tokens are given to both, and every step's logits compared.

A comparison of freely chosen tokens ends at the first tie. Where both read the same tokens, each step counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from max.pipelines.lib.auto_model import AutoModel
from max.pipelines.modeling.types import TextGenerationInputs

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]

PROMPT_LENGTHS = (1, 2, 7, 64, 200, 511, 700, 1500)
"""On both sides of the sliding window and of a page of the cache."""

BFLOAT16_BITS = 8
"""Of a significand, the leading one included."""


def random_prompts(vocab_size: int, seed: int = 0) -> list[list[int]]:
    """A prompt of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab_size, size=length).tolist() for length in PROMPT_LENGTHS]


@contextmanager
def synchronous(pipeline: Any, replicas: int) -> Iterator[None]:
    """Lets an overlapped pipeline return each step's tokens, and its logits, in that step."""
    finish(pipeline, replicas)
    before, pipeline._disable_overlap = pipeline._disable_overlap, True
    try:
        yield
    finally:
        pipeline._disable_overlap = before


def finish(pipeline: Any, replicas: int) -> None:
    """Takes what the last batch began and nobody waited for."""
    while pipeline.has_pending_outputs():
        pipeline.execute(TextGenerationInputs(batches=[[] for _ in range(replicas)]))


def decode(
    model: AutoModel, prompts: Sequence[Sequence[int]], steps: int, forced: Tokens | None = None
) -> tuple[Tokens, list[Logits]]:
    """Decodes `steps` tokens of each prompt on a synchronous pipeline.

    Args:
        model: The model.
        prompts: Prompts.
        steps: Tokens to choose.
        forced: What is read instead of the chosen tokens, `[prompts, steps]`; `None` for the chosen ones.

    Returns:
        The chosen tokens, `[prompts, steps]`, and of each prompt the logits, `[steps, vocab_size]`.
    """
    options = dict(max_new_tokens=steps, temperature=0.0, ignore_eos=True, output_logits=True)
    with model.generate_iter(prompts, **options) as batch:
        for step in range(steps):
            batch.step()
            if forced is not None and not batch.done:
                for row, context in enumerate(batch._contexts):
                    context.tokens.overwrite_last_token(int(forced[row, step]))
        chosen = [row[len(prompt) :] for row, prompt in zip(batch.sequences, prompts, strict=True)]
        return np.array(chosen), batch.logits


def decode_freely(model: AutoModel, prompts: Sequence[Sequence[int]], steps: int) -> Tokens:
    """The tokens that the pipeline chooses as it is served, overlap included, `[prompts, steps]`."""
    tokens: list[list[int]] = [[] for _ in prompts]
    with model.generate_iter(prompts, max_new_tokens=steps, temperature=0.0, ignore_eos=True) as batch:
        while not batch.done:
            for row, new in batch.step().items():
                tokens[row] += new
    return np.array(tokens)


@dataclass(frozen=True)
class Agreement:
    """How the logits of two runs over the same tokens differ; all positions of all requests.

    Differences are shares of the position's largest absolute logit. A gap is how much less the reference gives the
    token that is best here than its own best; it is counted in spacings of bfloat16 numbers at the largest logit.
    """

    name: str
    positions: int
    largest_difference: float
    root_mean_square: float
    """Over the standard deviation of the position's logits."""
    other_best: int
    largest_gap: float
    beyond_rounding: int
    """Positions whose gap is larger than two spacings: each of the two logits is rounded."""
    bfloat16_step: float
    """A spacing at the largest logit as a share of it, the mean."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "logits, of those of one GPU",
        "positions",
        "largest difference",
        "rms / std",
        "other best token",
        "largest gap, bf16 steps",
        "gaps > 2 steps",
    )

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            self.name,
            str(self.positions),
            f"{self.largest_difference:.5f}",
            f"{self.root_mean_square:.5f}",
            str(self.other_best),
            f"{self.largest_gap:.2f}",
            str(self.beyond_rounding),
        )

    @classmethod
    def of(cls, name: str, reference: Sequence[Logits], here: Sequence[Logits]) -> Agreement:
        """Compares logits `[steps, vocab_size]` of each request."""
        differences, noise, gaps, spacings = [], [], [], []
        for wanted, found in zip(reference, here, strict=True):
            wanted = np.asarray(wanted)
            largest = np.abs(wanted).max(axis=1)
            difference = np.abs(found - wanted)
            differences.append(difference.max(axis=1) / largest)
            noise.append(np.sqrt((difference**2).mean(axis=1)) / wanted.std(axis=1))
            step = np.exp2(np.floor(np.log2(largest)) - (BFLOAT16_BITS - 1))
            spacings.append(step / largest)
            rows = np.arange(len(wanted))
            gaps.append((wanted.max(axis=1) - wanted[rows, found.argmax(axis=1)]) / step)
        every_gap = np.concatenate(gaps)
        others = sum(int((w.argmax(1) != h.argmax(1)).sum()) for w, h in zip(reference, here, strict=True))
        return cls(
            name=name,
            positions=len(every_gap),
            largest_difference=float(np.concatenate(differences).max()),
            root_mean_square=float(np.concatenate(noise).mean()),
            other_best=others,
            largest_gap=float(every_gap.max()),
            beyond_rounding=int((every_gap > 2).sum()),
            bfloat16_step=float(np.concatenate(spacings).mean()),
        )


@dataclass(frozen=True)
class FreeRun:
    """Tokens that were chosen freely, beside the reference's."""

    requests: int
    tokens: int
    same_requests: int
    first_difference: list[int]
    """For each request the first step with another token; the number of steps where there is none."""

    @classmethod
    def of(cls, reference: Tokens, here: Tokens) -> FreeRun:
        """Compares tokens `[requests, steps]`."""
        first = [
            int(np.argmax(differs)) if differs.any() else len(differs) for differs in np.asarray(reference != here)
        ]
        steps = reference.shape[1]
        return cls(len(first), reference.size, sum(at == steps for at in first), first)


@dataclass(frozen=True)
class Reference:
    """What one GPU chose and its logits, in a folder."""

    tokens: Tokens
    logits: Sequence[Logits]

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Reads what `write` wrote; the logits stay in the file."""
        return cls(np.load(folder / "tokens.npy"), list(np.load(folder / "logits.npy", mmap_mode="r")))

    @classmethod
    def write(cls, folder: Path, tokens: Tokens, logits: Sequence[Logits]) -> Reference:
        """Writes tokens `[requests, steps]` and of each request the logits, `[steps, vocab_size]`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "logits.npy", np.stack(logits))
        return cls(tokens, logits)
