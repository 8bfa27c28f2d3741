"""What the passes of a GPU need besides: MAX's settings for it, and the rate at which its memory copies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from max.driver import Accelerator

COPY_BYTES = 1 << 30
"""Far more than the second-level cache."""


def max_settings(devices: str, precompiled_mefs: str | None) -> dict[str, object]:
    """`AutoModel`'s arguments: on a GPU the scheduler and the captured graphs that `max serve` uses by default."""
    if devices == "cpu":
        return {}
    artifacts = {"precompiled_mefs": precompiled_mefs} if precompiled_mefs else {}
    return {"device_graph_capture": True, "enable_overlap_scheduler": True, **artifacts}


def as_passes(devices: str, step_seconds: Sequence[float]) -> list[float]:
    """The seconds of each pass, from those of `GenerateIterator.step()`.

    On a GPU a step's tokens are returned by the next one: the first step only begins the prompt's pass, the second
    begins the first decode and waits for the prompt, and so on; the last begins what nobody waits for.
    """
    if devices == "cpu":
        return list(step_seconds)
    return [sum(step_seconds[:2]), *step_seconds[2:]]


def settle(devices: str) -> None:
    """Waits for what earlier passes began and nobody waited for."""
    if devices != "cpu":
        Accelerator().synchronize()


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
