"""The product of grouped token rows with their expert's weight rows, shared by every op that multiplies.

The rows of a weight matrix are cut into equal strips, one for every row of a tile, and tile `i` takes row `i` of each
strip. A sweep over tiles then reads every strip as one contiguous stream, which the hardware fetches ahead across the
ends of rows; with neighbouring rows in a tile, every tile would start cold (measured at 1 to 8 tokens: 1.3 to 1.6 times
slower).
"""

from std.math import ceildiv
from std.memory.alloc import unsafe_alloc

from .dot_tile import (
    DotTile,
    LANES,
    TILE_ROWS,
    TILE_TOKENS,
    TileSums,
    load_row,
    load_tail,
)
from .operands import Elements, Floats

comptime PACK_MIN_TOKENS = 80
"""From this many tokens on, a tile of weights is copied once to a contiguous float32 panel and read from there: with
fewer, reading it in place is as fast or faster (measured on Zen 4, float32 and bfloat16)."""

comptime BLOCK_BYTES = 512 * 1024
"""Token rows that a core sweeps over for every tile of weights: about half of its second-level cache."""


trait GroupedProduct:
    """What to multiply, and where the sums go. A slot is a position in the list of (token, expert) assignments.
    """

    comptime dtype: DType
    """Type of the weights."""

    def tiles(self) -> Int:
        """Number of tiles of an expert, the length of a strip."""
        ...

    def depth(self) -> Int:
        """Length of token rows and weight rows."""
        ...

    def x_row(self, slot: Int) -> Floats:
        """The token row of a slot."""
        ...

    def w_row(self, expert: Int, tile: Int, row: Int) -> Elements[Self.dtype]:
        """Row `row < TILE_ROWS` of a tile of an expert's weights; past the end, any valid row.
        """
        ...

    @always_inline
    def tile_rows(
        self, expert: Int, tile: Int
    ) -> Array[Elements[Self.dtype], TILE_ROWS]:
        """All rows of a tile of an expert's weights."""
        var rows = Array[Elements[Self.dtype], TILE_ROWS](
            fill=self.w_row(expert, tile, 0)
        )
        comptime for j in range(1, TILE_ROWS):
            rows[j] = self.w_row(expert, tile, j)
        return rows^

    def store(self, slot: Int, tile: Int, sums: TileSums):
        """Takes the sums of one slot with a tile."""
        ...


struct Panel(Movable):
    """A tile of weights as float32, its rows' vectors interleaved, tails padded with zeros.
    """

    var data: Floats

    def __init__(out self, depth: Int):
        self.data = unsafe_alloc[Float32](
            max(ceildiv(depth, LANES), 1) * TILE_ROWS * LANES, alignment=64
        )

    def __deinit__(deinit self):
        self.data.unsafe_free()

    @always_inline
    def pack[
        dtype: DType
    ](self, w: Array[Elements[dtype], TILE_ROWS], depth: Int):
        """Fills the panel from the rows of a tile."""
        var vectors = depth // LANES
        for c in range(vectors):
            comptime for j in range(TILE_ROWS):
                self.data.unsafe_offset(
                    (c * TILE_ROWS + j) * LANES
                ).unsafe_store(load_row(w[j].unsafe_offset(c * LANES)))
        var left = depth - vectors * LANES
        if left > 0:
            comptime for j in range(TILE_ROWS):
                self.data.unsafe_offset(
                    (vectors * TILE_ROWS + j) * LANES
                ).unsafe_store(
                    load_tail(w[j].unsafe_offset(vectors * LANES), left)
                )

    @always_inline
    def rows(self) -> Array[Floats, TILE_ROWS]:
        """First element of every row."""
        var rows = Array[Floats, TILE_ROWS](fill=self.data)
        comptime for j in range(TILE_ROWS):
            rows[j] = self.data.unsafe_offset(j * LANES)
        return rows^


@always_inline
def multiply_tile[
    Product: GroupedProduct,
    dtype: DType,
    //,
    tokens: Int,
    step: Int,
    streams: Int,
](
    product: Product,
    slot: Int,
    tile: Int,
    w: Array[Elements[dtype], TILE_ROWS],
    next: Array[Elements[Product.dtype], streams],
):
    """Multiplies `tokens` slots from `slot` on with one tile of weights, and fetches the rows `next` meanwhile.
    """
    var x = Array[Floats, tokens](fill=product.x_row(slot))
    comptime for i in range(1, tokens):
        x[i] = product.x_row(slot + i)
    var dots = DotTile[tokens]()
    dots.add[step=step](x, w, product.depth(), next)
    comptime for i in range(tokens):
        product.store(slot + i, tile, dots.reduced(i))


def multiply_few[
    Product: GroupedProduct
](product: Product, expert: Int, begin: Int, end: Int, tile: Int):
    """Multiplies slots with one tile of weights where it lies.

    The first slots read it from memory, at the pace of the hardware's own fetching; the next ones find it in the cache
    and fetch the next tile.
    """
    var w = product.tile_rows(expert, tile)
    var none = Array[Elements[Product.dtype], 0](uninitialized=True)
    var slot = begin
    if end - slot >= TILE_TOKENS:
        multiply_tile[tokens=TILE_TOKENS, step=LANES](
            product, slot, tile, w, none
        )
        slot += TILE_TOKENS
        if end - slot >= TILE_TOKENS:
            var next = product.tile_rows(expert, tile + 1)
            multiply_tile[tokens=TILE_TOKENS, step=LANES](
                product, slot, tile, w, next
            )
            slot += TILE_TOKENS
        while end - slot >= TILE_TOKENS:
            multiply_tile[tokens=TILE_TOKENS, step=LANES](
                product, slot, tile, w, none
            )
            slot += TILE_TOKENS
    comptime for tokens in range(1, TILE_TOKENS):
        if end - slot == tokens:
            multiply_tile[tokens=tokens, step=LANES](
                product, slot, tile, w, none
            )


def multiply_many[
    Product: GroupedProduct
](
    product: Product,
    panel: Panel,
    expert: Int,
    begin: Int,
    end: Int,
    tile: Int,
):
    """Multiplies slots with one tile of weights by way of the panel, and fetches the next tile meanwhile.
    """
    panel.pack(product.tile_rows(expert, tile), product.depth())
    var next = product.tile_rows(expert, tile + 1)
    var none = Array[Elements[Product.dtype], 0](uninitialized=True)
    var w = panel.rows()
    var row = 0
    var slot = begin
    while end - slot >= TILE_TOKENS:
        if row < TILE_ROWS:
            multiply_tile[tokens=TILE_TOKENS, step=TILE_ROWS * LANES](
                product,
                slot,
                tile,
                w,
                Array[Elements[Product.dtype], 1](fill=next[row]),
            )
            row += 1
        else:
            multiply_tile[tokens=TILE_TOKENS, step=TILE_ROWS * LANES](
                product, slot, tile, w, none
            )
        slot += TILE_TOKENS
    multiply_few(product, expert, slot, end, tile)


def multiply_group[
    Product: GroupedProduct
](
    product: Product,
    panel: Panel,
    expert: Int,
    slots: Tuple[Int, Int],
    tiles: Tuple[Int, Int],
):
    """Multiplies one expert's slots with a range of its tiles.

    Args:
        product: The operands.
        panel: Scratch space of the calling task.
        expert: Index of the expert.
        slots: First and last + 1 of the expert's slots.
        tiles: First and last + 1 of the tiles.
    """
    if slots[0] == slots[1]:
        return
    var row_bytes = 4 * max(product.depth(), 1)
    var most = max(BLOCK_BYTES // row_bytes, PACK_MIN_TOKENS)
    # Blocks of equal size: a short last one would read all weights again for little.
    var block = ceildiv(slots[1] - slots[0], ceildiv(slots[1] - slots[0], most))
    block = ceildiv(block, TILE_TOKENS) * TILE_TOKENS
    for begin in range(slots[0], slots[1], block):
        var end = min(begin + block, slots[1])
        for tile in range(tiles[0], tiles[1]):
            if end - begin < PACK_MIN_TOKENS:
                multiply_few(product, expert, begin, end, tile)
            else:
                multiply_many(product, panel, expert, begin, end, tile)
