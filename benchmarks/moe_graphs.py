"""The graphs that `moe.py` compiles and `moe_run.py` measures: one op, launched many times with other operands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops

from step3p5 import kernels

EXPERTS, TOP_K, HIDDEN, WIDTH = 288, 8, 4096, 1280
SCALE = 3.0
GPU = DeviceRef.GPU()
BF16, F32, I32 = DType.bfloat16, DType.float32, DType.int32

LAUNCHES = 8
"""Launches of a graph, each with other operands: together they read far more than the second-level cache holds."""

Build = Callable[[], Graph]


def no_limit() -> TensorValue:
    return ops.constant(float("inf"), F32, device=DeviceRef.CPU())


def experts_graph() -> Graph:
    """(x, gate, up, down, then rows, offsets and weights of every launch) -> y of every launch."""
    types = [TensorType(BF16, shape, GPU) for shape in (("T", HIDDEN), *2 * ((EXPERTS, WIDTH, HIDDEN),))]
    types.append(TensorType(BF16, (EXPERTS, HIDDEN, WIDTH), GPU))
    for _ in range(LAUNCHES):
        types += [TensorType(I32, ("A",), GPU), TensorType(I32, (EXPERTS + 1,), GPU)]
        types.append(TensorType(F32, ("T", TOP_K), GPU))
    with Graph("experts", input_types=types) as graph:
        x, gate, up, down, *launches = (value.tensor for value in graph.inputs)
        outputs = []
        for i in range(LAUNCHES):
            rows, offsets, weights = launches[3 * i : 3 * i + 3]
            act = kernels.gate_up(x, gate, up, rows, offsets, no_limit())
            outputs.append(kernels.down(act, down, rows, offsets, weights))
        graph.output(*outputs)
    return graph


def layer_graph() -> Graph:
    """(router, bias, gate, up, down, shared gate, up and down, then x of every launch) -> y of every launch."""
    types = [TensorType(BF16, (EXPERTS, HIDDEN), GPU), TensorType(F32, (EXPERTS,), GPU)]
    types += 2 * [TensorType(BF16, (EXPERTS, WIDTH, HIDDEN), GPU)] + [TensorType(BF16, (EXPERTS, HIDDEN, WIDTH), GPU)]
    types += 2 * [TensorType(BF16, (WIDTH, HIDDEN), GPU)] + [TensorType(BF16, (HIDDEN, WIDTH), GPU)]
    types += LAUNCHES * [TensorType(BF16, ("T", HIDDEN), GPU)]
    with Graph("layer", input_types=types) as graph:
        router, bias, gate, up, down, *shared = (value.tensor for value in graph.inputs[:8])
        outputs = []
        for x in (value.tensor for value in graph.inputs[8:]):
            logits = kernels.linear(x, router, dtype=F32)
            chosen = kernels.assign(logits, bias, top_k=TOP_K, normalize=True, scale=SCALE)
            act, shared_act = kernels.gate_up_shared(
                x, gate, up, shared[0], shared[1], chosen.rows, chosen.offsets, no_limit(), no_limit()
            )
            operands = (act, down, shared_act, shared[2], chosen.rows, chosen.offsets, chosen.weights)
            outputs.append(kernels.down_shared(*operands))
        graph.output(*outputs)
    return graph


def router_graph() -> Graph:
    """(bias, then router and x of every launch) -> ids, weights, rows and offsets of every launch.

    The routers fit into the second-level cache, from which a model's has been displaced.
    """
    types = [TensorType(F32, (EXPERTS,), GPU)]
    types += LAUNCHES * [TensorType(BF16, (EXPERTS, HIDDEN), GPU), TensorType(BF16, ("T", HIDDEN), GPU)]
    with Graph("router", input_types=types) as graph:
        bias, *launches = (value.tensor for value in graph.inputs)
        outputs = list[TensorValue]()
        for router, x in zip(launches[::2], launches[1::2], strict=True):
            logits = kernels.linear(x, router, dtype=F32)
            outputs += kernels.assign(logits, bias, top_k=TOP_K, normalize=True, scale=SCALE)
        graph.output(*outputs)
    return graph


def route_graph() -> Graph:
    """(bias, then logits of every launch) -> ids and weights of every launch."""
    types = [TensorType(F32, (EXPERTS,), GPU), *LAUNCHES * [TensorType(F32, ("T", EXPERTS), GPU)]]
    with Graph("route", input_types=types) as graph:
        bias, *launches = (value.tensor for value in graph.inputs)
        routed = [kernels.route(logits, bias, top_k=TOP_K, normalize=True, scale=SCALE) for logits in launches]
        graph.output(*(result for pair in routed for result in pair))
    return graph


def group_graph() -> Graph:
    """(ids of every launch) -> rows and offsets of every launch."""
    with Graph("group", input_types=LAUNCHES * [TensorType(I32, ("T", TOP_K), GPU)]) as graph:
        grouped = [kernels.group(ids.tensor, num_experts=EXPERTS) for ids in graph.inputs]
        graph.output(*(result for pair in grouped for result in pair))
    return graph


GRAPHS: dict[str, Build] = {
    "experts": experts_graph,
    "layer": layer_graph,
    "router": router_graph,
    "route": route_graph,
    "group": group_graph,
}
