"""Gives the devices' modules their parts of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from max.graph import DeviceRef, ShardingStrategy
from max.nn.layer import Module

from ..parallel_plan import Placement


def place_weights(
    whole: Module, parts: Sequence[Module], placements: Mapping[str, Placement], devices: Sequence[DeviceRef]
) -> None:
    """Makes every weight of the modules `parts`, one a device, a part of the same weight of `whole`.

    `whole` keeps the checkpoint's names and shapes and loads its tensors on the host; the parts are cut when the model
    is loaded, on the way to their devices.

    Args:
        whole: The module as the checkpoint has it.
        parts: The same module as every device computes it, not registered anywhere.
        placements: Where the weights lie, by their path within `whole`.
        devices: The parts' devices.
    """
    for path, weight in whole.raw_state_dict().items():
        placement = placements[path]
        weight.sharding_strategy = (
            ShardingStrategy.replicate(len(devices))
            if placement.axis is None
            else ShardingStrategy.axiswise(placement.axis, len(devices))
        )
        *modules, name = path.split(".")
        for part, shard in zip(parts, weight.shard(devices), strict=True):
            owner = part
            for module in modules:
                owner = getattr(owner, module)
            setattr(owner, name, shard)
