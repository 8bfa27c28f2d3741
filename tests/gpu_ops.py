"""A graph of every op on a GPU, and a program that compiles it for a target without one.

    python tests/gpu_ops.py cuda:sm_90a

Virtual devices are a property of the process, so that every target needs one of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from max.driver import set_virtual_device_api, set_virtual_device_count, set_virtual_device_target_arch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    _api, _arch = sys.argv[1].split(":")
    set_virtual_device_api(_api)
    set_virtual_device_target_arch(_arch)
    set_virtual_device_count(1)

from max.driver import Accelerator
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import BufferType, DeviceRef, Graph, Module, TensorType, TensorValue, Value, ops
from max.nn.kv_cache import PagedCacheValues

from step3p5 import attention_kernels, kernels
from step3p5.layer_config import RopeConfig
from step3p5.layers.dispatch import MailboxDispatch
from step3p5.layers.moe import RoutedTokens
from step3p5.layers.rope import rope_table
from step3p5.mailboxes import mailbox_types

GPU = DeviceRef.GPU()
TOP_K, HEADS, KEY_HEADS, HEAD_DIM, ROTARY_DIM, PAGE_SIZE = 8, 8, 2, 128, 64, 128
EPS = 1e-5


def experts_inputs(dtype: DType) -> list[TensorType]:
    """`x`, `gate`, `up`, `down`, router logits, router bias."""
    experts, hidden, width = (f"{dtype.name}_{size}" for size in ("E", "H", "M"))
    return [
        TensorType(dtype, (f"{dtype.name}_T", hidden), GPU),
        TensorType(dtype, (experts, width, hidden), GPU),
        TensorType(dtype, (experts, width, hidden), GPU),
        TensorType(dtype, (experts, hidden, width), GPU),
        TensorType(DType.float32, (f"{dtype.name}_T", experts), GPU),
        TensorType(DType.float32, (experts,), GPU),
    ]


def experts(
    x: TensorValue, gate: TensorValue, up: TensorValue, down: TensorValue, logits: TensorValue, bias: TensorValue
) -> list[TensorValue]:
    """The routed experts, the dense layers with the matrices of the first, and the greatest of the router's logits."""
    limit = ops.constant(7.0, DType.float32, device=DeviceRef.CPU())
    ids, weights = kernels.route(logits, bias, top_k=TOP_K, normalize=True, scale=3.0)
    rows, offsets = kernels.group(ids, num_experts=bias.shape[0])
    act = kernels.gate_up(x, gate, up, rows, offsets, limit)
    y = kernels.down(act, down, rows, offsets, weights)
    gated = kernels.swiglu(x, gate[0], up[0], limit)
    assigned = kernels.assign(logits, bias, top_k=TOP_K, normalize=True, scale=3.0)
    quartet = kernels.linear4(gated, down[0], down[1], down[2], down[3])
    both = kernels.gate_up_shared(x, gate, up, gate[0], up[0], rows, offsets, limit, limit)
    shared = kernels.down_shared(both[0], down, both[1], down[0], rows, offsets, weights)
    normed = kernels.norm(x, x[0], eps=1e-5, offset=1.0)
    sums = kernels.add_norm(x, y, x[0], eps=1e-5, offset=1.0)
    greatest = kernels.greedy(logits, ops.constant([5], DType.int64, device=GPU))
    return [
        ids,
        weights,
        rows,
        offsets,
        act,
        y,
        gated,
        kernels.linear(gated, down[0]),
        kernels.linear(gated, down[0], dtype=DType.float32),
        *assigned,
        *quartet,
        shared,
        normed,
        *sums,
        greatest,
    ]


def rope_inputs() -> list[TensorType]:
    """`x`, row offsets, cache lengths."""
    return [
        TensorType(DType.bfloat16, ("rope_T", HEADS, HEAD_DIM), GPU),
        TensorType(DType.uint32, ("rope_R1",), GPU),
        TensorType(DType.uint32, ("rope_R",), GPU),
    ]


def rope(x: TensorValue, row_offsets: TensorValue, cache_lengths: TensorValue) -> list[TensorValue]:
    """The table of angles, and gated heads."""
    table = rope_table(RopeConfig(theta=1e4, rotary_dim=ROTARY_DIM, scaling=None), x, row_offsets, cache_lengths)
    return [table, attention_kernels.head_gate(x, x[:, :, 0])]


def attend_inputs() -> list[TensorType | BufferType]:
    """Projections of queries, keys, values and gates, norm weights, rope tables for all keys and for a window, offsets,
    lengths, pages; on the host stride, layer, most tokens, most cached, dispatch; the cache."""
    widths = (HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM, KEY_HEADS * HEAD_DIM, HEADS)
    return [
        *(TensorType(DType.bfloat16, ("attend_T", width), GPU) for width in widths),
        *2 * [TensorType(DType.bfloat16, (HEAD_DIM,), GPU)],
        *(TensorType(DType.float32, ("attend_T", columns), GPU) for columns in (ROTARY_DIM, HEAD_DIM)),
        TensorType(DType.uint32, ("attend_R1",), GPU),
        TensorType(DType.uint32, ("attend_R",), GPU),
        TensorType(DType.uint32, ("attend_R", "M"), GPU),
        TensorType(DType.int64, (1,), DeviceRef.CPU()),
        TensorType(DType.uint32, (), DeviceRef.CPU()),
        *2 * [TensorType(DType.uint32, (1,), DeviceRef.CPU())],
        TensorType(DType.int64, (4,), DeviceRef.CPU()),
        BufferType(DType.bfloat16, ["P", 2, "L", PAGE_SIZE, KEY_HEADS, HEAD_DIM], GPU),
    ]


@dataclass(frozen=True)
class AttendValues:
    """The values of `attend_inputs`, as the ops take them."""

    projections: tuple[TensorValue, TensorValue, TensorValue]
    gate: TensorValue
    norm: attention_kernels.HeadNorm
    table: TensorValue
    place: tuple[TensorValue, PagedCacheValues, TensorValue]

    @classmethod
    def of(cls, values: Sequence[Value[Any]], window: int | None) -> AttendValues:
        """With the rope table for this window, or for none."""
        q, k, v, gate, q_weight, k_weight, full, windowed, offsets = (value.tensor for value in values[:9])
        lengths, pages, stride, layer, most_tokens, most_cached, dispatch = (value.tensor for value in values[9:16])
        cache = PagedCacheValues(
            kv_blocks=values[16].buffer,
            cache_lengths=lengths,
            lookup_table=pages,
            max_prompt_length=most_tokens,
            max_cache_length=most_cached,
            page_stride=stride,
            attention_dispatch_metadata=dispatch,
        )
        norm = attention_kernels.HeadNorm(q_weight, k_weight, EPS, 1.0)
        return cls((q, k, v), gate, norm, windowed if window else full, (offsets, cache, layer))


def attend(values: Sequence[Value[Any]], window: int | None) -> TensorValue:
    """Plain attention over the paged cache, with what stands before and behind it."""
    own = AttendValues.of(values, window)
    q = attention_kernels.qkv(*own.projections, own.norm, own.table, *own.place)
    return attention_kernels.head_gate(attention_kernels.attend(q, *own.place, window or 0, HEAD_DIM**-0.5), own.gate)


def attention(values: Sequence[Value[Any]], window: int | None) -> TensorValue:
    """Attention as a model has it where MAX has a kernel; what that needs besides ours takes minutes to compile."""
    own = AttendValues.of(values, window)
    return attention_kernels.gated_attention(
        *own.projections, own.gate, own.norm, own.table, *own.place, window, HEAD_DIM**-0.5
    )


def dispatch_inputs(num_devices: int) -> list[TensorType | BufferType]:
    """Where every device's tokens begin, their mailboxes with addresses, every device's tokens with their experts."""
    routed = [
        of_input
        for i in range(num_devices)
        for of_input in (
            TensorType(DType.bfloat16, (f"own_{i}", "own_H"), GPU),
            TensorType(DType.int32, (f"own_{i}", TOP_K), GPU),
            TensorType(DType.float32, (f"own_{i}", TOP_K), GPU),
        )
    ]
    bounds = TensorType(DType.int64, (num_devices + 1,), DeviceRef.CPU())
    return [bounds, *mailbox_types([GPU] * num_devices), *routed]


def dispatch(values: Sequence[Value[Any]], num_devices: int, num_experts: int) -> list[TensorValue]:
    """Tokens to the experts and back, all devices being one GPU, each expert the identity: `x * sum(weights)`.

    One queue must send everything before it receives anything. The order of the ops is kept only among those that may
    write to the same buffer, so that all are given the first mailbox; they find their own by its address.
    """
    bounds, *rest = values
    mailboxes, addresses = rest[:num_devices], rest[num_devices]
    tokens = iter(value.tensor for value in rest[num_devices + 1 :])
    each = num_experts // num_devices
    way = MailboxDispatch(
        [range(i * each, (i + 1) * each) for i in range(num_devices)],
        bounds.tensor,
        [mailboxes[0].buffer] * num_devices,
        addresses.tensor,
    )
    own = [RoutedTokens(next(tokens), next(tokens), next(tokens)) for _ in range(num_devices)]
    way.send(own)
    received = way.receive(own)
    sums = [of.x.cast(DType.float32) * ops.sum(of.weights, axis=-1) for of in received]
    return way.combine(sums, received, own)


def all_ops(name: str, module: Module) -> Graph:
    """Every op, the products in bfloat16 and in float32."""
    parts: list[tuple[Callable[..., list[TensorValue]], list[TensorType]]] = [
        (experts, experts_inputs(DType.bfloat16)),
        (experts, experts_inputs(DType.float32)),
        (rope, rope_inputs()),
    ]
    inputs = [of_input for _, types in parts for of_input in types]
    others = len(inputs) + len(attend_inputs())
    types = [*inputs, *attend_inputs(), *dispatch_inputs(2)]
    with Graph(name, input_types=types, module=module) as graph:
        values = iter([value.tensor for value in graph.inputs[: len(inputs)]])
        results = [result for build, types in parts for result in build(*(next(values) for _ in types))]
        results.append(attend(graph.inputs[len(inputs) : others], window=None))
        graph.output(*results, *dispatch(graph.inputs[others:], num_devices=2, num_experts=16))
    return graph


if __name__ == "__main__":
    InferenceSession(devices=[Accelerator()]).compile(all_ops("all_ops", Module()))
    sys.stdout.write("compiled")
    sys.stdout.flush()
    os._exit(0)  # with virtual devices, MAX's threads can abort the interpreter's ordinary exit
