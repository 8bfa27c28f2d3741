"""Norms of hidden states on a GPU as ops; on a CPU they are part of a layer's blocks."""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .norm_gpu import norm_gpu
from .operands import elements, expect_size


@extensibility.register("step3p5_norm")
struct Step3p5Norm:
    """`y = x * rsqrt(mean(x^2) + eps) * (offset + weight)` of every row."""

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
        """Norms rows, in float32.

        Parameters:
            dtype: Type of the rows.
            weight_dtype: Type of the weights.
            target: Kind of device, a GPU's.

        Args:
            y: Result `[T, H]`.
            x: Rows `[T, H]`.
            weight: Weights `[H]`.
            eps: Added to the mean square.
            offset: Added to the weights.
            ctx: The device.
        """
        comptime assert target != "cpu", "step3p5_norm: GPUs only"
        comptime op = "step3p5_norm"
        expect_size(op, "y[T, H] dim T", y.dim_size(0), x.dim_size(0))
        expect_size(op, "y[T, H] dim H", y.dim_size(1), x.dim_size(1))
        expect_size(op, "weight[H]", weight.dim_size(0), x.dim_size(1))
        norm_gpu[adds=False](
            elements(y.unsafe_ptr()),
            elements(y.unsafe_ptr()),
            elements(x.unsafe_ptr()),
            elements(x.unsafe_ptr()),
            elements(weight.unsafe_ptr()),
            x.dim_size(0),
            x.dim_size(1),
            eps,
            offset,
            ctx,
        )


@extensibility.register("step3p5_add_norm")
struct Step3p5AddNorm:
    """`sum = x + delta` and `step3p5_norm` of it."""

    @staticmethod
    def execute[
        dtype: DType,
        delta_dtype: DType,
        weight_dtype: DType,
        //,
        target: StaticString,
    ](
        sum: OutputTensor[dtype=dtype, rank=2, ...],
        y: OutputTensor[dtype=dtype, rank=2, ...],
        x: InputTensor[dtype=dtype, rank=2, ...],
        delta: InputTensor[dtype=delta_dtype, rank=2, ...],
        weight: InputTensor[dtype=weight_dtype, rank=1, ...],
        eps: Float32,
        offset: Float32,
        ctx: DeviceContext,
    ) raises:
        """Adds and norms rows, in float32; what is normed is the rounded sum.

        Parameters:
            dtype: Type of the rows.
            delta_dtype: Type of what is added.
            weight_dtype: Type of the weights.
            target: Kind of device, a GPU's.

        Args:
            sum: Sums `[T, H]`.
            y: Their norms `[T, H]`.
            x: Rows `[T, H]`.
            delta: Added to them `[T, H]`.
            weight: Weights `[H]`.
            eps: Added to the mean square.
            offset: Added to the weights.
            ctx: The device.
        """
        comptime assert target != "cpu", "step3p5_add_norm: GPUs only"
        comptime op = "step3p5_add_norm"
        expect_size(op, "delta[T, H] dim T", delta.dim_size(0), x.dim_size(0))
        expect_size(op, "delta[T, H] dim H", delta.dim_size(1), x.dim_size(1))
        expect_size(op, "sum[T, H] dim T", sum.dim_size(0), x.dim_size(0))
        expect_size(op, "sum[T, H] dim H", sum.dim_size(1), x.dim_size(1))
        expect_size(op, "y[T, H] dim T", y.dim_size(0), x.dim_size(0))
        expect_size(op, "y[T, H] dim H", y.dim_size(1), x.dim_size(1))
        expect_size(op, "weight[H]", weight.dim_size(0), x.dim_size(1))
        norm_gpu[adds=True](
            elements(y.unsafe_ptr()),
            elements(sum.unsafe_ptr()),
            elements(x.unsafe_ptr()),
            elements(delta.unsafe_ptr()),
            elements(weight.unsafe_ptr()),
            x.dim_size(0),
            x.dim_size(1),
            eps,
            offset,
            ctx,
        )
