"""Which tokens a verification reads, and of which rows it wants logits: bookkeeping of the target's ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from .drafted import Drafted, Drafts
from .rows import Int64, ragged_range


@dataclass(frozen=True)
class VerifiedTokens:
    """The inputs of one verification; see `TokenSelection` and `VerifyingStep3p5`, whose names these are."""

    known: Int64
    places: Int64
    """Of every token in `known` followed by the drafts of `made`, depth by depth; empty without `made`."""

    made: Drafted | None
    """Where the drafts are taken from; `None` where they are all in `known`."""

    input_row_offsets: npt.NDArray[np.uint32]
    logit_rows: Int64


def tokens_to_verify(active: Sequence[Int64], drafts: Sequence[Sequence[int]], stays_on_device: bool) -> VerifiedTokens:
    """Plans a verification.

    Args:
        active: The tokens of each request that the target has not seen.
        drafts: The drafts of each.
        stays_on_device: Whether drafts of one and the same pass are left for the device to take.
    """
    num_active = np.array([len(tokens) for tokens in active], dtype=np.int64)
    num_drafts = np.array([len(own) for own in drafts], dtype=np.int64)
    ends = np.cumsum(num_active + num_drafts)
    made = _common_pass(drafts) if stays_on_device else None
    places = np.empty(0, dtype=np.int64)
    if made is None:
        known = np.concatenate(
            [*chain.from_iterable((tokens, own[:]) for tokens, own in zip(active, drafts, strict=True))]
        )
    else:
        known = np.concatenate(active)
        places = np.empty(ends[-1], dtype=np.int64)
        places[ragged_range(ends - num_drafts - num_active, num_active)] = np.arange(len(known))
        depths = ragged_range(np.zeros_like(num_drafts), num_drafts)
        requests = np.array([own.request if isinstance(own, Drafts) else 0 for own in drafts], dtype=np.int64)
        first = len(known) + np.repeat(requests, num_drafts)
        places[ragged_range(ends - num_drafts, num_drafts)] = first + depths * made.num_requests
    return VerifiedTokens(
        known=known.astype(np.int64),
        places=places,
        made=made,
        input_row_offsets=np.concatenate([[0], ends]).astype(np.uint32),
        logit_rows=ragged_range(ends - 1 - num_drafts, num_drafts + 1),
    )


def _common_pass(drafts: Sequence[Sequence[int]]) -> Drafted | None:
    """The pass that all the drafts are of; `None` where there are several or none."""
    passes = {id(own.made): own.made for own in drafts if isinstance(own, Drafts) and len(own)}
    return next(iter(passes.values())) if len(passes) == 1 else None
