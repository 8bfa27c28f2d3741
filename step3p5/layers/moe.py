"""Routed experts: sigmoid router with a selection bias, experts over tokens grouped by expert, float32 combine."""

from __future__ import annotations

from typing import NamedTuple

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, Weight, ops
from max.nn.layer import Module

from .. import kernels
from ..checkpoint_tensors import TensorRole
from ..layer_config import MoEConfig
from ..precision import weight_dtype
from .linear import Linear
from .mlp import MLP


class ExpertWeights(Module):
    """One projection of all experts, stacked as in the checkpoint: `[num_experts, out_features, in_features]`."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__()
        self.weight = Weight("weight", dtype, [num_experts, out_features, in_features], device)

    def __call__(self) -> TensorValue:
        return self.weight


class RoutedTokens(NamedTuple):
    """Tokens and the experts that the router chose for them."""

    x: TensorValue
    """Hidden states `[tokens, hidden_size]`."""

    ids: TensorValue
    """Experts `[tokens, top_k]`, int32."""

    weights: TensorValue
    """Their weights `[tokens, top_k]`, float32; zero for an expert that is not there."""

    def only(self, experts: range) -> RoutedTokens:
        """The same, as a device that has no more than these experts needs it."""
        first, end = (
            ops.constant(expert, DType.int32, device=self.ids.device) for expert in (experts.start, experts.stop)
        )
        are_here = ops.logical_and(self.ids >= first, self.ids < end)
        nothing = ops.constant(0.0, DType.float32, device=self.ids.device)
        return self._replace(weights=ops.where(are_here, self.weights, nothing))


class MoE(Module):
    """`y = Σ_e w_e · expert_e(x)` over each token's `top_k` experts, without the shared expert.

    Args:
        config: Experts, widths and router constants.
        hidden_size: Size of the last axis of `x` and of the result.
        dtype: Storage type of the experts' and the gate's weights.
        device: Where the layer runs.
        experts: The experts that lie on the device, all by default; the sum is over these alone.
    """

    def __init__(
        self, config: MoEConfig, hidden_size: int, dtype: DType, device: DeviceRef, experts: range | None = None
    ) -> None:
        super().__init__()
        width = config.intermediate_size
        self.config = config
        self.experts = range(config.num_experts) if experts is None else experts
        self.gate = Linear(hidden_size, config.num_experts, weight_dtype(TensorRole.ROUTER, dtype, device), device)
        if config.router_bias:
            self.router_bias = Weight("router_bias", DType.float32, [config.num_experts], device)
        self.gate_proj = ExpertWeights(len(self.experts), hidden_size, width, dtype, device)
        self.up_proj = ExpertWeights(len(self.experts), hidden_size, width, dtype, device)
        self.down_proj = ExpertWeights(len(self.experts), width, hidden_size, dtype, device)

    def __call__(self, x: TensorValue, limit: TensorValue) -> TensorValue:
        """`x [tokens, hidden_size]` and the clamp limit, a float32 scalar on the host, to `[tokens, hidden_size]`.

        Each token's experts are accumulated in float32.
        """
        chosen = self._assign(x)
        tokens = RoutedTokens(x, chosen.ids, chosen.weights)
        if len(self.experts) < self.config.num_experts:
            tokens = tokens.only(self.experts)
        return self._sum(tokens, chosen.rows, chosen.offsets, limit)

    def route(self, x: TensorValue) -> RoutedTokens:
        """The tokens `x [tokens, hidden_size]` with their experts, among all."""
        config = self.config
        ids, weights = kernels.route(
            self._router_logits(x),
            self.bias(),
            top_k=config.top_k,
            normalize=config.normalize_weights,
            scale=config.router_scaling_factor,
        )
        return RoutedTokens(x, ids, weights)

    def of_routed(self, tokens: RoutedTokens, limit: TensorValue) -> TensorValue:
        """As a call, for tokens that a router has seen, with weights only for experts that are here."""
        rows, offsets = kernels.group(tokens.ids, num_experts=self.config.num_experts)
        return self._sum(tokens, rows, offsets, limit)

    def _sum(self, tokens: RoutedTokens, rows: TensorValue, offsets: TensorValue, limit: TensorValue) -> TensorValue:
        # The kernels go through the experts between the offsets; a weight of zero says that an expert is not there.
        offsets = offsets[self.experts.start : self.experts.stop + 1]
        hidden = kernels.gate_up(tokens.x, self.gate_proj(), self.up_proj(), rows, offsets, limit)
        return kernels.down(hidden, self.down_proj(), rows, offsets, tokens.weights)

    def with_shared(self, x: TensorValue, shared: MLP, limit: TensorValue, shared_limit: TensorValue) -> TensorValue:
        """`self(x, limit) + shared(x, shared_limit)`, accumulated in float32; for a GPU that has all experts."""
        chosen = self._assign(x)
        hidden, shared_hidden = kernels.gate_up_shared(
            x,
            self.gate_proj(),
            self.up_proj(),
            shared.gate_proj.weight,
            shared.up_proj.weight,
            chosen.rows,
            chosen.offsets,
            limit,
            shared_limit,
        )
        return kernels.down_shared(
            hidden,
            self.down_proj(),
            shared_hidden,
            shared.down_proj.weight,
            chosen.rows,
            chosen.offsets,
            chosen.weights,
        )

    def _assign(self, x: TensorValue) -> kernels.Assignments:
        """Every token's experts, their weights and the tokens' order by expert."""
        config = self.config
        return kernels.assign(
            self._router_logits(x),
            self.bias(),
            top_k=config.top_k,
            normalize=config.normalize_weights,
            scale=config.router_scaling_factor,
        )

    def bias(self) -> TensorValue:
        """The router's selection bias, `[num_experts]` float32; zeros where the checkpoint has none."""
        if self.config.router_bias:
            return self.router_bias
        zero = ops.constant(0.0, DType.float32, device=self.gate.weight.device)
        return ops.broadcast_to(zero, (self.config.num_experts,))

    def _router_logits(self, x: TensorValue) -> TensorValue:
        if self.config.fp32_gate:
            return kernels.linear(x, self.gate.weight, dtype=DType.float32)
        return ops.cast(self.gate(x), DType.float32)
