"""The graph for several devices, whole, on the CPU: attention over the devices' own caches, collectives, subgraphs.

A compilation takes minutes: these run where `STEP3P5_LONG_TESTS` is set (`make test-long`).
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from harness import FIRST_TEXT_TOKEN, NEAR_TIE, assert_close
from parallel_runner import Array, ParallelRunner
from reference import Reference
from test_parallel_plan import MODES, SMALL, plan_of, random_tensors

from step3p5.config_parser import parse_model_config

FULL, SLIDING = "full_attention", "sliding_attention"
SMALLEST = SMALL | {
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "layer_types": [FULL, SLIDING],
    "rope_theta": [5e6, 1e4],
    "partial_rotary_factors": [0.5, 1.0],
    "moe_layers_enum": "0",
    "swiglu_limits": [0.3, 0.0],
    "swiglu_limits_shared": [0.2, 0.4],
    "sliding_window": 128,
    "head_dim": 32,
    "attention_other_setting": SMALL["attention_other_setting"] | {"head_dim": 32},
}
"""As few layers as have every kind of attention and MLP; the CPU's attention kernel takes no smaller window."""

pytestmark = pytest.mark.skipif("STEP3P5_LONG_TESTS" not in os.environ, reason="minutes each: make test-long")

LENGTHS = [[[3, 200, 1], [40, 9]], [[3, 200, 1], [44, 160]]]
"""Batches of two replicas: with unequal and with equal numbers of tokens."""


@pytest.mark.parametrize("mode", MODES)
def test_logits_of_two_devices(mode: str, rng: np.random.Generator) -> None:
    model = parse_model_config(SMALLEST)
    tensors = random_tensors(model, rng)
    reference = Reference(SMALLEST, tensors)
    plan = plan_of(model, mode, 2)
    run = ParallelRunner(plan, tensors)
    for lengths in LENGTHS:
        replicas, want = clear_batch(reference, lengths, rng)
        requests = [request for replica in replicas for request in replica]
        assert_close(run(replicas if plan.own_requests else [requests]), want)


def clear_batch(
    reference: Reference, lengths: list[list[int]], rng: np.random.Generator
) -> tuple[list[list[Array]], Array]:
    """Random prompts of these lengths on which no router choice is a near tie, and their last tokens' logits."""
    for _ in range(20):
        replicas = [[rng.integers(FIRST_TEXT_TOKEN, 128, size=length) for length in of] for of in lengths]
        reference.router_margin = np.inf
        want = [reference.logits(request.tolist())[-1] for replica in replicas for request in replica]
        if reference.router_margin > NEAR_TIE:
            return replicas, np.stack(want)
    raise AssertionError("a near tie of the router in each of 20 draws")
