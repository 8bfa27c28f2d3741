"""A model cut by a `ParallelPlan`, its parts computed one device after the other on the CPU with the package's ops.

The ops that multiply, route and group are the package's; norms, rotation and softmax are the reference's, on the heads
that a device has. What the devices exchange is added or joined here as the plan's collectives would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue
from reference import Reference, apply_rope, attention, rms_norm, sigmoid
from small_graphs import Ops, graph_of

from step3p5 import kernels
from step3p5.layer_config import LayerConfig, ModelConfig, MoEConfig
from step3p5.parallel_plan import Collective, ParallelPlan

Array = npt.NDArray[Any]
Parts = list[Array]
"""One array a device."""

Routed = tuple[Array, Array, Array]
"""Tokens, their experts and the weights of these."""

SCALING_FACTOR = 3.0
"""The router's; a constant of the compiled graph."""


def _tensor(*shape: str, dtype: DType = DType.float32) -> TensorType:
    return TensorType(dtype, shape, DeviceRef.CPU())


def _route(logits: TensorValue, bias: TensorValue, chosen: TensorValue) -> list[TensorValue]:
    ids, weights = kernels.route(logits, bias, top_k=chosen.shape[0], normalize=True, scale=SCALING_FACTOR)
    return [ids, weights]


def _group(ids: TensorValue, experts: TensorValue) -> list[TensorValue]:
    return list(kernels.group(ids, num_experts=experts.shape[0]))


def _experts(
    x: TensorValue,
    gate: TensorValue,
    up: TensorValue,
    down: TensorValue,
    rows: TensorValue,
    offsets: TensorValue,
    weights: TensorValue,
    limit: TensorValue,
) -> list[TensorValue]:
    return [kernels.down(kernels.gate_up(x, gate, up, rows, offsets, limit), down, rows, offsets, weights)]


_LIMIT = _tensor()
GRAPHS = {
    "sharded_linear": graph_of(lambda x, w: [kernels.linear(x, w)], [_tensor("T", "K"), _tensor("N", "K")]),
    "sharded_swiglu": graph_of(
        lambda x, gate, up, limit: [kernels.swiglu(x, gate, up, limit)],
        [_tensor("T", "K"), _tensor("M", "K"), _tensor("M", "K"), _LIMIT],
    ),
    "sharded_route": graph_of(_route, [_tensor("T", "E"), _tensor("E"), _tensor("K")]),
    "sharded_group": graph_of(_group, [_tensor("T", "K", dtype=DType.int32), _tensor("E")]),
    "sharded_experts": graph_of(
        _experts,
        [
            _tensor("T", "H"),
            _tensor("E", "M", "H"),
            _tensor("E", "M", "H"),
            _tensor("E", "H", "M"),
            _tensor("TK", dtype=DType.int32),
            _tensor("E1", dtype=DType.int32),
            _tensor("T", "K"),
            _LIMIT,
        ],
    ),
}
"""The package's ops, with symbolic sizes."""


def _contiguous(operand: Array | float) -> Array:
    array = np.asarray(operand)
    return np.array(array, array.dtype if array.dtype == np.int32 else np.float32, order="C")


class ShardedModel:
    """The decoder on the devices of a plan.

    Args:
        ops: The compiled `GRAPHS`.
        plan: Where everything lies.
        reference: The same model whole: norm constants, rotary frequencies.
        tensors: Every tensor by its hub name.
    """

    def __init__(self, ops: Ops, plan: ParallelPlan, reference: Reference, tensors: Mapping[str, Array]) -> None:
        self.ops, self.plan, self.reference = ops, plan, reference
        self.model: ModelConfig = plan.model
        self.devices = range(plan.num_devices)
        self.shards = [
            {name: tensor[plan.placements[name].shard(tensor.shape, device)] for name, tensor in tensors.items()}
            for device in self.devices
        ]

    def logits(self, replicas: Sequence[Sequence[Array]]) -> Array:
        """Logits of every token of every request, in order: `[tokens, vocab_size]`.

        Args:
            replicas: The requests' token ids by data-parallel replica; one replica where all devices have all requests.
        """
        requests = [request for replica in replicas for request in replica]
        own = list(replicas) if self.plan.own_requests else [requests for _ in self.devices]
        assert len(own) == self.plan.num_devices
        lengths = [[len(request) for request in replica] for replica in own]
        rows = [sum(of_device) for of_device in lengths]

        h = self._embed(np.concatenate(requests), rows)
        for layer in self.model.layers:
            h = self._decoder_layer(h, layer, lengths, rows)
        x = [self._norm(device, h[device], "model.norm.weight") for device in self.devices]
        x = exchange(self.plan.before_head, x)
        parts = [self._linear(device, x[device], "lm_head.weight") for device in self.devices]
        return exchange(self.plan.after_head, parts, axis=1)[-1]

    def _embed(self, tokens: Array, rows: list[int]) -> Parts:
        """Every device looks up the tokens that its part of the vocabulary has, then keeps its own rows."""
        parts = []
        for device in self.devices:
            table = self.shards[device]["model.embed_tokens.weight"]
            local = tokens - (device * len(table) if self.plan.placements["model.embed_tokens.weight"].is_cut else 0)
            here = (local >= 0) & (local < len(table))
            parts.append(np.where(here[:, None], table[np.where(here, local, 0)], 0))
        h = exchange(self.plan.after_embedding, parts)
        if not self.plan.own_requests:
            return h
        ends = np.cumsum(rows)
        return [h[device][ends[device] - rows[device] : ends[device]] for device in self.devices]

    def _decoder_layer(self, h: Parts, layer: LayerConfig, lengths: list[list[int]], rows: list[int]) -> Parts:
        of_layer, prefix = self.plan.layers[layer.index], f"model.layers.{layer.index}."
        x = [self._norm(device, h[device], prefix + "input_layernorm.weight") for device in self.devices]
        y = [self._attention(device, x[device], layer, lengths[device]) for device in self.devices]
        h = _add(h, exchange(of_layer.after_attention, y))

        x = [self._norm(device, h[device], prefix + "post_attention_layernorm.weight") for device in self.devices]
        if not isinstance(layer.mlp, MoEConfig):
            y = [self._mlp(device, x[device], prefix + "mlp.", layer.mlp.swiglu_limit) for device in self.devices]
            return _add(h, exchange(of_layer.after_mlp, y))
        limit = layer.mlp.shared_expert.swiglu_limit
        shared = [self._mlp(device, x[device], prefix + "share_expert.", limit) for device in self.devices]
        routed = [self._route(device, x[device], prefix + "moe.", layer.mlp) for device in self.devices]
        if of_layer.before_mlp is Collective.DISPATCH:
            experts = [self.plan.experts(layer.mlp, device) for device in self.devices]
            sent = dispatch(routed, experts)
            y = [self._moe(device, sent[device], prefix + "moe.", layer.mlp) for device in self.devices]
            return _add(h, _add(combine(y, [ids for _, ids, _ in routed], experts), shared))
        y = [self._moe(device, routed[device], prefix + "moe.", layer.mlp) for device in self.devices]
        if of_layer.shared_expert_is_partial:
            return _add(h, exchange(of_layer.after_mlp, _add(y, shared)))
        return _add(h, _add(exchange(of_layer.after_mlp, y), shared))

    def _attention(self, device: int, x: Array, layer: LayerConfig, lengths: list[int]) -> Array:
        prefix, reading = f"model.layers.{layer.index}.self_attn.", self.reference.plan(layer.index)
        projected = (self._linear(device, x, f"{prefix}{name}_proj.weight") for name in "qkv")
        q, k, v = (y.reshape(len(x), y.shape[1] // reading.head_dim, reading.head_dim) for y in projected)
        assert k.shape[1] == self.plan.num_key_value_heads_per_device(layer)
        positions = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0)
        assert reading.frequencies is not None
        q, k = (
            apply_rope(self._norm(device, heads, f"{prefix}{name}_norm.weight"), positions, reading.frequencies)
            for heads, name in ((q, "q"), (k, "k"))
        )
        bounds = np.cumsum([0, *lengths])
        out = np.empty(q.shape)
        for start, end in pairwise(bounds):
            request = slice(start, end)
            out[request] = attention(q[request], k[request], v[request], reading.window)
        out *= sigmoid(self._linear(device, x, prefix + "g_proj.weight"))[:, :, None]
        return self._linear(device, out.reshape(len(x), out.shape[1] * out.shape[2]), prefix + "o_proj.weight")

    def _mlp(self, device: int, x: Array, prefix: str, limit: float | None) -> Array:
        gate, up = (self.shards[device][f"{prefix}{name}_proj.weight"] for name in ("gate", "up"))
        (hidden,) = self._run("swiglu", x, gate, up, limit or np.inf)
        return self._linear(device, hidden, prefix + "down_proj.weight")

    def _route(self, device: int, x: Array, prefix: str, moe: MoEConfig) -> Routed:
        logits = self._linear(device, x, prefix + "gate.weight")
        ids, weights = self._run("route", logits, self.shards[device][prefix + "router_bias"], np.zeros(moe.top_k))
        return x, ids, weights

    def _moe(self, device: int, tokens: Routed, prefix: str, moe: MoEConfig) -> Array:
        x, ids, weights = tokens
        local = self.plan.experts(moe, device)
        matrices = [self.shards[device][f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down")]
        assert all(len(matrix) == len(local) for matrix in matrices)
        rows, offsets = self._run("group", ids, np.zeros(moe.num_experts))
        offsets = offsets[local.start : local.stop + 1]
        return self._run("experts", x, *matrices, rows, offsets, weights, moe.swiglu_limit or np.inf)[0]

    def _linear(self, device: int, x: Array, name: str) -> Array:
        return self._run("linear", x, self.shards[device][name])[0]

    def _run(self, op: str, *operands: Array | float) -> list[Array]:
        return self.ops.execute(op, *map(_contiguous, operands))

    def _norm(self, device: int, x: Array, name: str) -> Array:
        return rms_norm(x, self.shards[device][name], self.model.rms_norm_eps)


def exchange(collective: Collective | None, parts: Parts, axis: int = 0) -> Parts:
    """What every device has after a collective on `parts`."""
    match collective:
        case None:
            return parts
        case Collective.ALL_REDUCE:
            return [np.sum(parts, axis=0)] * len(parts)
        case Collective.ALL_GATHER:
            return [np.concatenate(parts, axis=axis)] * len(parts)
        case _:
            raise AssertionError(collective)


def dispatch(routed: Sequence[Routed], experts: Sequence[range]) -> list[Routed]:
    """All tokens as every device gets them: NaN for those that have no expert there."""
    x, ids, weights = (np.concatenate(values) for values in zip(*routed, strict=True))
    received = []
    for here in experts:
        are_here = np.isin(ids, here)
        needed = are_here.any(axis=1, keepdims=True)
        received.append((np.where(needed, x, np.nan), ids, np.where(are_here, weights, 0)))
    return received


def combine(sums: Parts, ids: Sequence[Array], experts: Sequence[range]) -> Parts:
    """The sums of every device's own tokens, each from those devices alone that have experts of it."""
    ends = np.cumsum([len(of_device) for of_device in ids])
    results = []
    for own, end in zip(ids, ends, strict=True):
        rows = slice(end - len(own), end)
        has_some = [np.isin(own, here).any(axis=1, keepdims=True) for here in experts]
        results.append(np.sum([np.where(has, y[rows], 0) for has, y in zip(has_some, sums, strict=True)], axis=0))
    return results


def _add(left: Parts, right: Parts) -> Parts:
    return [a + b for a, b in zip(left, right, strict=True)]
