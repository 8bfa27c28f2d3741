"""What the passes of a GPU need besides: MAX's settings, the memory that is in use, the rate at which it copies."""

from __future__ import annotations

import argparse
import importlib
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from max.driver import Accelerator
from max.pipelines.lib.auto_model import AutoModel

from step3p5.parallel_plan import ParallelPlan
from step3p5.plan import memory
from step3p5.plan.weight_formats import FORMATS

COPY_BYTES = 1 << 30
"""Far more than the second-level cache."""


def max_settings(
    devices: str, precompiled_mefs: str | None, capture: bool = True, overlap: bool = True
) -> dict[str, object]:
    """`AutoModel`'s arguments: on a GPU the scheduler and the captured graphs that `max serve` uses by default."""
    if devices == "cpu":
        return {}
    artifacts = {"precompiled_mefs": precompiled_mefs} if precompiled_mefs else {}
    in_step = {} if overlap else {"disable_overlap": True}
    return {"device_graph_capture": capture, "enable_overlap_scheduler": True, **in_step, **artifacts}


def as_passes(step_seconds: Sequence[float], decode_steps: int) -> list[float]:
    """The seconds of the prompt's pass and of each of `decode_steps`, from those of `GenerateIterator.step()`.

    A prompt that is longer than the scheduler's budget is read in several steps. And on a GPU a step's tokens are
    returned by the next one: the first step only begins the prompt's pass, the second begins the first decode and waits
    for the prompt, and so on; the last begins what nobody waits for.
    """
    prompt = len(step_seconds) - decode_steps
    return [sum(step_seconds[:prompt]), *step_seconds[prompt:]]


def device_numbers(devices: str) -> list[int]:
    """The GPUs that MAX's `--devices` names; none for a CPU."""
    if devices == "cpu":
        return []
    return [int(number) for number in devices.removeprefix("gpu").removeprefix(":").split(",") if number] or [0]


def settle(devices: str) -> None:
    """Waits for what earlier passes began and nobody waited for."""
    for number in device_numbers(devices):
        Accelerator(number).synchronize()


@contextmanager
def equal_replicas() -> Iterator[None]:
    """Lets `AutoModel` replay captured graphs on devices with requests of their own.

    It refuses, because every replica must then have equally many requests, and it does not see to it. The caller does:
    batches are multiples of the replicas, and their requests end in the same step.
    """
    with mock.patch.object(importlib.import_module("max.pipelines.lib.generate"), "_check_graph_capture"):
        yield


@contextmanager
def load_in_parallel(
    options: argparse.Namespace, requests: int, longest: int, capture: bool = True, overlap: bool = True
) -> Iterator[AutoModel]:
    """A model in the parallel mode that a command line names.

    Args:
        options: The command line's, MODEL, `--devices`, `--precompiled-mefs`, `--ep-size` and `--data-parallel-degree`.
        requests: Most requests of a step, on all replicas.
        longest: Most tokens of a request.
        capture: See `max_settings`.
        overlap: See `max_settings`.
    """
    with (
        equal_replicas(),
        AutoModel(
            options.model,
            devices=options.devices,
            custom_architectures=["pipelines_registry"],
            max_batch_size=requests // options.data_parallel_degree,
            max_length=longest,
            ep_size=options.ep_size,
            data_parallel_degree=options.data_parallel_degree,
            **max_settings(options.devices, options.precompiled_mefs, capture, overlap),
        ) as model,
    ):
        yield model


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes in use on the GPU, whoever has them, beside what the plan counts.

    `caches` is the part that MAX has taken for the KV caches, as much as is left over; `planned` is what
    `step3p5.plan` counts for everything else.
    """

    before_loading: int
    after_loading: int
    after_rounds: int
    caches: int
    planned: float

    @property
    def without_caches(self) -> int:
        """What this process has on the GPU besides the caches."""
        return self.after_rounds - self.before_loading - self.caches

    def line(self) -> str:
        """The same for people."""
        return (
            f"on the GPU {self.without_caches / 1e9:.2f} GB after the rounds, {self.planned / 1e9:.2f} planned; and "
            f"{self.caches / 1e9:.2f} GB of caches"
        )


def bytes_in_use(devices: str) -> int:
    """Bytes of the first GPU that are not free; 0 on a CPU."""
    if devices == "cpu":
        return 0
    stats = Accelerator().stats
    return int(stats["total_memory"]) - int(stats["free_memory"])


def cache_bytes(pipeline: Any) -> int:
    """Bytes of the KV caches that a loaded pipeline has taken; caches of several kinds share one pool of pages."""
    buffers = pipeline.kv_manager.get_device_buffer(0).all_buffers
    pools: dict[int, int] = {}
    for buffer in buffers:
        num_bytes = buffer.num_elements * buffer.dtype.size_in_bytes
        pools[buffer._data_ptr()] = max(pools.get(buffer._data_ptr(), 0), num_bytes)
    return sum(pools.values())


def planned_bytes(plan: ParallelPlan, weights: str, requests: int, context: int) -> float:
    """What the plan counts on each GPU without the caches; `weights` is their type."""
    formats = {"bfloat16": "bf16", "float32": "float32"}
    return memory.device_memory(plan, FORMATS[formats[weights]], requests, context).fixed


def device_copy_rate(rounds: int = 20) -> float | None:
    """Bytes read and written a second by a copy in the GPU's memory, the median; `None` without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rates = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        rates.append(2 * COPY_BYTES / (start.elapsed_time(end) * 1e-3))
    return statistics.median(rates)
