"""Bytes that a device sends to the others in a step, collective by collective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from step3p5.layer_config import LayerConfig, MoEConfig
from step3p5.parallel_plan import Collective, ParallelPlan

SENT: Mapping[Collective, int] = {
    Collective.ALL_REDUCE: 2,
    Collective.ALL_GATHER: 1,
}
"""How often a device sends `(n - 1) / n` of all the data; no way to do the same needs less."""


def sent_bytes(collective: Collective | None, num_devices: int, num_bytes: float) -> float:
    """Bytes that every device sends in a collective whose data are `num_bytes` in all."""
    return 0.0 if collective is None else SENT[collective] * num_bytes * (num_devices - 1) / num_devices


def dispatched_bytes(moe: MoEConfig, num_devices: int, num_bytes: float) -> float:
    """Bytes that every device sends in a dispatch, or in a combine, of tokens whose hidden states are `num_bytes` in
    all, under uniform routing; without the experts' numbers and weights that travel along."""
    elsewhere = moe.num_experts - moe.num_experts // num_devices
    misses_device = math.comb(elsewhere, moe.top_k) / math.comb(moe.num_experts, moe.top_k)
    return num_bytes * (num_devices - 1) / num_devices * (1 - misses_device)


def layer_sent_bytes(plan: ParallelPlan, layer: LayerConfig, num_tokens: int, itemsize: int) -> float:
    """Bytes that every device sends in one layer of a step over `num_tokens` tokens of all devices together."""
    hidden, of_layer = float(num_tokens * plan.model.hidden_size * itemsize), plan.layers[layer.index]
    sent = 0.0
    for collective in (of_layer.after_attention, of_layer.before_mlp, of_layer.after_mlp):
        if collective in (Collective.DISPATCH, Collective.COMBINE):
            assert isinstance(layer.mlp, MoEConfig)
            sent += dispatched_bytes(layer.mlp, plan.num_devices, hidden)
        else:
            sent += sent_bytes(collective, plan.num_devices, hidden)
    return sent


@dataclass(frozen=True)
class ExpertExchange:
    """Ways to bring tokens that devices have of their own to the experts of all and back: bytes that a device sends.

    Of one MoE layer, under uniform routing.
    """

    gather_and_scatter: float
    """Every token to every device, and of the sums to every device its own."""

    gather_and_all_reduce: float
    """The same, but all sums to every device."""

    dispatch_to_devices: float
    """Every token once to each device that has experts of it, and one sum back from each: what the plan does."""

    dispatch_to_experts: float
    """Every token to each of its experts, and the product of each back: what MAX's own dispatch and combine do."""


def expert_exchange(moe: MoEConfig, num_devices: int, num_tokens: float, token_bytes: float) -> ExpertExchange:
    """Counts every way for `num_tokens` tokens of all devices together, whose hidden states take `token_bytes` each."""
    num_bytes = num_tokens * token_bytes
    gather = sent_bytes(Collective.ALL_GATHER, num_devices, num_bytes)
    return ExpertExchange(
        gather_and_scatter=2 * gather,
        gather_and_all_reduce=gather + sent_bytes(Collective.ALL_REDUCE, num_devices, num_bytes),
        dispatch_to_devices=2 * dispatched_bytes(moe, num_devices, num_bytes),
        dispatch_to_experts=2 * gather * moe.top_k / num_devices,
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
