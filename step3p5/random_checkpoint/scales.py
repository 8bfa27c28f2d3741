"""How large each kind of random tensor is: one normal distribution per role.

Chosen so that every branch of the forward pass does work: routing and softmax are far from uniform, clamps bite, gates
neither close nor saturate, the residual stream grows slowly, and logits spread like a trained model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from step3p5.checkpoint_tensors import TensorRole, TensorSpec


@dataclass(frozen=True)
class Scale:
    """A normal distribution; with `per_fan_in`, its standard deviation is `std` over the square root of the fan-in."""

    std: float
    mean: float = 0.0
    per_fan_in: bool = False


@dataclass(frozen=True)
class NormalDistribution:
    """Mean and standard deviation of one tensor's elements."""

    mean: float
    std: float


def _projection(gain: float) -> Scale:
    """A projection that turns unit-variance inputs into outputs of standard deviation `gain`."""
    return Scale(gain, per_fan_in=True)


SCALES: Mapping[TensorRole, Scale] = {
    # The residual stream starts at unit RMS.
    TensorRole.EMBEDDING: Scale(1.0),
    # Logits of standard deviation 3.
    TensorRole.LM_HEAD: _projection(3.0),
    # Stored weights are zero-centred: 1 + w is close to, but not, one.
    TensorRole.HIDDEN_NORM: Scale(0.1),
    # 1 + w averages 1.4 on queries and on keys, so that attention scores have a standard deviation of about 2.
    TensorRole.QK_NORM: Scale(0.2, mean=0.4),
    TensorRole.QUERY: _projection(1.0),
    TensorRole.KEY: _projection(1.0),
    TensorRole.VALUE: _projection(1.0),
    # sigmoid(2 z) runs from 0.02 to 0.98 within two standard deviations.
    TensorRole.ATTENTION_GATE: _projection(2.0),
    TensorRole.ATTENTION_OUTPUT: _projection(1.0),
    # Pre-activations of standard deviation 6: about 1 in 200 passes the shared and dense limit of 16.
    TensorRole.MLP_GATE: _projection(6.0),
    TensorRole.MLP_UP: _projection(6.0),
    # silu(gate) * up then has an RMS near 25; the branch adds about 0.4 to the residual stream.
    TensorRole.MLP_DOWN: _projection(0.016),
    # Pre-activations of standard deviation 3: about 1 in 100 passes the routed limit of 7.
    TensorRole.EXPERT_GATE: _projection(3.0),
    TensorRole.EXPERT_UP: _projection(3.0),
    # silu(gate) * up then has an RMS near 6; top_k experts, weighted to a sum of 3, add about 0.4 together.
    TensorRole.EXPERT_DOWN: _projection(0.05),
    # Router logits of standard deviation 1.5: sigmoid scores from 0.05 to 0.95.
    TensorRole.ROUTER: _projection(1.5),
    # Decides between experts that are about as good. The chosen scores lie so near to one that a bias of 0.05 would
    # send most tokens to the same third of 288 experts; a trained model's bias spreads them evenly.
    TensorRole.ROUTER_BIAS: Scale(0.01),
    TensorRole.MTP_PROJECTION: _projection(1.0),
}
"""The scale of every role. A projection's gain is the standard deviation of its output on normed input."""


def distribution(spec: TensorSpec) -> NormalDistribution:
    """The distribution of the elements of `spec`; the fan-in of a projection is its last dimension."""
    scale = SCALES[spec.role]
    fan_in = spec.shape[-1] if scale.per_fan_in else 1
    return NormalDistribution(scale.mean, scale.std / math.sqrt(fan_in))
