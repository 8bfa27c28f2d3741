"""The dense gated MLP, also the shared expert's form."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.layer import Module

from ..layer_config import DenseMLPConfig
from .linear import Linear


def swiglu(gate: TensorValue, up: TensorValue, limit: float | None) -> TensorValue:
    """`silu(gate) * up`; with a limit `L`, `min(silu(gate), L) * clamp(up, -L, L)`: the gate only from above, after silu."""
    gate = ops.silu(gate)
    if limit is None:
        return gate * up
    bound = ops.constant(limit, gate.dtype, device=gate.device)
    return ops.min(gate, bound) * ops.max(ops.min(up, bound), -bound)


class MLP(Module):
    """`down_proj( swiglu(gate_proj(x), up_proj(x)) )`.

    Args:
        config: Width and clamp limit.
        hidden_size: Size of the last axis of `x` and of the result.
        dtype: Storage type of the weights.
        device: Where the layer runs.
    """

    def __init__(self, config: DenseMLPConfig, hidden_size: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.swiglu_limit = config.swiglu_limit
        self.gate_proj = Linear(hidden_size, config.intermediate_size, dtype, device)
        self.up_proj = Linear(hidden_size, config.intermediate_size, dtype, device)
        self.down_proj = Linear(config.intermediate_size, hidden_size, dtype, device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """`[tokens, hidden_size]` to `[tokens, hidden_size]`."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.swiglu_limit))
