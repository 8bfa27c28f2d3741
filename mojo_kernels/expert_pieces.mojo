"""How the products of all experts are cut into pieces: expert after expert, so that a thread reads long streams."""

from std.math import ceildiv
from std.sys import size_of

from .dot_tile import TILE_ROWS
from .grouped import GroupedProduct, Panel, multiply_group
from .operands import Ids
from .tasks import TOKENS_PER_READ, piece_count, share


@fieldwise_init
struct ExpertPieces[Product: GroupedProduct & ImplicitlyCopyable & Deinitable](
    ImplicitlyCopyable
):
    """The tiles of all experts that have tokens, cut into pieces of equal cost.
    """

    var product: Self.Product
    var offsets: Ids
    var experts: Int
    var cost: Int
    var count: Int

    def __init__(out self, product: Self.Product, offsets: Ids, experts: Int):
        self.product = product
        self.offsets = offsets
        self.experts = experts
        var hit = 0
        var assignments = Int(
            offsets[unsafe_offset=experts] - offsets[unsafe_offset=0]
        )
        for e in range(experts):
            hit += Int(offsets[unsafe_offset=e] != offsets[unsafe_offset=e + 1])
        var tiles = product.tiles()
        self.cost = (assignments + hit * TOKENS_PER_READ) * tiles
        comptime size = size_of[Self.Product.dtype]()
        var bytes = hit * tiles * TILE_ROWS * product.depth() * size
        self.count = 0
        if hit > 0:
            self.count = piece_count(hit * tiles, bytes, assignments // hit)

    @always_inline
    def run(self, panel: Panel, piece: Int):
        """Computes one piece."""
        var tiles = self.product.tiles()
        var first, last = share(self.cost, piece, self.count)
        var at = 0
        for e in range(self.experts):
            var begin = Int(self.offsets[unsafe_offset=e])
            var end = Int(self.offsets[unsafe_offset=e + 1])
            if begin == end:
                continue
            var each = end - begin + TOKENS_PER_READ
            # A tile belongs to the piece in which its first unit of cost lies.
            var low = min(max(ceildiv(first - at, each), 0), tiles)
            var high = min(max(ceildiv(last - at, each), 0), tiles)
            multiply_group(self.product, panel, e, (begin, end), (low, high))
            at += each * tiles
