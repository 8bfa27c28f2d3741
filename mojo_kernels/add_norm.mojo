"""Root-mean-square norm of hidden states on a GPU, and the same of a residual sum."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .norm_gpu import norm_gpu
from .operands import elements, expect_size


@extensibility.register("step3p5_norm")
struct Step3p5Norm:
    """`y = x * rsqrt(mean(x^2) + eps) * (offset + weight)` over each row."""

    @staticmethod
    def execute[
        dtype: DType, weight_dtype: DType, //, target: StaticString
    ](
        y: OutputTensor[dtype=dtype, rank=2, ...],
        x: InputTensor[dtype=dtype, rank=2, ...],
        weight: InputTensor[dtype=weight_dtype, rank=1, ...],
        eps: Float32,
        offset: Float32,
        ctx: DeviceContext,
    ) raises:
        """Computes in float32.

        Parameters:
            dtype: Type of the rows.
            weight_dtype: Type of the weights.
            target: Kind of device, a GPU's.

        Args:
            y: Result `[T, H]`.
            x: Rows `[T, H]`.
            weight: `[H]`.
            eps: Added to the mean of the squares.
            offset: Added to the weights.
            ctx: The device.
        """
        comptime op = "step3p5_norm"
        comptime assert target != "cpu", "step3p5_norm: GPUs only"
        var tokens = x.dim_size(0)
        var size = x.dim_size(1)
        expect_size(op, "y[T, H] dim T", y.dim_size(0), tokens)
        expect_size(op, "y[T, H] dim H", y.dim_size(1), size)
        expect_size(op, "weight[H]", weight.dim_size(0), size)
        var rows = elements(x.unsafe_ptr())
        norm_gpu[adds=False](
            elements(y.unsafe_ptr()),
            rows,
            rows,
            rows,
            elements(weight.unsafe_ptr()),
            tokens,
            size,
            eps,
            offset,
            ctx,
        )


@extensibility.register("step3p5_add_norm")
struct Step3p5AddNorm:
    """`total = x + delta`, and `step3p5_norm` of it."""

    @staticmethod
    def execute[
        dtype: DType,
        delta_dtype: DType,
        weight_dtype: DType,
        //,
        target: StaticString,
    ](
        total: OutputTensor[dtype=dtype, rank=2, ...],
        y: OutputTensor[dtype=dtype, rank=2, ...],
        x: InputTensor[dtype=dtype, rank=2, ...],
        delta: InputTensor[dtype=delta_dtype, rank=2, ...],
        weight: InputTensor[dtype=weight_dtype, rank=1, ...],
        eps: Float32,
        offset: Float32,
        ctx: DeviceContext,
    ) raises:
        """Adds and norms in float32; what is normed is the sum as `total` has it.

        Parameters:
            dtype: Type of the rows.
            delta_dtype: Type of what is added.
            weight_dtype: Type of the weights.
            target: Kind of device, a GPU's.

        Args:
            total: The sum `[T, H]`.
            y: The normed sum `[T, H]`.
            x: Rows `[T, H]`.
            delta: What is added to them `[T, H]`.
            weight: `[H]`.
            eps: Added to the mean of the squares.
            offset: Added to the weights.
            ctx: The device.
        """
        comptime op = "step3p5_add_norm"
        comptime assert target != "cpu", "step3p5_add_norm: GPUs only"
        var tokens = x.dim_size(0)
        var size = x.dim_size(1)
        expect_size(op, "total[T, H] dim T", total.dim_size(0), tokens)
        expect_size(op, "total[T, H] dim H", total.dim_size(1), size)
        expect_size(op, "y[T, H] dim T", y.dim_size(0), tokens)
        expect_size(op, "y[T, H] dim H", y.dim_size(1), size)
        expect_size(op, "delta[T, H] dim T", delta.dim_size(0), tokens)
        expect_size(op, "delta[T, H] dim H", delta.dim_size(1), size)
        expect_size(op, "weight[H]", weight.dim_size(0), size)
        norm_gpu[adds=True](
            elements(y.unsafe_ptr()),
            elements(total.unsafe_ptr()),
            elements(x.unsafe_ptr()),
            elements(delta.unsafe_ptr()),
            elements(weight.unsafe_ptr()),
            tokens,
            size,
            eps,
            offset,
            ctx,
        )
