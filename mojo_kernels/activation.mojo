"""The experts' activation function, one value at a time."""

from std.math import exp


@always_inline
def activate(gate: Float32, up: Float32, limit: Float32) -> Float32:
    """`min(silu(gate), L) * clamp(up, -L, L)`, NaN where either is: comparisons, not min and max, which would drop one.
    """
    var gated = gate / (1 + exp(-gate))
    gated = limit if gated > limit else gated
    var bounded = limit if up > limit else up
    bounded = -limit if bounded < -limit else bounded
    return gated * bounded
