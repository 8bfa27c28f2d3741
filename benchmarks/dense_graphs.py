"""The graphs that `dense.py` compiles and `dense_run.py` measures: dense products, launched with many weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, ops

from step3p5 import kernels

GPU = DeviceRef.GPU()
BF16 = DType.bfloat16

LAUNCHES = 16
"""Launches of a graph, each with its own weights: together they are larger than the second-level cache."""

SINGLE = ((4096, 8192), (4096, 12288), (4096, 1024), (8192, 4096), (12288, 4096), (11264, 4096), (1280, 4096))

SHAPES: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "linear": tuple((depth, (rows,)) for depth, rows in SINGLE),
    "swiglu": tuple((4096, (rows, rows)) for rows in (11264, 1280)),
    "qkv": ((4096, (8192, 1024, 1024, 64)), (4096, (12288, 1024, 1024, 96))),
}
"""Input features and rows of each weight tensor of a launch: Step-3.5-Flash's dense products."""


def linear_graph() -> Graph:
    """(x, then w of every launch) -> y of every launch."""
    types = [TensorType(BF16, ("T", "K"), GPU), *LAUNCHES * [TensorType(BF16, ("N", "K"), GPU)]]
    with Graph("linear", input_types=types) as graph:
        x, *weights = (value.tensor for value in graph.inputs)
        graph.output(*(kernels.linear(x, w) for w in weights))
    return graph


def swiglu_graph() -> Graph:
    """(x, then gate and up of every launch) -> activations of every launch."""
    types = [TensorType(BF16, ("T", "K"), GPU), *2 * LAUNCHES * [TensorType(BF16, ("N", "K"), GPU)]]
    with Graph("swiglu", input_types=types) as graph:
        x, *weights = (value.tensor for value in graph.inputs)
        limit = ops.constant(float("inf"), DType.float32, device=DeviceRef.CPU())
        pairs = zip(weights[::2], weights[1::2], strict=True)
        graph.output(*(kernels.swiglu(x, gate, up, limit) for gate, up in pairs))
    return graph


def qkv_graph() -> Graph:
    """(x, then the weights of queries, keys, values and gates of every launch) -> as many results."""
    types = [TensorType(BF16, ("T", "K"), GPU)]
    types += [TensorType(BF16, (f"N{i}", "K"), GPU) for _ in range(LAUNCHES) for i in range(4)]
    with Graph("qkv", input_types=types) as graph:
        x, *weights = (value.tensor for value in graph.inputs)
        quartets = zip(*(weights[i::4] for i in range(4)), strict=True)
        graph.output(*(result for quartet in quartets for result in kernels.linear4(x, *quartet)))
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {"linear": linear_graph, "swiglu": swiglu_graph, "qkv": qkv_graph}
