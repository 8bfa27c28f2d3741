"""How the ops hold their operands, and the errors that they raise about them."""

comptime Elements[dtype: DType] = Pointer[Scalar[dtype], MutUntrackedOrigin]
"""Where an operand's elements lie; the graph keeps them alive while the op runs."""

comptime Floats = Elements[DType.float32]

comptime Ids = Elements[DType.int32]


@always_inline
def elements[
    dtype: DType
](operand: Pointer[Scalar[dtype], MutAnyOrigin]) -> Elements[dtype]:
    """An operand's elements in a form that structs can hold."""
    return operand.unsafe_origin_cast[MutUntrackedOrigin]()


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
            op,
            ": ",
            operand,
            " is ",
            found,
            ", the other operands imply ",
            expected,
        )
