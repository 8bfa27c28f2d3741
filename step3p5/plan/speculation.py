"""Where drafting with the MTP layers pays.

A cycle drafts `depth` tokens one after the other and verifies them in one forward pass over `depth + 1` tokens a
request. Drafts are taken to be accepted independently of one another, up to the first that is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from step3p5 import byte_account
from step3p5.byte_account import Forward, cache_bytes, forward_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.layer_config import ModelConfig
from step3p5.speculation.draft_vocabulary import draft_vocabulary_size


def expected_tokens(depth: int, acceptance: float) -> float:
    """Tokens that a cycle gives a request: those accepted, and one that the verification itself chooses.

    Raises:
        ValueError: `depth` is negative or `acceptance` no share.
    """
    if depth < 0 or not 0.0 <= acceptance <= 1.0:
        raise ValueError(f"depth {depth}, acceptance {acceptance}: expected depth >= 0 and acceptance 0 to 1")
    return sum(acceptance**accepted for accepted in range(depth + 1))


def expected_speedup(
    batch: int,
    depth: int,
    acceptance: float,
    forward_cost: Callable[[int, int], float],
    draft_cost: Callable[[int], float],
) -> float:
    """How many times as fast tokens come with speculation as without.

    Args:
        batch: Requests in a batch.
        depth: Drafts a cycle; 0 is plain decoding, with a speed-up of 1.
        acceptance: Share of drafts that the target agrees with, given that it agreed with those before.
        forward_cost: Cost of a forward pass over `batch` requests of so many new tokens each: seconds, measured or
            bounded, or bytes.
        draft_cost: Cost of one draft for each of `batch` requests, in the same unit.
    """
    cycle = forward_cost(batch, depth + 1) + depth * draft_cost(batch)
    return expected_tokens(depth, acceptance) * forward_cost(batch, 1) / cycle


def verify_bytes(
    model: ModelConfig, batch: int, new_tokens: int, context: int, dtype: CheckpointDtype = CheckpointDtype.BFLOAT16
) -> float:
    """Bytes that one device reads in a forward pass of requests that had `context` tokens: a `forward_cost`."""
    return forward_bytes(model, Forward(batch, new_tokens, context + new_tokens), dtype, dtype)


def draft_bytes(
    model: ModelConfig, batch: int, context: int, dtype: CheckpointDtype = CheckpointDtype.BFLOAT16
) -> float:
    """Bytes that one device reads in a draft of the first MTP layer, its own head included: a `draft_cost`."""
    layer = model.mtp_layers[0]
    weights = float(byte_account.draft_bytes(model, 1, dtype, draft_vocabulary_size(model)))
    embedded = batch * model.hidden_size * dtype.itemsize
    return weights + embedded + cache_bytes(replace(model, layers=(layer,)), dtype, Forward(batch, 1, context + 1))
