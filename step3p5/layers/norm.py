"""RMSNorm, zero-centred where the checkpoint stores `w` for a scale of `1 + w`."""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn.norm import RMSNorm as _RMSNorm
from typing_extensions import override

from .. import kernels
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

    @override
    def __call__(self, x: TensorValue) -> TensorValue:
        """Norms `x [tokens, dim]`."""
        if x.device.is_cpu():
            return super().__call__(x)
        return kernels.norm(x, self.weight.to(x.device), eps=self.eps, offset=self.weight_offset)

    def of_sum(self, x: TensorValue, *addend: TensorValue) -> tuple[TensorValue, TensorValue]:
        """`x`, with what is yet to be added to it, in the type of `x`, and its norm; all `[tokens, dim]`."""
        if not addend or x.device.is_cpu():
            total = summed(x, *addend)
            return total, self(total)
        (y,) = addend
        return kernels.add_norm(x, y, self.weight.to(x.device), eps=self.eps, offset=self.weight_offset)


def summed(x: TensorValue, *addend: TensorValue) -> TensorValue:
    """`x` with what is yet to be added to it, if anything, in the type of `x`."""
    for y in addend:
        x = ops.cast(x + y, x.dtype)
    return x
