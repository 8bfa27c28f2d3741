"""A router score, and its place among others."""

from std.math import exp
from std.memory import bitcast
from std.utils.numerics import isnan


@always_inline
def sigmoid(x: Float32) -> Float32:
    """`1 / (1 + exp(-x))`, computed in float64 so that the result is correctly rounded but for rare ties.
    """
    if isnan(x):  # `exp` takes NaN to a number.
        return x
    return (1 / (1 + exp(-x.cast[DType.float64]()))).cast[DType.float32]()


@always_inline
def order_key(score: Float32) -> Int32:
    """An integer that orders as the score does; NaN is above all, so that a broken token stays visible.
    """
    if isnan(score):
        return Int32.MAX
    var bits = bitcast[DType.int32](score)
    return bits if bits >= 0 else bits ^ Int32.MAX
