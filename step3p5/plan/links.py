"""Bytes that a device sends to the others in a step, collective by collective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from step3p5.layer_config import MoEConfig
from step3p5.parallel_plan import Collective, LayerPlan, ParallelPlan

SENT: Mapping[Collective, int] = {
    Collective.ALL_REDUCE: 2,
    Collective.ALL_GATHER: 1,
    Collective.REDUCE_SCATTER: 1,
}
"""How often a device sends `(n - 1) / n` of all the data; no way to do the same needs less. The scatter's is 2 where
devices have not equally many rows, see `Exchange`."""


def sent_bytes(collective: Collective | None, num_devices: int, num_bytes: float) -> float:
    """Bytes that every device sends in a collective whose data are `num_bytes` in all."""
    return 0.0 if collective is None else SENT[collective] * num_bytes * (num_devices - 1) / num_devices


def layer_sent_bytes(plan: ParallelPlan, layer: LayerPlan, num_tokens: int, itemsize: int) -> float:
    """Bytes that every device sends in one layer of a step over `num_tokens` tokens of all devices together."""
    hidden = float(num_tokens * plan.model.hidden_size * itemsize)
    collectives = (layer.after_attention, layer.before_mlp, layer.after_mlp)
    return sum(sent_bytes(collective, plan.num_devices, hidden) for collective in collectives)


@dataclass(frozen=True)
class ExpertExchange:
    """Ways to bring tokens that devices have of their own to the experts of all and back: bytes that a device sends.

    Of one MoE layer, under uniform routing. A dispatch is counted without the indices and weights that travel with it.
    """

    gather_and_scatter: float
    """Every token to every device, and of the sums to every device its own: what the plan does."""

    gather_and_all_reduce: float
    """The same, but all sums to every device."""

    dispatch_to_devices: float
    """Every token once to each device that has experts of it, and one sum back from each."""

    dispatch_to_experts: float
    """Every token to each of its experts, and the product of each back: what MAX's own dispatch and combine do."""


def expert_exchange(moe: MoEConfig, num_devices: int, num_tokens: float, token_bytes: float) -> ExpertExchange:
    """Counts every way for `num_tokens` tokens of all devices together, whose hidden states take `token_bytes` each."""
    num_bytes = num_tokens * token_bytes
    gather = sent_bytes(Collective.ALL_GATHER, num_devices, num_bytes)
    here = moe.num_experts // num_devices
    misses_device = math.comb(moe.num_experts - here, moe.top_k) / math.comb(moe.num_experts, moe.top_k)
    others = num_devices - 1
    return ExpertExchange(
        gather_and_scatter=gather + sent_bytes(Collective.REDUCE_SCATTER, num_devices, num_bytes),
        gather_and_all_reduce=gather + sent_bytes(Collective.ALL_REDUCE, num_devices, num_bytes),
        dispatch_to_devices=2 * num_bytes / num_devices * others * (1 - misses_device),
        dispatch_to_experts=2 * num_bytes / num_devices * moe.top_k * others / num_devices,
    )


def head_sent_bytes(plan: ParallelPlan, num_tokens: int, num_logits: int, itemsize: int) -> float:
    """Bytes that every device sends for the embedding of `num_tokens` tokens and the head of `num_logits` of them."""
    hidden = float(plan.model.hidden_size * itemsize)
    logits = float(num_logits * plan.model.vocab_size * itemsize)
    return (
        sent_bytes(plan.after_embedding, plan.num_devices, num_tokens * hidden)
        + sent_bytes(plan.before_head, plan.num_devices, num_logits * hidden)
        + sent_bytes(plan.after_head, plan.num_devices, logits)
    )


def num_collectives(plan: ParallelPlan) -> int:
    """Collectives in a step of the decoder."""
    layers = plan.layers[: len(plan.model.layers)]
    exchanges = [plan.after_embedding, plan.before_head, plan.after_head]
    exchanges += [of for layer in layers for of in (layer.after_attention, layer.before_mlp, layer.after_mlp)]
    return sum(exchange is not None for exchange in exchanges)
