"""The tiles of a grouped product on a GPU, found from the experts' offsets on the device."""

from std.math import ceildiv

comptime SharedOffsets = Pointer[
    Int32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]
"""The experts' offsets as the tiles are found from them: in shared memory, since every tile looks at several."""

comptime TILE_M = 128
"""Rows of weights in a tile."""

comptime TILE_K = 64
"""Columns in a stage: 128 bytes of bfloat16, the width of a swizzled row."""


@fieldwise_init
struct TileWalk[MAX_N: Int](ImplicitlyCopyable):
    """The tiles in order of expert, weight rows, tokens; one after the other, so that neighbours share weights or
    tokens in the cache.

    An expert without tokens has no tiles. An expert with more than `MAX_N` tokens is cut into equal parts. Only
    assignments `begin` to `end` count.
    """

    var offsets: SharedOffsets
    var experts: Int
    var row_tiles: Int
    var begin: Int
    var end: Int
    var expert: Int
    var passed: Int
    """Tiles of the experts before `expert`."""
    var row_tile: Int
    """Index of the tile's weight rows within the expert."""
    var slot: Int
    """First assignment of the tile."""
    var tokens: Int
    """Number of assignments of the tile, 1 to `MAX_N`."""

    @always_inline
    def __init__(
        out self,
        offsets: SharedOffsets,
        experts: Int,
        row_tiles: Int,
        begin: Int,
        end: Int,
    ):
        self.offsets = offsets
        self.experts = experts
        self.row_tiles = row_tiles
        self.begin = begin
        self.end = end
        self.expert = 0
        self.passed = 0
        self.row_tile = 0
        self.slot = 0
        self.tokens = 0

    @always_inline
    def find(mut self, tile: Int) -> Bool:
        """Goes to a tile, which must not lie before the last one; false behind the last tile of all.
        """
        while self.expert < self.experts:
            var first = max(
                Int(self.offsets[unsafe_offset=self.expert]), self.begin
            )
            var last = min(
                Int(self.offsets[unsafe_offset=self.expert + 1]), self.end
            )
            var count = max(last - first, 0)
            var parts = ceildiv(count, Self.MAX_N)
            var local = tile - self.passed
            if local < parts * self.row_tiles:
                self.row_tile = local // parts
                var each = ceildiv(ceildiv(count, parts), 16) * 16
                var begin = (local - self.row_tile * parts) * each
                self.slot = first + begin
                self.tokens = min(each, count - begin)
                return True
            self.passed += parts * self.row_tiles
            self.expert += 1
        return False
