"""How many experts a device has to read, if routing is uniform and the experts are shared by number."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt


@cache
def busiest_device_experts(num_experts: int, num_devices: int, hit: float) -> float:
    """Expected number of experts that are hit on the device that has most of them.

    `hit` of `num_experts` experts are hit, every choice of so many being as likely as any other; each device has an
    equal share of them. The devices wait for each other after every layer, so that this one sets the pace. A fractional
    `hit` lies between its neighbours.

    The distribution is the multivariate hypergeometric one, computed as `num_devices` independent binomial counts on
    condition that they sum to `hit`.
    """
    if num_devices == 1 or hit in (0, num_experts):
        return hit / num_devices
    low = int(hit)
    if low != hit:
        below, above = (busiest_device_experts(num_experts, num_devices, n) for n in (low, low + 1))
        return below + (hit - low) * (above - below)
    each = num_experts // num_devices
    counts = _binomial(each, hit / num_experts)
    all_counts = _sum_of(counts, num_devices)[int(hit)]
    at_most = (_sum_of(counts[: most + 1], num_devices) for most in range(each))
    return float(sum(1.0 - (sums[int(hit)] if hit < len(sums) else 0.0) / all_counts for sums in at_most))


def _binomial(trials: int, share: float) -> npt.NDArray[np.float64]:
    """Probabilities of 0 to `trials` successes."""
    counts = np.ones(1)
    for _ in range(trials):
        counts = np.convolve(counts, [1.0 - share, share])
    return counts


def _sum_of(counts: npt.NDArray[np.float64], times: int) -> npt.NDArray[np.float64]:
    """Distribution of the sum of `times` independent counts."""
    total = np.ones(1)
    for _ in range(times):
        total = np.convolve(total, counts)
    return total
