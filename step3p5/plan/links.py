"""Bytes that a device sends to the others in a step, collective by collective."""

from __future__ import annotations

from collections.abc import Mapping

from step3p5.parallel_plan import Collective, LayerPlan, ParallelPlan

SENT: Mapping[Collective, int] = {
    Collective.ALL_REDUCE: 2,
    Collective.ALL_GATHER: 1,
    Collective.REDUCE_SCATTER: 2,
}
"""How often a device sends `(n - 1) / n` of all the data. No all-reduce or gather needs less; a scatter would do with
1, but MAX's cuts into equal parts, so that the graph's is an all-reduce of which a device keeps its own rows."""


def sent_bytes(collective: Collective | None, num_devices: int, num_bytes: float) -> float:
    """Bytes that every device sends in a collective whose data are `num_bytes` in all."""
    return 0.0 if collective is None else SENT[collective] * num_bytes * (num_devices - 1) / num_devices


def layer_sent_bytes(plan: ParallelPlan, layer: LayerPlan, num_tokens: int, itemsize: int) -> float:
    """Bytes that every device sends in one layer of a step over `num_tokens` tokens of all devices together."""
    hidden = float(num_tokens * plan.model.hidden_size * itemsize)
    collectives = (layer.after_attention, layer.before_mlp, layer.after_mlp)
    return sum(sent_bytes(collective, plan.num_devices, hidden) for collective in collectives)


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
