"""Checks and times the ops on attention's heads on one NVIDIA GPU: norms, rotations, cache stores; the heads' gates.

    python benchmarks/heads.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/heads.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks against PyTorch in float32 (outputs and cache held NaN before) and measures the device's busy time over
back-to-back launches, each on other operands, against the bytes that must move. Sizes are Step-3.5-Flash's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kernel_variants import OpBenchmark, Variant
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, TensorType, ops
from max.nn.kv_cache import PagedCacheValues

from step3p5 import attention_kernels

GPU, HOST = DeviceRef.GPU(), DeviceRef.CPU()
BF16, U32 = DType.bfloat16, DType.uint32

HEAD_DIM, KEY_HEADS, PAGE_SIZE = 128, 8, 128
EPS = 1e-5

SHAPES = {"full": (64, 64), "sliding": (96, 128)}
"""Query heads and rotated columns of the two kinds of layer."""

LAUNCHES = 8
"""Launches of a graph, each with its own operands and layer of the cache."""

TOKENS = (1, 8, 64, 512, 2048, 8192)


def qkv_graph() -> Graph:
    """(q weight, k weight, angles, offsets, cache, stride, lengths, lookup; q, k, v a launch) -> queries a launch."""
    types: list[TensorType | BufferType] = [
        *2 * (TensorType(BF16, (HEAD_DIM,), GPU),),
        TensorType(DType.float32, ("T", "rotated"), GPU),
        TensorType(U32, ("R1",), GPU),
        BufferType(BF16, ("P", 2, LAUNCHES, PAGE_SIZE, KEY_HEADS, HEAD_DIM), GPU),
        TensorType(DType.int64, (1,), HOST),
        TensorType(U32, ("R",), GPU),
        TensorType(U32, ("R", "pages"), GPU),
    ]
    for _ in range(LAUNCHES):
        types.append(TensorType(BF16, ("T", "query_size"), GPU))
        types += 2 * [TensorType(BF16, ("T", KEY_HEADS * HEAD_DIM), GPU)]
    with Graph("qkv", input_types=types) as graph:
        q_weight, k_weight, table, offsets = (value.tensor for value in graph.inputs[:4])
        stride, lengths, lookup = (value.tensor for value in graph.inputs[5:8])
        most = ops.constant([1], U32, device=HOST)
        cache = PagedCacheValues(
            kv_blocks=graph.inputs[4].buffer,
            cache_lengths=lengths,
            lookup_table=lookup,
            max_prompt_length=most,
            max_cache_length=most,
            page_stride=stride,
        )
        norm = attention_kernels.HeadNorm(q_weight, k_weight, EPS, 1.0)
        launches = [value.tensor for value in graph.inputs[8:]]
        results = []
        for i in range(LAUNCHES):
            q, k, v = launches[3 * i : 3 * i + 3]
            layer = ops.constant(i, U32, device=HOST)
            results.append(attention_kernels.qkv(q, k, v, norm, table, offsets, cache, layer))
        graph.output(*results)
    return graph


def gate_graph() -> Graph:
    """(x and gate of every launch) -> y of every launch."""
    pair = (TensorType(BF16, ("T", "N", HEAD_DIM), GPU), TensorType(BF16, ("T", "N"), GPU))
    with Graph("head_gate", input_types=LAUNCHES * pair) as graph:
        values = [value.tensor for value in graph.inputs]
        graph.output(*(attention_kernels.head_gate(x, gate) for x, gate in zip(values[::2], values[1::2], strict=True)))
    return graph


GRAPHS: dict[str, Callable[[], Graph]] = {"qkv": qkv_graph, "head_gate": gate_graph}


BENCHMARK = OpBenchmark(Path(__file__), GRAPHS, {"default": Variant((), tuple(GRAPHS))})


def add_options(running: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    running.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    running.add_argument("--request-tokens", type=int, default=1024, help="new tokens of a request (1024)")


def run(options: argparse.Namespace) -> None:
    """Measures; PyTorch is not imported before."""
    import heads_run

    heads_run.run(options.folder / "default", options.tokens, options.request_tokens)


if __name__ == "__main__":
    BENCHMARK.main(__doc__, add_options, run)
