"""Checks and times attention over the paged cache on one NVIDIA GPU, from the projections to the gated heads.

For few new tokens a request: our one kernel, beside MAX's attention with our kernels for the heads before it and the
gates behind it.

    python benchmarks/attention.py compile DIR    cross-compiles for sm_90a, on a machine without a GPU
    python benchmarks/attention.py run DIR        on the GPU's machine, which needs PyTorch

`run` checks both against PyTorch in float32 (where our kernel runs, the cache holds NaN behind the tokens that were
there before) and measures replays of a captured graph of launches, each on other queries and keys, against the bytes of
keys and values that must be read over the measured copy rate. Sizes are Step-3.5-Flash's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if "run" in sys.argv[1:2]:
    # PyTorch has the other half.
    os.environ.setdefault("MODULAR_DEVICE_CONTEXT_MEMORY_MANAGER_SIZE_PERCENT", "45")

from heads import EPS, HEAD_DIM, KEY_HEADS, PAGE_SIZE
from kernel_variants import OpBenchmark, Variant
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, TensorType, TensorValue, ops
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged
from max.nn.kv_cache import PagedCacheValues
from max.nn.kv_cache.cache_params import MHAKVCacheParams
from moe_graphs import LAUNCHES

from step3p5 import attention_kernels

GPU, HOST = DeviceRef.GPU(), DeviceRef.CPU()
BF16, U32, I64 = DType.bfloat16, DType.uint32, DType.int64

SHAPES = {"full": (64, None, 64), "sliding": (96, 512, 128)}
"""Query heads, window and rotated columns of the two kinds of layer."""


class Launch(NamedTuple):
    """What one launch takes."""

    q: TensorValue
    k: TensorValue
    v: TensorValue
    gate: TensorValue


class Batch(NamedTuple):
    """What all launches take."""

    norm: attention_kernels.HeadNorm
    table: TensorValue
    offsets: TensorValue
    cache: PagedCacheValues


Attend = Callable[[Launch, Batch, TensorValue, int | None], TensorValue]


def ours(launch: Launch, batch: Batch, layer: TensorValue, window: int | None) -> TensorValue:
    return attention_kernels.gated_attention(*launch, *batch, layer, window, HEAD_DIM**-0.5)


def of_max(launch: Launch, batch: Batch, layer: TensorValue, window: int | None) -> TensorValue:
    q = attention_kernels.qkv(launch.q, launch.k, launch.v, *batch, layer)
    params = MHAKVCacheParams(
        dtype=BF16, n_kv_heads=KEY_HEADS, head_dim=HEAD_DIM, num_layers=LAUNCHES, page_size=PAGE_SIZE, devices=[GPU]
    )
    mask = MHAMaskVariant.CAUSAL_MASK if window is None else MHAMaskVariant.SLIDING_WINDOW_CAUSAL_MASK
    heads = flash_attention_ragged(
        params, q, batch.offsets, batch.cache, layer, mask, scale=HEAD_DIM**-0.5, local_window_size=window or -1
    )
    return attention_kernels.head_gate(heads, launch.gate)


FIXED = 11
"""Inputs before those of the first launch."""

PATHS: dict[str, Attend] = {"ours": ours, "max": of_max}


def attention_graph(path: str, kind: str) -> Graph:
    """A graph of launches, each with results of its own.

    Inputs: offsets, cache, stride, lengths, lookup, most tokens, most cached, dispatch, norm weights, rope table; then
    each launch's projections of queries, keys, values and gates.
    """
    heads, window, rotated = SHAPES[kind]
    widths = (heads * HEAD_DIM, KEY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM, heads)
    types: list[TensorType | BufferType] = [
        TensorType(U32, ("R1",), GPU),
        BufferType(BF16, ("P", 2, LAUNCHES, PAGE_SIZE, KEY_HEADS, HEAD_DIM), GPU),
        TensorType(I64, (1,), HOST),
        TensorType(U32, ("R",), GPU),
        TensorType(U32, ("R", "pages"), GPU),
        TensorType(U32, (1,), HOST),
        TensorType(U32, (1,), HOST),
        TensorType(I64, (4,), HOST),
        *2 * [TensorType(BF16, (HEAD_DIM,), GPU)],
        TensorType(DType.float32, ("T", rotated), GPU),
        *LAUNCHES * [TensorType(BF16, ("T", width), GPU) for width in widths],
    ]
    with Graph(f"attention_{path}_{kind}", input_types=types) as graph:
        offsets = graph.inputs[0].tensor
        stride, lengths, lookup, most_tokens, most_cached, dispatch = (value.tensor for value in graph.inputs[2:8])
        q_weight, k_weight, table = (value.tensor for value in graph.inputs[8:FIXED])
        cache = PagedCacheValues(
            kv_blocks=graph.inputs[1].buffer,
            cache_lengths=lengths,
            lookup_table=lookup,
            max_prompt_length=most_tokens,
            max_cache_length=most_cached,
            page_stride=stride,
            attention_dispatch_metadata=dispatch,
        )
        batch = Batch(attention_kernels.HeadNorm(q_weight, k_weight, EPS, 1.0), table, offsets, cache)
        own = [value.tensor for value in graph.inputs[FIXED:]]
        results = []
        for i in range(LAUNCHES):
            layer = ops.constant(i, U32, device=HOST)
            results.append(PATHS[path](Launch(*own[4 * i : 4 * i + 4]), batch, layer, window))
        graph.output(*results)
    return graph


GRAPHS = {f"{path}-{kind}": partial(attention_graph, path, kind) for path in PATHS for kind in SHAPES}

BENCHMARK = OpBenchmark(Path(__file__), GRAPHS, {"default": Variant((), tuple(GRAPHS))})


def add_options(running: argparse.ArgumentParser) -> None:
    """The options of `run`."""
    running.add_argument("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "attention.json")


def run(options: argparse.Namespace) -> None:
    """Measures; PyTorch is not imported before."""
    import attention_run

    attention_run.run(options.folder / "default", options.json)


if __name__ == "__main__":
    BENCHMARK.main(__doc__, add_options, run)
