"""What lies in a device's memory, and how many requests of what length fit beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from step3p5.byte_account import drafting_tensors
from step3p5.checkpoint_tensors import checkpoint_tensors
from step3p5.layer_config import AttentionConfig, DenseMLPConfig, LayerConfig
from step3p5.mailbox_size import mailbox_bytes, most_tokens
from step3p5.parallel_plan import ParallelPlan
from step3p5.plan.gpus import GPU
from step3p5.plan.weight_formats import WeightFormat
from step3p5.speculation.draft_vocabulary import draft_vocabulary_size

UTILIZATION = 0.9
"""Share of the memory that MAX fills: the default of `--device-memory-utilization`. The rest is the runtime's."""

PAGE_SIZE = 128
"""Tokens of a page of the KV cache: the default of `--kv-cache-page-size`."""

STEP_TOKENS = 8192
"""Most new tokens of a step: the default of `--max-batch-input-tokens`."""

GRAPH_BYTES = 1e9
"""Allowance for compiled kernels and captured decode graphs; assumed, not counted."""

PRODUCT_BYTES = 256 * 1024**2
"""Most memory for the expert products that wait for their sum: `PARTS_BYTES` of the kernels."""

ASSIGNMENT_BYTES = 12
"""Of an assignment: its expert, its weight and its place among the expert's."""

SIGNAL_BYTES = 294_387_728
"""A device's signal buffer, through which collectives pass: `Signals.NUM_BYTES` of MAX 26.7."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the fullest device.

    `cache` has the KV caches by the layers' kind of attention; `signals` are the buffers of the collectives, mailboxes
    included.
    """

    weights: float
    cache: Mapping[str, float]
    activations: float
    signals: float
    graphs: float

    @property
    def fixed(self) -> float:
        """All but the caches."""
        return self.weights + self.activations + self.signals + self.graphs

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.fixed + sum(self.cache.values())

    def fits(self, gpu: GPU) -> bool:
        """Whether MAX would place all of it on the GPU."""
        return self.total <= UTILIZATION * gpu.memory


def device_memory(
    plan: ParallelPlan, weights: WeightFormat, batch: int, context: int, mtp_depth: int = 0
) -> DeviceMemory:
    """The memory of a device that serves its part of `batch` requests of up to `context` tokens.

    Args:
        plan: Where the tensors lie.
        weights: How they are stored.
        batch: Requests at a time, of all devices together.
        context: Longest request, prompt and answer.
        mtp_depth: MTP layers that are loaded and have caches.
    """
    tensors = checkpoint_tensors(plan.model)
    drafting = plan.model.mtp_layers[:mtp_depth]
    tensors |= drafting_tensors(plan.model, mtp_depth, draft_vocabulary_size(plan.model))
    requests = requests_per_device(plan, batch)
    cache: dict[str, float] = {}
    for layer in (*plan.model.layers, *drafting):
        kind = layer.attention.kind.value
        cache[kind] = cache.get(kind, 0.0) + requests * _cache_bytes(plan, weights, layer, context)
    return DeviceMemory(
        weights=sum(
            weights.num_bytes(plan.placements[name].shard_shape(spec.shape), spec.role)
            for name, spec in tensors.items()
        ),
        cache=cache,
        activations=_activation_bytes(plan, weights, requests),
        signals=_signal_bytes(plan, weights, requests),
        graphs=GRAPH_BYTES,
    )


def _signal_bytes(plan: ParallelPlan, weights: WeightFormat, requests: int) -> float:
    if plan.num_devices == 1:
        return 0.0
    if not plan.own_requests:
        return SIGNAL_BYTES
    tokens = most_tokens(STEP_TOKENS, requests, whole_prompt=0)
    return SIGNAL_BYTES + mailbox_bytes(plan.model, plan.num_devices, tokens, weights.itemsize)


def requests_per_device(plan: ParallelPlan, batch: int) -> int:
    """Requests whose caches the fullest device has."""
    return math.ceil(batch / plan.num_devices) if plan.own_requests else batch


def largest_batch(plan: ParallelPlan, weights: WeightFormat, gpu: GPU, context: int, mtp_depth: int = 0) -> int:
    """Most requests of `context` tokens that fit; 0 if not even one does."""

    def fits(requests: int) -> bool:
        batch = requests * plan.num_devices if plan.own_requests else requests
        return device_memory(plan, weights, batch, context, mtp_depth).fits(gpu)

    return _largest(fits, 1 << 20) * (plan.num_devices if plan.own_requests else 1)


def largest_context(plan: ParallelPlan, weights: WeightFormat, gpu: GPU, batch: int, mtp_depth: int = 0) -> int:
    """Longest requests of which `batch` fit, up to the model's `max_position_embeddings`; 0 if there are none."""

    def fits(context: int) -> bool:
        return device_memory(plan, weights, batch, context, mtp_depth).fits(gpu)

    return _largest(fits, plan.model.max_position_embeddings)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` that fits, if all below it do."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _cache_bytes(plan: ParallelPlan, weights: WeightFormat, layer: LayerConfig, context: int) -> float:
    """A request's keys and values of one layer on one device, in whole pages."""
    pages = math.ceil(context / PAGE_SIZE)
    window = layer.attention.sliding_window
    if window is not None:
        # The pages that hold the window, and the one that is being written.
        pages = min(pages, math.ceil((window - 1) / PAGE_SIZE) + 1)
    heads = plan.num_key_value_heads_per_device(layer)
    return 2.0 * pages * PAGE_SIZE * heads * layer.attention.head_dim * weights.itemsize


def _activation_bytes(plan: ParallelPlan, weights: WeightFormat, requests: int) -> float:
    """The most that lives at a time in a step of `STEP_TOKENS` tokens: the stream and the widest layer, or the head."""
    tokens = max(STEP_TOKENS, requests)
    hidden = tokens * plan.model.hidden_size * weights.itemsize
    widest = max(
        max(_attention_bytes(plan, weights, layer.attention, tokens), _mlp_bytes(plan, weights, layer, tokens))
        for layer in plan.model.layers
    )
    all_requests = requests * plan.num_devices if plan.own_requests else requests
    logits = all_requests * plan.model.vocab_size * 4.0
    return 2 * hidden + max(widest, logits)


def _attention_bytes(plan: ParallelPlan, weights: WeightFormat, attention: AttentionConfig, tokens: int) -> float:
    """Queries, keys, values and the attended values."""
    share = plan.num_devices if not plan.own_requests else 1
    heads = 2 * attention.num_attention_heads + 2 * attention.num_key_value_heads
    return float(tokens * heads * attention.head_dim * weights.itemsize) / share


def _mlp_bytes(plan: ParallelPlan, weights: WeightFormat, layer: LayerConfig, tokens: int) -> float:
    """Dense: the gated activations. MoE: those of every assignment, the products that wait, and the float32 sums."""
    if isinstance(layer.mlp, DenseMLPConfig):
        return float(tokens * layer.mlp.intermediate_size * weights.itemsize)
    moe, hidden = layer.mlp, plan.model.hidden_size
    name = f"model.layers.{layer.index}.moe.gate_proj.weight"
    width = plan.placements[name].shard_shape((moe.num_experts, moe.intermediate_size, hidden))[1]
    logits = tokens * moe.num_experts * 4  # of the router, float32
    received = 0
    if plan.own_requests:
        tokens *= plan.num_devices  # a device's experts see every replica's
        received = tokens * hidden * weights.itemsize
    assignments = tokens * moe.top_k
    products = min(assignments * hidden * weights.itemsize, PRODUCT_BYTES)
    activations = assignments * width * weights.itemsize + products + tokens * hidden * 4
    return float(logits + received + activations + assignments * ASSIGNMENT_BYTES)
