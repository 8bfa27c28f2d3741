"""RMSNorm, zero-centred where the checkpoint stores `w` for a scale of `1 + w`."""

from __future__ import annotations

from max.dtype import DType
from max.nn.norm import RMSNorm as _RMSNorm

from ..layer_config import ModelConfig


class RMSNorm(_RMSNorm):
    """`x * rsqrt(mean(x²) + eps) * (offset + weight)` over the last axis, computed in float32 and cast back.

    Args:
        dim: Size of the last axis.
        model: Supplies `eps` and whether the weights are zero-centred (`offset` 1) or plain (`offset` 0).
        dtype: Storage type of the weight.
    """

    def __init__(self, dim: int, model: ModelConfig, dtype: DType) -> None:
        super().__init__(
            dim,
            dtype,
            eps=model.rms_norm_eps,
            weight_offset=1.0 if model.zero_centered_norm else 0.0,
            multiply_before_cast=True,
        )
