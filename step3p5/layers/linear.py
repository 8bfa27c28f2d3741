"""`y = x Wᵀ`, weights as the checkpoint stores them: `[out_features, in_features]`."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, Weight
from max.nn.layer import Module

from ..kernels import linear


class Linear(Module):
    """A bias-free linear layer.

    Args:
        in_features: Size of the last axis of `x`.
        out_features: Size of the last axis of the result.
        dtype: Storage type of the weight.
        device: Where the layer runs.
    """

    def __init__(self, in_features: int, out_features: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.weight = Weight("weight", dtype, [out_features, in_features], device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """`[tokens, in_features]` to `[tokens, out_features]`."""
        return linear(x, self.weight)
