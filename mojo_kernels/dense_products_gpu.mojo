"""What a launch of a dense kernel multiplies its tokens with: one product, or several linear ones, whose tiles of weight
rows then form one list."""

from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .dense_output_gpu import DenseOutput, LinearOutput
from .grouped_tiles_gpu import TILE_M
from .stream_gpu import BFloats

comptime MOST_LINEARS = 3
"""Most linear products of a launch: queries, keys and values."""


@fieldwise_init
struct RowTile[D: DenseOutput](TrivialRegisterPassable):
    """A tile of weight rows."""

    var output: Self.D
    """The product that it belongs to."""
    var tensor: Int
    """Index of the product's first weight tensor."""
    var row: Int
    """First row in each of its tensors; there may be none behind the last tile."""


trait DenseProducts(DevicePassable, TrivialRegisterPassable):
    """Products of the same tokens."""

    comptime Output: DenseOutput
    """What becomes of the sums of each."""

    comptime NAME: StaticString
    """In the names of kernels."""

    comptime TENSORS: Int
    """Number of weight tensors of all products."""

    def weight_rows(self, tensor: Int) -> Int:
        """Rows of a weight tensor; 1 where there is none, since a map of it describes some.
        """
        ...

    def row_tiles(self) -> Int:
        """Tiles of all products."""
        ...

    def row_tile(self, index: Int) -> RowTile[Self.Output]:
        """A tile by its index in the list."""
        ...


@fieldwise_init
struct OneProduct[D: DenseOutput](DenseProducts):
    """A single product."""

    comptime Output = Self.D
    comptime NAME = Self.D.NAME
    comptime TENSORS = Self.D.TENSORS

    comptime ROWS = TILE_M // Self.D.TENSORS
    """Rows of a tile in each weight tensor."""

    var output: Self.D

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "OneProduct"

    @always_inline
    def weight_rows(self, tensor: Int) -> Int:
        return self.output.features()

    @always_inline
    def row_tiles(self) -> Int:
        return ceildiv(self.output.features(), Self.ROWS)

    @always_inline
    def row_tile(self, index: Int) -> RowTile[Self.D]:
        return RowTile(self.output, 0, index * Self.ROWS)


@fieldwise_init
struct Linears(DenseProducts):
    """`y_i = x w_i^T` in bfloat16, up to `MOST_LINEARS` of them, with weights `[out_features_i, K]`.
    """

    comptime Output = LinearOutput[DType.bfloat16]
    comptime NAME: StaticString = "linears"
    comptime TENSORS = MOST_LINEARS

    var y: StaticTuple[BFloats, MOST_LINEARS]
    var out_features: StaticTuple[Int, MOST_LINEARS]
    """0 where there is no product."""

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Linears"

    @always_inline
    def weight_rows(self, tensor: Int) -> Int:
        return max(self.out_features[tensor], 1)

    @always_inline
    def row_tiles(self) -> Int:
        var total = 0
        comptime for i in range(MOST_LINEARS):
            total += ceildiv(self.out_features[i], TILE_M)
        return total

    @always_inline
    def row_tile(self, index: Int) -> RowTile[Self.Output]:
        var tile = RowTile(
            LinearOutput(self.y[0], self.out_features[0]), 0, index * TILE_M
        )
        var before = 0
        comptime for i in range(1, MOST_LINEARS):
            before += ceildiv(self.out_features[i - 1], TILE_M)
            if index >= before:
                tile = RowTile(
                    LinearOutput(self.y[i], self.out_features[i]),
                    i,
                    (index - before) * TILE_M,
                )
        return tile
