"""How the tokens of a dense product are cut into tiles, and the copies that bring them."""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile
from max.gpu.host import DeviceBuffer, DeviceContext
from max.gpu.host.nvidia.tma import create_tma_descriptor
from std.math import ceildiv
from std.utils.index import IndexList

from .dense_ring_gpu import BF16, SWIZZLE
from .dense_store_gpu import TokenRange
from .grouped_tiles_gpu import TILE_K
from .operands import Elements


struct TokenTiles[MAX_N: Int, SHARERS: Int](ImplicitlyCopyable):
    """Tiles of equally many tokens, at most `MAX_N`. The last one begins early enough to end with the last token.

    Copies that reach behind the last token hold a product up: one of 65 tokens, with copies of 128, took half as long
    again as one of 128. A token that lies in two tiles gets the same bits from both.
    """

    var tokens: Int
    """All of them."""
    var count: Int
    """Tiles."""
    var share: Int
    """Tokens of a tile that each of the `SHARERS` blocks brings."""

    @always_inline
    def __init__(out self, tokens: Int):
        self.tokens = tokens
        self.count = ceildiv(tokens, Self.MAX_N)
        # The swizzle of a share must begin where a pattern of 8 rows does.
        comptime MULTIPLE = 1 if Self.SHARERS == 1 else 8
        var each = ceildiv(tokens, self.count)
        self.share = ceildiv(each, Self.SHARERS * MULTIPLE) * MULTIPLE

    @always_inline
    def each(self) -> Int:
        """Tokens of a tile; there may be fewer if there is one tile."""
        return Self.SHARERS * self.share

    @always_inline
    def range(self, tile: Int) -> TokenRange:
        """The tokens of a tile."""
        var first = max(min(tile * self.each(), self.tokens - self.each()), 0)
        return TokenRange(first, min(first + self.each(), self.tokens))

    def fit_copies[
        shape: Coord, desc: Coord
    ](
        self,
        mut map: TMATensorTile[BF16, shape, desc],
        x: Elements[BF16],
        depth: Int,
        ctx: DeviceContext,
    ) raises:
        """Makes every copy that `map` describes one of a share.

        Args:
            map: Describes copies of tokens.
            x: Tokens `[tokens, depth]`.
            depth: Length of the dot products.
            ctx: The device.
        """
        map.descriptor = create_tma_descriptor[BF16, 2, SWIZZLE](
            DeviceBuffer[BF16](ctx, x, 1, owning=False),
            IndexList[2](self.tokens, depth),
            IndexList[2](depth, 1),
            IndexList[2](self.share, TILE_K),
        )
