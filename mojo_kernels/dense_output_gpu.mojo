"""What the dense products do with their sums: `y = x w^T` in bfloat16 or float32, and `silu(gate x) * (up x)`."""

from max.gpu import lane_id
from std.math import exp, recip
from std.utils.static_tuple import StaticTuple

from .grouped_pairs_gpu import Pair, store_transposed
from .grouped_tiles_gpu import TILE_M
from .operands import Elements

comptime Quad = SIMD[DType.float32, 4]
"""A lane's sums of a warp's 16 weight rows with 8 tokens: rows lane / 4 and lane / 4 + 8, tokens 2 (lane % 4) + i."""


trait DenseOutput(TrivialRegisterPassable):
    """What distinguishes one dense product from another."""

    comptime dtype: DType
    """Type of the results."""

    comptime NAME: StaticString
    """In the names of kernels."""

    comptime BOX_ROWS: Int
    """Weight rows that one TMA copy brings."""

    comptime TENSORS: Int
    """Number of weight tensors, whose copies alternate."""

    comptime MATRICES: Int
    """8 x 8 matrices of results (rows, tokens) that a warp gets from its 16 weight rows and 8 tokens."""

    @staticmethod
    def of(
        results: Elements[Self.dtype], features: Int, limit: Float32
    ) -> Self:
        """The product whose results `[T, features]` go there; `limit` bounds an activation.
        """
        ...

    def results(self) -> Elements[Self.dtype]:
        """`[T, features]`."""
        ...

    def features(self) -> Int:
        ...

    def store(self, sums: Quad, row: Int, token: Int, tokens: Int):
        """Stores what a warp's 16 weight rows give for 8 tokens.

        Args:
            sums: The lane's.
            row: First result.
            token: First of the 8 tokens.
            tokens: Number of all tokens.
        """
        ...

    def plain(self) -> LinearOutput[Self.dtype]:
        """The same results, as they are."""
        ...

    def activated[
        N: Int
    ](
        self, first: StaticTuple[Float32, N], second: StaticTuple[Float32, N]
    ) -> StaticTuple[Float32, N]:
        """What becomes of both tensors' sums; of one tensor's, themselves."""
        ...


@fieldwise_init
struct LinearOutput[element: DType](DenseOutput):
    """The sums themselves, rounded to bfloat16 or as they are in float32."""

    comptime dtype = Self.element

    comptime NAME: StaticString = "linear"
    comptime BOX_ROWS = TILE_M
    comptime TENSORS = 1
    comptime MATRICES = 2

    var y: Elements[Self.element]
    var out_features: Int

    @always_inline
    @staticmethod
    def of(
        results: Elements[Self.element], features: Int, limit: Float32
    ) -> Self:
        return Self(results, features)

    @always_inline
    def results(self) -> Elements[Self.element]:
        return self.y

    @always_inline
    def features(self) -> Int:
        return self.out_features

    @always_inline
    def matrix[index: Int](self, sums: Quad) -> Pair:
        """A lane's part of one matrix, in bfloat16."""
        return Pair(
            sums[2 * index].cast[DType.bfloat16](),
            sums[2 * index + 1].cast[DType.bfloat16](),
        )

    @always_inline
    def plain(self) -> LinearOutput[Self.element]:
        return self

    @always_inline
    def activated[
        N: Int
    ](
        self, first: StaticTuple[Float32, N], second: StaticTuple[Float32, N]
    ) -> StaticTuple[Float32, N]:
        return first

    @always_inline
    def store(self, sums: Quad, row: Int, token: Int, tokens: Int):
        comptime if Self.element == DType.bfloat16:
            var to = rebind[Elements[DType.bfloat16]](self.y)
            comptime for m in range(2):
                store_pair(
                    to,
                    self.out_features,
                    self.matrix[m](sums),
                    row + 8 * m,
                    token,
                    tokens,
                )
        else:
            comptime for i in range(4):
                var to_token = token + Int(lane_id()) % 4 * 2 + i % 2
                var column = row + Int(lane_id()) // 4 + i // 2 * 8
                if to_token < tokens and column < self.out_features:
                    self.y[
                        unsafe_offset=to_token * self.out_features + column
                    ] = sums[i].cast[Self.element]()


@fieldwise_init
struct SwigluOutput(DenseOutput):
    """Activations. For `store` eight rows of `gate` alternate with eight of `up`, so that a lane holds both sums of one;
    for `activated` they lie apart.
    """

    comptime dtype = DType.bfloat16

    comptime NAME: StaticString = "swiglu"
    comptime BOX_ROWS = 8
    comptime TENSORS = 2
    comptime MATRICES = 1

    var act: Elements[DType.bfloat16]
    var intermediate_size: Int
    var limit: Float32

    @always_inline
    @staticmethod
    def of(
        results: Elements[DType.bfloat16], features: Int, limit: Float32
    ) -> Self:
        return Self(results, features, limit)

    @always_inline
    def results(self) -> Elements[DType.bfloat16]:
        return self.act

    @always_inline
    def features(self) -> Int:
        return self.intermediate_size

    @always_inline
    def activation(self, gate: Float32, up: Float32) -> Float32:
        # Comparisons, not min and max, which would drop a NaN.
        var gated = gate * recip(1 + exp(-gate))
        gated = self.limit if gated > self.limit else gated
        var linear = self.limit if up > self.limit else up
        linear = -self.limit if linear < -self.limit else linear
        return gated * linear

    @always_inline
    def plain(self) -> LinearOutput[DType.bfloat16]:
        return LinearOutput(self.act, self.intermediate_size)

    @always_inline
    def activated[
        N: Int
    ](
        self, first: StaticTuple[Float32, N], second: StaticTuple[Float32, N]
    ) -> StaticTuple[Float32, N]:
        var results = first
        comptime for i in range(N):
            results[i] = self.activation(first[i], second[i])
        return results

    @always_inline
    def store(self, sums: Quad, row: Int, token: Int, tokens: Int):
        var pair = Pair(
            self.activation(sums[0], sums[2]).cast[DType.bfloat16](),
            self.activation(sums[1], sums[3]).cast[DType.bfloat16](),
        )
        store_pair(self.act, self.intermediate_size, pair, row, token, tokens)


@always_inline
def store_pair(
    results: Elements[DType.bfloat16],
    features: Int,
    pair: Pair,
    column: Int,
    token: Int,
    tokens: Int,
):
    """Stores a warp's matrix of 8 results `column` ... with 8 tokens `token` ..., of which a lane has a pair.
    """
    var to_token = token + Int(lane_id()) // 4
    store_transposed(
        results.unsafe_offset(to_token * features + column),
        pair,
        to_token < tokens and column < features,
    )
