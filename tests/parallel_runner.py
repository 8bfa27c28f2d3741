"""The graph for several devices: traced for any, and run on the CPU, every device of its plan being the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from max import tree
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef
from max.nn.kv_cache import MHAKVCacheParams, MultiKVCacheParams
from max.nn.kv_cache.cache_params import BatchCharacteristics, KVCacheAssignments
from max.nn.transformer import ReturnHiddenStates, ReturnLogits

from step3p5.parallel_plan import ParallelPlan
from step3p5.parallel_step3p5 import ParallelStep3p5

Array = npt.NDArray[Any]

PAGE_SIZE = 128
PAGES = 16
"""Of every cache."""

LOOKAHEAD = 16
"""Columns that the attention kernel may read behind a row of the page table."""


def num_replicas(plan: ParallelPlan) -> int:
    """Batches that a step has."""
    return plan.num_devices if plan.own_requests else 1


def cache_params(plan: ParallelPlan, devices: list[DeviceRef], dtype: DType) -> MultiKVCacheParams:
    """The caches of the devices, by kind of attention, for the MTP layers as well."""
    caches, layers = {}, (*plan.model.layers, *plan.model.mtp_layers)
    for layer in layers:
        kind = layer.attention.kind
        caches[kind.value] = MHAKVCacheParams(
            dtype=dtype,
            n_kv_heads=layer.attention.num_key_value_heads,
            head_dim=layer.attention.head_dim,
            num_layers=sum(other.attention.kind is kind for other in layers),
            devices=devices,
            page_size=PAGE_SIZE,
            window_size=layer.attention.sliding_window,
            data_parallel_degree=num_replicas(plan),
        )
    return MultiKVCacheParams.from_params(caches)


def graph_config(
    plan: ParallelPlan, devices: list[DeviceRef], dtype: DType, kv_params: MultiKVCacheParams
) -> SimpleNamespace:
    """What a graph's module reads of a configuration."""
    return SimpleNamespace(
        model=plan.model,
        plan=plan,
        dtype=dtype,
        devices=devices,
        kv_params=kv_params,
        use_subgraphs=True,
        return_logits=ReturnLogits.LAST_TOKEN,
        return_hidden_states=ReturnHiddenStates.NONE,
    )


class ParallelRunner:
    """The graph of a plan, compiled once; a call reads prompts from nothing and gives their last tokens' logits."""

    def __init__(self, plan: ParallelPlan, tensors: Mapping[str, Array]) -> None:
        self.plan = plan
        devices = [DeviceRef.CPU()] * plan.num_devices
        self.kv_params = cache_params(plan, devices, DType.float32)
        module = ParallelStep3p5(cast(Any, graph_config(plan, devices, DType.float32, self.kv_params)))
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        module.load_state_dict(weights, strict=True)
        graph = module.trace(*tree.leaves(module.input_tree()))
        self.model = InferenceSession(devices=[CPU()]).load(graph, weights_registry=module.state_dict())

    def __call__(self, replicas: Sequence[Sequence[Array]]) -> Array:
        """Logits `[requests, vocab_size]` of the requests of every replica, in order."""
        assert len(replicas) == num_replicas(self.plan)
        requests = [request for replica in replicas for request in replica]
        offsets = np.cumsum([0, *map(len, requests)], dtype=np.uint32)
        splits = np.cumsum([0, *map(len, replicas)], dtype=np.int64)
        caches = self.kv_params.build_runtime_inputs(
            [self._assignment(replica) for replica in replicas], self.kv_params.allocate_buffers(PAGES)
        )
        inputs = [np.concatenate(requests).astype(np.int64), offsets, np.ones(1, np.int64)]
        if self.plan.own_requests:
            inputs += [offsets, splits]
        outputs = self.model.execute(*map(Buffer.from_numpy, inputs), *tree.leaves(caches))
        return cast(Buffer, outputs[0]).to_numpy()

    def _assignment(self, requests: Sequence[Array]) -> KVCacheAssignments:
        """Pages one after the other for every request, none of them used before."""
        longest = max(map(len, requests))
        pages = np.zeros((len(requests), PAGES + LOOKAHEAD), np.uint32)
        free = iter(range(PAGES))
        for row, request in zip(pages, requests, strict=True):
            for page in range(-(-len(request) // PAGE_SIZE)):
                row[page] = next(free)
        devices = range(self.plan.num_devices // num_replicas(self.plan))
        lengths = Buffer.from_numpy(np.zeros(len(requests), np.uint32))
        table = {leaf: Buffer.from_numpy(pages) for leaf in self.kv_params.leaves()}
        return KVCacheAssignments(
            cache_lengths_by_device=[lengths for _ in devices],
            staged_by_device=[table for _ in devices],
            max_prompt_length=Buffer.from_numpy(np.array([longest], np.uint32)),
            max_cache_length=Buffer.from_numpy(np.array([longest], np.uint32)),
            batch_characteristics=BatchCharacteristics(len(requests), longest, longest),
        )
