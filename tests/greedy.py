"""What greedy decoding gives: the float64 reference's tokens, and whether two different answers are both right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from harness import Prompt, clear_prompt, is_clear
from reference import Reference

TIE = 1e-4
"""Logits this close, as a share of the largest, may swap places in float32."""


def clear_continuation(
    reference: Reference, rng: np.random.Generator, length: int, steps: int
) -> tuple[Prompt, Prompt, npt.NDArray[np.float64]]:
    """A random prompt of `length` tokens whose greedy continuation rests on no near tie.

    Returns:
        The prompt; the `steps` tokens that follow it; the log-probabilities `[steps, vocab_size]` they were chosen by.
    """
    for _ in range(20):
        prompt = clear_prompt(reference, rng, length)
        tokens, rows = list(prompt), []
        for _ in range(steps):
            logits = reference.logits(tokens)[-1]
            if not has_clear_top(logits):
                break
            rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
            tokens.append(int(logits.argmax()))
        if len(rows) == steps and is_clear(reference, tokens):
            return prompt, tokens[length:], np.stack(rows)
    raise AssertionError("no continuation without a near tie in 20 draws")


def has_clear_top(logits: npt.NDArray[np.float64]) -> bool:
    """Whether the largest of `[vocab_size]` logits is the largest in float32 too."""
    second, first = np.partition(logits, -2)[-2:]
    return bool(first - second > TIE * np.abs(logits).max())


def assert_equal_but_for_ties(reference: Reference, prompt: Prompt, got: Sequence[int], want: Sequence[int]) -> None:
    """Holds two greedy continuations of `prompt` to each other; they may part where the reference sees a near tie."""
    if list(got) == list(want):
        return
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    before = [*prompt, *want[:at]]
    tie = not has_clear_top(reference.logits(before)[-1]) or not is_clear(reference, before)
    assert tie, f"token {at} differs, and no near tie excuses it: got {got[at:]}, want {want[at:]}"
