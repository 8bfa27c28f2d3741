"""Which tokens can be drafted: of a large vocabulary those that were seen last, in prompts and answers.

A depth's own head is two thirds of what a draft reads, and most of its rows are for tokens that a text never has. What
is not in this vocabulary is not drafted, and a draft that is wrong costs time and nothing else: the target verifies
with all of its vocabulary. A checkpoint brings no frequencies, but byte-pair merges are learnt from the most frequent
on, so that the first ids stand for what has not been seen yet.

Tokens that enter together take neighbouring slots, so that one copy a head brings all of their rows.
"""

from __future__ import annotations

import os
from functools import reduce

import numpy as np
import numpy.typing as npt

from ..config_fields import ConfigError
from ..layer_config import ModelConfig

Int64 = npt.NDArray[np.int64]

SIZE_VARIABLE = "STEP3P5_DRAFT_VOCABULARY"
"""Environment variable with the number of tokens that can be drafted; a number from the vocabulary's size on is all."""

DEFAULT_SIZE = 16384
"""An eighth of the released vocabulary: a draft reads 0.70 GB rather than 1.62. A quarter reads 0.83."""

MOST_NEW = 64
"""Tokens that enter before one pass; the others wait for the next ones. Each is a row of every head."""


def draft_vocabulary_size(model: ModelConfig) -> int:
    """How many tokens can be drafted.

    Raises:
        ConfigError: The environment variable is no positive number.
    """
    text = os.environ.get(SIZE_VARIABLE)
    if text is not None and not (text.isdecimal() and int(text)):
        raise ConfigError(f"{SIZE_VARIABLE}: found {text!r}, expected a whole number from 1 on. Correct or unset it.")
    return min(DEFAULT_SIZE if text is None else int(text), model.vocab_size)


class DraftVocabulary:
    """The tokens that can be drafted, each in a slot; neighbours that were not seen for the longest time make room.

    Args:
        vocab_size: Tokens of the target.
        size: Tokens that can be drafted, fewer; in the beginning the first ids.
    """

    def __init__(self, vocab_size: int, size: int) -> None:
        self.ids = np.arange(size)
        """The token in each slot."""
        self._slots = np.full(vocab_size, -1)
        self._slots[:size] = self.ids
        self._seen = -self.ids  # before all time, the higher ids first
        self._clock = 0
        self._waiting: dict[int, None] = {}

    def see(self, tokens: Int64) -> None:
        """Takes note of tokens of a text."""
        self._clock += 1
        slots = self._slots[tokens]
        self._seen[slots[slots >= 0]] = self._clock
        self._waiting.update(dict.fromkeys(tokens[slots < 0].tolist()))

    def admit(self) -> tuple[slice, Int64]:
        """Lets tokens in that wait.

        Returns:
            The slots that changed, neighbours, and the tokens that are in them now; both are empty if none waits.
        """
        count = min(len(self._waiting), MOST_NEW, len(self.ids))
        tokens = np.array([self._waiting.popitem()[0] for _ in range(count)], dtype=np.int64)
        first = self._longest_unseen(count) if count else 0
        slots = slice(first, first + count)
        self._slots[self.ids[slots]] = -1
        self._slots[tokens] = np.arange(first, first + count)
        self.ids[slots] = tokens
        self._seen[slots] = self._clock
        return slots, tokens

    def _longest_unseen(self, count: int) -> int:
        """The first slot of that run of `count` whose token seen last was seen the longest time ago.

        Runs begin at multiples of `count`; the slots after the last whole one are in none.
        """
        runs = self._seen[: len(self._seen) // count * count].reshape(-1, count)
        # Column by column: `max(axis=1)` is ten times slower where runs are of two or three.
        return int(reduce(np.maximum, runs.T).argmin()) * count
