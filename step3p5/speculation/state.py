"""What a request carries from step to step: its drafts, and the hidden states that depths have yet to read for good."""

from __future__ import annotations

from collections import deque

from max.pipelines.context.tokens import TokenBuffer

from .drafted import Drafts
from .kept_rows import Rows
from .rows import Advance


class RequestState:
    """One request between two steps.

    A depth is done with a position when it has read it with chosen tokens only. The target's hidden states of positions
    with which some depth is not done are kept, the last `limit` of them: where drafting rests, they make it possible to
    go on as if it had not. A position beyond the limit stays unread by the depths that were not done with it.

    Args:
        position: Tokens in the request's cache, all of them new to it or found there.
        depth: Number of depths.
        limit: The most positions to keep.
    """

    def __init__(self, position: int, depth: int, limit: int) -> None:
        self.position = position
        """Processed length when the last step ended; a request with another one was preempted since."""
        self.drafts: Drafts | None = None
        self._done = [position] * depth
        self._limit = limit
        self._rows: deque[Rows] = deque()
        self._rows_start = position
        self._num_rows = 0

    def first_unread(self, depth: int) -> int:
        """The position at which a pass of the first `depth` depths must begin."""
        return max(min(self._done[:depth], default=self.position), self._rows_start)

    def rows_from(self, position: int) -> list[Rows]:
        """The kept hidden states of positions from `position` on, in pieces `[n, hidden_size]`."""
        pieces, start = [], self._rows_start
        for rows in self._rows:
            if start + len(rows) > position:
                pieces.append(rows[max(0, position - start) :])
            start += len(rows)
        return pieces

    def rows_to_keep(self, end: int, depth: int) -> int:
        """How many of the positions before `end` must be kept once a pass of `depth` depths has read up to it."""
        return end - max(min(self._done_after(end, depth)), end - self._limit)

    def next_advance(self, tokens: TokenBuffer, first_row: int, depth: int) -> Advance:
        """What a step gave the request.

        Args:
            tokens: The request's tokens after it.
            first_row: See `Advance`.
            depth: Depths that are to draft for the request; 0 for none.
        """
        start, end = self.position, tokens.processed_length
        kept = start - self.first_unread(depth) if depth else 0
        wanted, new = self.rows_to_keep(end, depth), end - start
        # Rows that an earlier step kept are kept again if that makes all of them lie together.
        keeps_all = wanted <= kept + new
        return Advance(
            tokens.all, start, end, first_row, kept, depth > 0, wanted if keeps_all else new, keeps_all=keeps_all
        )

    def advance(self, end: int, depth: int, new_rows: Rows, drafts: Drafts | None) -> None:
        """Records a step.

        Args:
            end: Processed length after it.
            depth: Depths that read up to there.
            new_rows: Hidden states of the last positions before `end`: of the step's own, or of all that are to be
                kept.
            drafts: What was drafted.
        """
        keep = self.rows_to_keep(end, depth)
        if len(new_rows) != end - self.position:
            self._rows.clear()
            self._num_rows = 0
        self._rows.append(new_rows)
        stored = self._num_rows + len(new_rows)
        while stored - len(self._rows[0]) >= keep and len(self._rows) > 1:
            stored -= len(self._rows.popleft())
        if stored > keep:
            self._rows[0] = self._rows[0][stored - keep :]
        self._num_rows = min(stored, keep)
        self._rows_start = end - self._num_rows
        self._done = self._done_after(end, depth)
        self.position, self.drafts = end, drafts

    def _done_after(self, end: int, depth: int) -> list[int]:
        # Depth k reads the token k + 1 places on, so its last k positions saw drafts.
        return [end - index if index < depth else done for index, done in enumerate(self._done)]
