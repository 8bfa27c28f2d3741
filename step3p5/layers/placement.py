"""Gives the devices' modules their parts of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from max.graph import DeviceRef, ShardingStrategy, Weight
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
    for path, made in whole.raw_state_dict().items():
        *modules, name = path.split(".")
        owners = [_owner(part, modules) for part in parts]
        # The host would hold some weights in float32 that a GPU holds as it runs.
        weight = Weight(made.name, getattr(owners[0], name).dtype, made.shape, made.device)
        setattr(_owner(whole, modules), name, weight)
        placement = placements[path]
        weight.sharding_strategy = (
            ShardingStrategy.replicate(len(devices))
            if placement.axis is None
            else ShardingStrategy.axiswise(placement.axis, len(devices))
        )
        for owner, shard in zip(owners, weight.shard(devices), strict=True):
            setattr(owner, name, shard)


def _owner(module: Module, path: Sequence[str]) -> Any:
    """The module at the end of a path of attributes."""
    for name in path:
        module = getattr(module, name)
    return module
