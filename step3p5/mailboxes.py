"""Every GPU's mailbox: memory that all GPUs of a node read, through which tokens reach other GPUs' experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from max.driver import Buffer, Device, enable_all_peer_access
from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType
from max.pipelines.kv_cache.memory_planner import PagedMemoryPlanner
from transformers import AutoConfig
from typing_extensions import override

from .mailbox_size import mailbox_bytes, most_tokens
from .parallel_plan import ParallelPlan
from .pretrained_config import as_step3p5_config

ASSUMED_BATCH_SIZE = 512
"""Where `--max-batch-size` is not given: MAX takes what the memory allows, which is planned before."""


def mailbox_types(devices: Sequence[DeviceRef]) -> list[BufferType | TensorType]:
    """The graph's inputs: every device's mailbox, and their addresses on the host."""
    boxes = [BufferType(DType.uint8, ["mailbox_bytes"], device) for device in devices]
    return [*boxes, TensorType(DType.int64, [len(devices)], DeviceRef.CPU())]


class Mailboxes:
    """The mailboxes of a process, empty.

    Args:
        plan: How many there are, and for what tokens.
        devices: The GPUs.
        num_tokens: The most tokens that one GPU has in a step.
        itemsize: Bytes of an element of the hidden states.

    Raises:
        RuntimeError: If the GPUs cannot read each other's memory.
    """

    def __init__(self, plan: ParallelPlan, devices: Sequence[Device], num_tokens: int, itemsize: int) -> None:
        if not devices[0].is_host:
            try:
                enable_all_peer_access()
            except RuntimeError as error:
                raise RuntimeError(
                    f"--devices: found {len(devices)} GPUs that cannot read each other's memory, which "
                    "--data-parallel-degree needs. Choose GPUs that are linked, or leave it out."
                ) from error
        size = mailbox_bytes(plan.model, plan.num_devices, num_tokens, itemsize)
        self._buffers = [Buffer.zeros((size,), DType.uint8, device) for device in devices]
        self._addresses = Buffer.from_numpy(np.array([box._data_ptr() for box in self._buffers], dtype=np.int64))
        for device in devices:
            device.synchronize()  # no GPU may see another's flags before they are zero

    def model_inputs(self) -> list[Buffer]:
        """The values of `mailbox_types`; MAX's batch processors ask for them by this name."""
        return [*self._buffers, self._addresses]


class MemoryPlanner(PagedMemoryPlanner):
    """What MAX leaves of the devices' memory for the KV cache."""

    @override
    def estimate_activation_memory(self, pipeline_config: Any, huggingface_config: AutoConfig) -> int:
        """Bytes of all devices' mailboxes."""
        degree = pipeline_config.model.data_parallel_degree
        if degree == 1:
            return 0
        model = as_step3p5_config(huggingface_config).model_config
        runtime, limit = pipeline_config.runtime, pipeline_config.model.max_length or model.max_position_embeddings
        whole_prompt = 0 if runtime.enable_chunked_prefill else limit
        batch_size = runtime.max_batch_size or ASSUMED_BATCH_SIZE
        tokens = most_tokens(runtime.max_batch_input_tokens, batch_size, whole_prompt)
        return int(degree * mailbox_bytes(model, degree, tokens, DType.bfloat16.size_in_bytes))
