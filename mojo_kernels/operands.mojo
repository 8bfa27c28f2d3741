"""How the ops hold their operands, and the errors that they raise about them."""

from std.memory.alloc import unsafe_alloc

comptime Elements[dtype: DType] = Pointer[Scalar[dtype], MutUntrackedOrigin]
"""Where an operand's elements lie; the graph keeps them alive while the op runs."""

comptime Floats = Elements[DType.float32]

comptime Ids = Elements[DType.int32]


struct Scratch[dtype: DType](Movable):
    """Memory of an op's own, with undefined contents."""

    var data: Elements[Self.dtype]

    def __init__(out self, size: Int):
        self.data = unsafe_alloc[Scalar[Self.dtype]](max(size, 1), alignment=64)

    def __deinit__(deinit self):
        self.data.unsafe_free()

    def keep(self):
        """Keeps the memory to here: closures hold only where it lies."""
        pass


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
