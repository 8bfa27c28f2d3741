"""Which rows the drafts read in a step: host bookkeeping between the target's ragged batch and the depths'.

Depth `k`'s key at position `i` holds the token at `i + k + 1`. When a step ends with the last token at `p + 1`, only
depth 0 has seen nothing but chosen tokens up to `p`; depth `k` has filled the last `k` positions with drafts. They
are written again in the next step, with the tokens that were chosen, together with the positions that the step
verified: every depth then holds what a pass over the chosen tokens alone would have left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..mtp import UNKNOWN_TOKEN

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Advance:
    """What one request gained in a step.

    `tokens` are all its tokens so far; positions `start … end - 1` became part of its cache, the target's hidden states
    of which are rows `first_row …` of the step's ragged batch. Where the request `drafts`, the rows of the `kept`
    positions before `start`, which come from earlier steps, are read once more. The last `keep` of the new rows are
    wanted later.
    """

    tokens: Int64
    start: int
    end: int
    first_row: int
    kept: int
    drafts: bool
    keep: int


@dataclass(frozen=True)
class DraftRows:
    """The inputs of one pass of all depths over a batch; see `MTPDepth` and `RowSelection`, whose names these are."""

    rows: Int64
    keep: Int64
    keep_counts: tuple[int, ...]
    """How many of `keep` belong to each request, drafting or not."""

    tokens: Int64
    following: Int64
    known: tuple[Int64, ...]
    """`[drafting requests]` for each depth."""

    input_row_offsets: npt.NDArray[np.uint32]
    cache_lengths: npt.NDArray[np.uint32]

    @property
    def max_prompt_length(self) -> int:
        """The most rows of one request."""
        return int(np.diff(self.input_row_offsets).max(initial=0))

    @property
    def max_length(self) -> int:
        """The most positions that one request's queries see."""
        return int((self.cache_lengths + np.diff(self.input_row_offsets)).max(initial=0))


def draft_rows(advances: Sequence[Advance], num_hidden_rows: int, depth: int) -> DraftRows:
    """Plans a pass of `depth` depths after a step.

    Args:
        advances: What each request gained, at least one position each.
        num_hidden_rows: Rows of the step's ragged batch; the kept rows follow them, request by request.
        depth: Depths that will run, for the requests that draft; with 0 none does.
    """
    drafting = [advance for advance in advances if advance.drafts]
    rows, keep, tokens, following = [], [], [], []
    lengths: list[int] = []
    next_kept, num_rows = num_hidden_rows, 0
    total = sum(advance.kept + advance.end - advance.start for advance in drafting)
    for advance in advances:
        new = np.arange(advance.first_row, advance.first_row + advance.end - advance.start)
        keep.append(new[len(new) - advance.keep :])
        if advance.drafts:
            own = np.concatenate([np.arange(next_kept, next_kept + advance.kept), new])
            next_kept += advance.kept
            rows.append(own)
            tokens.append(advance.tokens[advance.start - advance.kept + 1 : advance.end + 1])
            following.append(np.append(np.arange(num_rows + 1, num_rows + len(own)), total + len(lengths)))
            num_rows += len(own)
            lengths.append(len(own))
    none = np.empty(0, dtype=np.int64)
    return DraftRows(
        rows=np.concatenate([none, *rows]),
        keep=np.concatenate([none, *keep]),
        keep_counts=tuple(map(len, keep)),
        tokens=np.concatenate([none, *tokens]),
        following=np.concatenate([none, *following]),
        known=tuple(
            np.array([_token(advance.tokens, advance.end + 1 + index) for advance in drafting])
            for index in range(depth)
        ),
        input_row_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32),
        cache_lengths=np.array([advance.start - advance.kept for advance in drafting], dtype=np.uint32),
    )


def _token(tokens: Int64, position: int) -> int:
    return int(tokens[position]) if position < len(tokens) else UNKNOWN_TOKEN
