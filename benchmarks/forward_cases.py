"""The forward passes that `forward.py` times, and what their times mean in bytes and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from report import Spread

from step3p5.byte_account import Forward, forward_bytes, forward_flops
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import ModelConfig


@dataclass
class Case:
    """One kind of forward pass: every request reads its prompt, then decodes `decode_steps` times.

    Without decode steps it is the prompt's pass that is timed; otherwise it is the decode steps.
    """

    name: str
    batch_size: int
    prompt_length: int
    decode_steps: int
    seconds: list[float] = field(default_factory=list)

    @property
    def forward(self) -> Forward:
        """The pass that is timed; of decode steps, the one midway."""
        if self.decode_steps == 0:
            return Forward(self.batch_size, self.prompt_length, self.prompt_length)
        return Forward(self.batch_size, 1, self.prompt_length + (self.decode_steps + 1) // 2)

    @property
    def longest(self) -> int:
        """Tokens of a request when the last pass has generated its token."""
        return self.prompt_length + self.decode_steps + 1

    def prompts(self, model: Any, rng: np.random.Generator) -> list[list[int]]:
        """New random prompts for `model`, an `AutoModel`."""
        vocabulary = int(model.pipeline.tokenizer.tokenizer_vocab_size)
        prompts: list[list[int]] = rng.integers(vocabulary, size=(self.batch_size, self.prompt_length)).tolist()
        return prompts

    def keep(self, step_seconds: Sequence[float]) -> None:
        """Adds the times of one run, given for each of its steps from the prompt's on."""
        self.seconds += step_seconds[1:] if self.decode_steps else step_seconds


@dataclass(frozen=True)
class Precision:
    """In which types the model runs."""

    weights: CheckpointDtype
    cache: CheckpointDtype


@dataclass(frozen=True)
class Result:
    """A case's times with what they are measured against.

    Rates are at the median time. `of_copy` is `bytes_per_second` as a share of a plain copy's best rate, or `None`
    where none was measured. `bound_seconds` is the least time that `step3p5.plan` finds, by the GPU's data sheet, and
    `over_bound` the median as a multiple of it; `None` without a GPU that the plan knows.
    """

    name: str
    batch_size: int
    new_tokens: int
    context: int
    seconds: Spread
    tokens_per_second: float
    bytes_to_read: float
    bytes_per_second: float
    of_copy: float | None
    flops: float
    flops_per_second: float
    bound_seconds: float | None
    over_bound: float | None

    HEADER: ClassVar[tuple[str, ...]] = (
        "forward pass",
        "ms, median (quartiles)",
        "best",
        "tokens/s",
        "MB to read",
        "GB/s",
        "of copy",
        "GFLOP/s",
        "bound, ms",
        "x bound",
    )

    def row(self) -> tuple[str, ...]:
        """The cells under `HEADER`."""
        return (
            self.name,
            self.seconds.text(1e3),
            f"{1e3 * self.seconds.minimum:.2f}",
            f"{self.tokens_per_second:.1f}",
            f"{1e-6 * self.bytes_to_read:.1f}",
            f"{1e-9 * self.bytes_per_second:.2f}",
            "-" if self.of_copy is None else f"{100 * self.of_copy:.0f} %",
            f"{1e-9 * self.flops_per_second:.1f}",
            "-" if self.bound_seconds is None else f"{1e3 * self.bound_seconds:.2f}",
            "-" if self.over_bound is None else f"{self.over_bound:.2f}",
        )


def make_cases(
    prefill: Sequence[int], batches: Sequence[int], contexts: Sequence[int], decode_steps: int, replicas: int = 1
) -> list[Case]:
    """A prefill for each prompt length, then decoding from each of `contexts` for each batch size.

    One request of every replica is prefilled. Batches are of all replicas together.
    """
    return [
        *(
            Case(f"prefill, {length} tokens" + (f" x {replicas}" if replicas > 1 else ""), replicas, length, 0)
            for length in prefill
        ),
        *(
            Case(f"decode, batch {size}, context {context + 1}-{context + decode_steps}", size, context, decode_steps)
            for context in contexts
            for size in batches
        ),
    ]


def evaluate(
    case: Case, model: ModelConfig, precision: Precision, copy_rate: float | None, bound: float | None = None
) -> Result:
    """Sets a case's times against its bytes and operations.

    Args:
        case: With at least one time.
        model: What ran.
        precision: The types in which it ran.
        copy_rate: Bytes a second that a plain copy reaches, or `None` where it was not measured.
        bound: The plan's least time in seconds, or `None` where there is none.
    """
    spread = Spread.of(case.seconds)
    num_bytes = forward_bytes(model, case.forward, precision.weights, precision.cache)
    flops = forward_flops(model, case.forward)
    rate = num_bytes / spread.median
    return Result(
        name=case.name,
        **asdict(case.forward),
        seconds=spread,
        tokens_per_second=case.forward.num_tokens / spread.median,
        bytes_to_read=num_bytes,
        bytes_per_second=rate,
        of_copy=None if copy_rate is None else rate / copy_rate,
        flops=flops,
        flops_per_second=flops / spread.median,
        bound_seconds=bound,
        over_bound=None if bound is None else spread.median / bound,
    )
