"""Errors that the ops raise about their operands."""


def expect_size(
    op: StaticString, operand: StaticString, found: Int, expected: Int
) raises:
    """Raises unless one dimension of an operand has the size that the other operands imply.

    Args:
        op: Name of the custom op.
        operand: Operand and dimension, e.g. `down[E, H, M], dim H`.
        found: Size of that dimension.
        expected: Size that the other operands imply.
    """
    if found != expected:
        raise Error(
            op, ": ", operand, " is ", found, ", the other operands imply ", expected
        )
