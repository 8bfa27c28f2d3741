"""Which rows the drafts read in a step: host bookkeeping between the target's ragged batch and the depths'.

Depth `k`'s key at position `i` holds the token at `i + k + 1`. When a step ends with the last token at `p + 1`, only
depth 0 has seen nothing but chosen tokens up to `p`; depth `k` has filled the last `k` positions with drafts. They
are written again in the next step, with the tokens that were chosen, together with the positions that the step
verified: every depth then holds what a pass over the chosen tokens alone would have left.
"""

from __future__ import annotations

import dataclasses
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
    positions before `start`, which come from earlier steps, are read once more. The last `keep` of the kept and new
    rows are wanted later.
    """

    tokens: Int64
    start: int
    end: int
    first_row: int
    kept: int
    drafts: bool
    keep: int
    keeps_all: bool = True
    """Whether nothing older is wanted later."""


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

    last_rows: Int64
    input_row_offsets: npt.NDArray[np.uint32]
    cache_lengths: npt.NDArray[np.uint32]
    keeps_all: bool
    """Whether `keep` has all that the next steps need of every request, so that no older rows are kept beside it."""

    def with_kept_at(self, places: Int64, num_hidden_rows: int) -> DraftRows:
        """The same where the kept rows lie at `places` rather than one after the other."""
        moved = np.concatenate([np.arange(num_hidden_rows), num_hidden_rows + places])
        return dataclasses.replace(self, rows=moved[self.rows], keep=moved[self.keep])

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
    first, new, kept, wanted = (
        np.array(column, dtype=np.int64)
        for column in zip(
            *((a.first_row, a.end - a.start, a.kept if a.drafts else 0, a.keep) for a in advances), strict=True
        )
    )
    first_kept = num_hidden_rows + np.cumsum(kept) - kept
    # Of every request the kept rows, then the new ones.
    rows = ragged_range(_alternating(first_kept, first), _alternating(kept, new))
    lengths = kept + new
    ends = np.cumsum(lengths)
    keep = rows[ragged_range(ends - wanted, wanted)]
    drafts = np.array([advance.drafts for advance in advances])
    rows, lengths = rows[np.repeat(drafts, lengths)], lengths[drafts]
    ends = np.cumsum(lengths)
    following = np.arange(1, len(rows) + 1)
    following[ends - 1] = len(rows) + np.arange(len(ends))
    tokens = [a.tokens[a.start - a.kept + 1 : a.end + 1] for a in drafting]
    return DraftRows(
        rows=rows,
        keep=keep,
        keep_counts=tuple(wanted.tolist()),
        tokens=np.concatenate([np.empty(0, dtype=np.int64), *tokens]),
        following=following,
        known=tuple(
            np.array([_token(a.tokens, a.end + 1 + index) for a in drafting], dtype=np.int64) for index in range(depth)
        ),
        last_rows=ends - 1,
        input_row_offsets=np.concatenate([[0], ends]).astype(np.uint32),
        cache_lengths=np.array([advance.start - advance.kept for advance in drafting], dtype=np.uint32),
        keeps_all=all(advance.keeps_all for advance in advances),
    )


def ragged_range(starts: Int64, lengths: Int64) -> Int64:
    """`starts[0] … starts[0] + lengths[0] - 1`, then the same of the next, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def _alternating(first: Int64, second: Int64) -> Int64:
    return np.stack([first, second], axis=1).ravel()


def _token(tokens: Int64, position: int) -> int:
    return int(tokens[position]) if position < len(tokens) else UNKNOWN_TOKEN
