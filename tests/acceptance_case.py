"""A cycle's acceptance at random, and what must follow from it, written out request by request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
VOCAB = 36


@dataclass(frozen=True)
class AcceptanceCase:
    """The operands of `Acceptance`, by their names there, and how many drafts of each request are right."""

    drawn: Array
    hidden: Array
    lengths: Array
    verified: Array
    kept: Array
    window: Array
    right: Array

    @classmethod
    def random(cls, rng: np.random.Generator, batch: int, deepest: int, depth: int, hidden_size: int) -> AcceptanceCase:
        """Any number of drafts is right; the hidden states are exact in bfloat16."""
        keep = deepest - 1
        right = rng.integers(depth + 1, size=batch)
        drawn = rng.integers(VOCAB, size=(batch, depth + 1))
        verified = rng.integers(VOCAB, size=(batch, depth + 1))
        for request, count in enumerate(right):
            verified[request, 1 : count + 1] = drawn[request, :count]
            if count < depth:
                verified[request, count + 1] = (drawn[request, count] + 1) % VOCAB
        return cls(
            drawn=drawn,
            hidden=rng.integers(-128, 128, size=(batch, depth + 1, hidden_size)).astype(np.float32),
            lengths=rng.integers(10, 50, size=batch).astype(np.uint32),
            verified=verified,
            kept=rng.integers(-128, 128, size=(batch, keep, hidden_size)).astype(np.float32),
            window=rng.integers(VOCAB, size=(batch, keep + 1)),
            right=right,
        )

    def check(self, results: Sequence[Array], written: Sequence[Array], chosen: Array) -> None:
        """Holds the results, and the buffers after them, to the case.

        Args:
            results: As `Acceptance` returns them.
            written: `verified`, `kept` and `window` after the cycle.
            chosen: Any tokens, as if drafted, one a request.
        """
        previous, tokens, following, last_rows, draft_lengths, summary = results
        verified, kept, window = written
        batch, keep = self.kept.shape[:2]
        rows = self.drawn.shape[1]
        np.testing.assert_array_equal(summary, np.concatenate([self.drawn, self.right[:, None]], axis=1))
        next_tokens = np.concatenate([tokens, chosen])[following].reshape(batch, rows)
        for request, count in enumerate(self.right):
            # The rows end with the last accepted position, unless what is known begins behind their beginning.
            first = max(keep + count + 1 - rows, 0)
            last = keep + count - first
            assert draft_lengths[request] == self.lengths[request] - keep + first
            assert last_rows[request] == request * rows + last
            states = np.concatenate([self.kept[request], self.hidden[request]])
            np.testing.assert_array_equal(previous.reshape(batch, rows, -1)[request], states[first : first + rows])
            sequence = [*self.window[request], *self.drawn[request]]
            assert tokens.reshape(batch, rows)[request].tolist() == sequence[first + 1 : first + 1 + rows]
            wanted = [*sequence[first + 2 : first + last + 2], chosen[request]]
            assert next_tokens[request, : last + 1].tolist() == wanted
            np.testing.assert_array_equal(kept[request], states[count + 1 : count + 1 + keep])
            assert window[request].tolist() == sequence[count + 1 : count + 2 + keep]
            assert verified[request].tolist() == [self.drawn[request, count], *self.verified[request, 1:]]
