"""The dense gated MLP, also the shared expert's form."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue
from max.nn.layer import Module

from .. import kernels
from .linear import Linear


class MLP(Module):
    """`down_proj( min(silu(gate_proj(x)), L) * clamp(up_proj(x), -L, L) )`: the gate only from above, after silu.

    An infinite limit `L` clamps nothing, so that layers with and without one share a subgraph.

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
        """`x [tokens, hidden_size]` and the clamp limit, a float32 scalar on the host, to `[tokens, hidden_size]`."""
        return self.down_proj(kernels.swiglu(x, self.gate_proj.weight, self.up_proj.weight, limit))
