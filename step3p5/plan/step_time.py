"""The least time that a step can take: bytes over bandwidth, operations over their rate, part by part.

A part (attention's weights, the caches, the experts, …) takes the longer of its two times; parts and collectives follow
one another. Latencies, launches and what a kernel wastes come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from step3p5.byte_account import EXPERT_ROLES, Forward, attention_flops, cache_bytes, drafting_tensors, experts_hit
from step3p5.checkpoint_tensors import CheckpointDtype, TensorRole, TensorSpec, checkpoint_tensors
from step3p5.layer_config import LayerConfig, MoEConfig
from step3p5.parallel_plan import ParallelPlan
from step3p5.plan.gpus import GPU
from step3p5.plan.links import head_sent_bytes, layer_sent_bytes
from step3p5.plan.memory import requests_per_device
from step3p5.plan.routing import busiest_device_experts
from step3p5.plan.weight_formats import WeightFormat
from step3p5.speculation.draft_vocabulary import draft_vocabulary_size


class Part(StrEnum):
    """A part of a step."""

    ATTENTION = "attention"
    CACHE = "KV cache"
    DENSE = "dense MLPs"
    ROUTER = "routers"
    SHARED = "shared experts"
    EXPERTS = "routed experts"
    HEAD = "embedding, head"
    OTHER = "norms, projections"
    LINKS = "links"


@dataclass(frozen=True)
class Work:
    """What one device does for one part: bytes from memory (or over its links), floating-point operations, seconds."""

    num_bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Step:
    """A step of every device's part of a batch: the work of the busiest device by part."""

    num_requests: int
    work: Mapping[Part, Work]

    @property
    def seconds(self) -> float:
        """The least time of the step."""
        return sum(work.seconds for work in self.work.values())

    @property
    def memory_bytes(self) -> float:
        """Bytes that the busiest device reads."""
        return sum(work.num_bytes for part, work in self.work.items() if part is not Part.LINKS)

    @property
    def link_bytes(self) -> float:
        """Bytes that a device sends."""
        return self.work[Part.LINKS].num_bytes

    @property
    def flops(self) -> float:
        """Operations of the busiest device."""
        return sum(work.flops for work in self.work.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all requests in a second, if every step gives each of them one."""
        return self.num_requests / self.seconds


def decode_step(
    plan: ParallelPlan, weights: WeightFormat, gpu: GPU, batch: int, context: int, new_tokens: int = 1
) -> Step:
    """A step that gives each of `batch` requests, at `context` tokens, `new_tokens` more and the logits of each.

    Args:
        plan: Where the tensors lie.
        weights: How they are stored.
        gpu: What the devices are.
        batch: Requests of all devices together.
        context: Tokens of every request, the new ones included.
        new_tokens: 1, or with speculation the drafted tokens and one.
    """
    tensors = checkpoint_tensors(plan.model)
    return _step(plan, weights, gpu, plan.model.layers, tensors, batch, context, new_tokens, new_tokens)


def prefill_step(plan: ParallelPlan, weights: WeightFormat, gpu: GPU, batch: int, length: int) -> Step:
    """A step that reads the prompts, `length` tokens each, of `batch` requests and gives the logits of their last."""
    return _step(plan, weights, gpu, plan.model.layers, checkpoint_tensors(plan.model), batch, length, length, 1)


def draft_step(plan: ParallelPlan, weights: WeightFormat, gpu: GPU, batch: int, context: int) -> Step:
    """A step of one MTP layer, its projection and its own head, that drafts one token for each of `batch` requests."""
    layers = plan.model.mtp_layers[:1]
    tensors = drafting_tensors(plan.model, 1, draft_vocabulary_size(plan.model))
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = checkpoint_tensors(plan.model)[embedding]
    return _step(plan, weights, gpu, layers, tensors, batch, context, 1, 1)


def _step(
    plan: ParallelPlan,
    weights: WeightFormat,
    gpu: GPU,
    layers: tuple[LayerConfig, ...],
    tensors: Mapping[str, TensorSpec],
    batch: int,
    context: int,
    new_tokens: int,
    new_logits: int,
) -> Step:
    requests = requests_per_device(plan, batch)
    tokens, all_tokens, all_logits = requests * new_tokens, batch * new_tokens, batch * new_logits
    moes = {layer.index: layer.mlp for layer in layers if isinstance(layer.mlp, MoEConfig)}
    num_bytes = dict.fromkeys(Part, 0.0)
    flops = dict.fromkeys(Part, 0.0)
    flops_seconds = dict.fromkeys(Part, 0.0)
    for name, spec in tensors.items():
        part = _part(name, spec.role)
        shape = plan.placements[name].shard_shape(spec.shape)
        stored = weights.num_bytes(shape, spec.role)
        multiplied = 0.0 if spec.role in _NOT_MULTIPLIED else 2.0 * math.prod(shape)
        if spec.role in EXPERT_ROLES:
            moe = moes[int(name.split(".")[2])]
            local = len(plan.experts(moe, 0))
            hit = experts_hit(moe, all_tokens)
            num_bytes[part] += stored / local * busiest_device_experts(moe.num_experts, moe.num_experts // local, hit)
            multiplied *= moe.top_k * all_tokens / moe.num_experts
        elif spec.role is TensorRole.EMBEDDING:
            num_bytes[part] += stored / shape[0] * tokens
        else:
            num_bytes[part] += stored
            # Even where devices have their own tokens, the head's parts see all.
            multiplied *= all_logits if spec.role is TensorRole.LM_HEAD else tokens
        flops[part] += multiplied
        flops_seconds[part] += multiplied / _rate(spec.role, weights, gpu)
    _add_attention(plan, weights, gpu, layers, Forward(requests, new_tokens, context), num_bytes, flops, flops_seconds)
    num_bytes[Part.LINKS] = head_sent_bytes(plan, all_tokens, all_logits, weights.itemsize) + sum(
        layer_sent_bytes(plan, layer, all_tokens, weights.itemsize) for layer in layers
    )
    rates = dict.fromkeys(Part, gpu.bandwidth) | {Part.LINKS: gpu.link_bandwidth(plan.num_devices) or math.inf}
    return Step(
        batch,
        {
            part: Work(num_bytes[part], flops[part], max(num_bytes[part] / rates[part], flops_seconds[part]))
            for part in Part
        },
    )


def _add_attention(
    plan: ParallelPlan,
    weights: WeightFormat,
    gpu: GPU,
    layers: tuple[LayerConfig, ...],
    forward: Forward,
    num_bytes: dict[Part, float],
    flops: dict[Part, float],
    flops_seconds: dict[Part, float],
) -> None:
    """Adds reading the caches and multiplying with them."""
    for layer in layers:
        share = plan.num_key_value_heads_per_device(layer) / layer.attention.num_key_value_heads
        dtype = CheckpointDtype.FLOAT32 if weights.itemsize == 4 else CheckpointDtype.BFLOAT16
        num_bytes[Part.CACHE] += share * cache_bytes(replace(plan.model, layers=(layer,)), dtype, forward)
        multiplied = share * forward.batch_size * attention_flops(layer.attention, forward)
        flops[Part.CACHE] += multiplied
        flops_seconds[Part.CACHE] += multiplied / gpu.bf16_flops


_NOT_MULTIPLIED = frozenset({TensorRole.EMBEDDING, TensorRole.HIDDEN_NORM, TensorRole.QK_NORM, TensorRole.ROUTER_BIAS})

_PARTS: Mapping[TensorRole, Part] = {
    TensorRole.QUERY: Part.ATTENTION,
    TensorRole.KEY: Part.ATTENTION,
    TensorRole.VALUE: Part.ATTENTION,
    TensorRole.ATTENTION_GATE: Part.ATTENTION,
    TensorRole.ATTENTION_OUTPUT: Part.ATTENTION,
    TensorRole.MLP_GATE: Part.DENSE,
    TensorRole.MLP_UP: Part.DENSE,
    TensorRole.MLP_DOWN: Part.DENSE,
    TensorRole.ROUTER: Part.ROUTER,
    TensorRole.ROUTER_BIAS: Part.ROUTER,
    TensorRole.EXPERT_GATE: Part.EXPERTS,
    TensorRole.EXPERT_UP: Part.EXPERTS,
    TensorRole.EXPERT_DOWN: Part.EXPERTS,
    TensorRole.EMBEDDING: Part.HEAD,
    TensorRole.LM_HEAD: Part.HEAD,
    TensorRole.HIDDEN_NORM: Part.OTHER,
    TensorRole.QK_NORM: Part.OTHER,
    TensorRole.MTP_PROJECTION: Part.OTHER,
}


def _part(name: str, role: TensorRole) -> Part:
    part = _PARTS[role]
    return Part.SHARED if part is Part.DENSE and ".share_expert." in name else part


def _rate(role: TensorRole, weights: WeightFormat, gpu: GPU) -> float:
    return gpu.fp8_flops if weights.fp8_products and role in weights.blocks.roles else gpu.bf16_flops
