"""Verification by sampling: the target draws every position's token itself, and a draft counts if it was drawn.

The drafts are fixed before the target is asked, so drawing `x ~ p` and keeping the draft `d` when `x = d` accepts it
with probability `p(d)` and otherwise yields a token of `p` without `d`, renormalised: rejection sampling with the
residual distribution (Leviathan et al., https://arxiv.org/abs/2211.17192, with a proposal that is certain of `d`). What
is emitted is in either case the target's own draw, with the parameters and the seed that plain decoding would use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
from max.pipelines.context import TextContext
from max.pipelines.context.tokens import TokenBuffer

from ..steady_batch import is_constrained


class TokensAhead:
    """A request's tokens followed by its first `count` drafts: what the sampler reads of a `TokenBuffer`.

    Nothing is copied before it is asked for: a long context has thousands of tokens and the sampler rarely needs them,
    and the drafts may still be on the device.
    """

    def __init__(self, tokens: TokenBuffer, drafts: Sequence[int], count: int) -> None:
        self._tokens, self._drafts, self._count = tokens, drafts, count

    @property
    def _extra(self) -> npt.NDArray[np.int64]:
        return np.asarray(self._drafts[: self._count], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tokens) + self._count

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self._tokens.prompt_length

    @property
    def current_position(self) -> int:
        """Where the next token goes."""
        return self._tokens.current_position + self._count

    @property
    def all(self) -> npt.NDArray[np.int64]:
        """Prompt, generated and extra tokens."""
        return np.concatenate([self._tokens.all, self._extra])

    @property
    def generated(self) -> npt.NDArray[np.int64]:
        """Generated and extra tokens."""
        return np.concatenate([self._tokens.generated, self._extra])


def can_verify_drafts(context: TextContext) -> bool:
    """Whether the sampler can be asked for several positions of a request at once.

    A grammar and a caller's own logits processors must see every token before the next is drawn.
    """
    return not is_constrained(context) and context.sampling_params.logits_processors is None


def contexts_ahead(context: TextContext, drafts: Sequence[int]) -> list[TextContext]:
    """The request as the sampler will see it at each position: as it is, then with 1, 2, … of `drafts` appended.

    The copies share all but their tokens; nothing may be changed through them.
    """
    ahead = [context]
    for count in range(1, len(drafts) + 1):
        later = copy.copy(context)
        later.tokens = cast(TokenBuffer, TokensAhead(context.tokens, drafts, count))
        ahead.append(later)
    return ahead


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of `drafts` were drawn, up to the first that was not; `drawn` has one token more."""
    for index, draft in enumerate(drafts[:]):  # in one read
        if drawn[index] != draft:
            return index
    return len(drafts)


def commit(context: TextContext, drawn: Sequence[int]) -> int:
    """Appends tokens to a request until it is done; returns how many were appended.

    After it all but the last of them count as processed.
    """
    for count, token in enumerate(drawn, start=1):
        context.update(token)
        if context.is_done:
            return count
    return len(drawn)
