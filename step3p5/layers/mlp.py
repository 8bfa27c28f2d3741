"""The dense gated MLP, also the shared expert's form."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.layer import Module

from .linear import Linear


def swiglu(gate: TensorValue, up: TensorValue, limit: TensorValue) -> TensorValue:
    """`min(silu(gate), L) * clamp(up, -L, L)` with the scalar limit `L`: the gate only from above, after silu.

    An infinite limit clamps nothing, so that layers with and without one share a subgraph.
    """
    limit = limit.cast(gate.dtype)
    return ops.min(ops.silu(gate), limit) * ops.max(ops.min(up, limit), -limit)


class MLP(Module):
    """`down_proj( swiglu(gate_proj(x), up_proj(x)) )`.

    Args:
        intermediate_size: Width between the projections.
        hidden_size: Size of the last axis of `x` and of the result.
        dtype: Storage type of the weights.
        device: Where the layer runs.
    """

    def __init__(self, intermediate_size: int, hidden_size: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, dtype, device)
        self.up_proj = Linear(hidden_size, intermediate_size, dtype, device)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype, device)

    def __call__(self, x: TensorValue, limit: TensorValue) -> TensorValue:
        """`x [tokens, hidden_size]` and the clamp limit, a scalar on the same device, to `[tokens, hidden_size]`."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), limit))
