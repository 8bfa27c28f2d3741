"""How a dense product is cut into blocks: by an estimate of what each way costs on a Hopper GPU."""

from std.math import ceildiv

from .grouped_tiles_gpu import TILE_K, TILE_M

comptime MEMORY = 3000
"""Bytes that the memory delivers a nanosecond."""

comptime CACHE = 9000
"""Bytes that the second-level cache delivers a nanosecond."""

comptime STAGE = 192
"""Nanoseconds a multiprocessor takes for a stage of `TILE_K` columns, whatever the tokens of the tile, and ..."""

comptime STAGE_TOKEN = 9
"""... quarters of a nanosecond for each token. Shared memory sets this pace: for a tile of 256 tokens it is that of the
tensor cores, for narrower ones slower."""

comptime STAGE_ALONE = 112
"""As `STAGE`, with a ring twice as deep: the next copies are asked for so early that nothing waits for them."""

comptime COPY = 45
"""Nanoseconds from one copy of a stage's weights to the next, where there are several."""

comptime ADD = 12
"""Nanoseconds a token of a tile that a cluster's blocks take to add their sums."""

comptime OUTSIDE_CLUSTERS = 20
"""Multiprocessors that clusters of 4 and 8 blocks leave idle where every block needs one for itself: so many do not come
in fours or eights that are neighbours."""

comptime MAX_SPLITS = 8
"""Blocks of the largest cluster that every Hopper GPU takes."""

comptime PAIRED_FROM_WIDTH = 192
"""Tokens of a tile from which on the tensor cores, not the number of blocks, set the pace where no depth is shared."""


@fieldwise_init
struct DensePlan(ImplicitlyCopyable):
    """A way to cut a product."""

    var width: Int
    """Tokens of a tile: 64, 128, 192 or 256."""
    var splits: Int
    """Blocks that share a tile's depth: 1, 2, 3, 4 or 8."""

    def blocks(self, tokens: Int, row_tiles: Int) -> Int:
        """Blocks of a product that is not done in pairs."""
        return row_tiles * ceildiv(tokens, self.width) * self.splits

    def runs_at_once(
        self, tokens: Int, row_tiles: Int, multiprocessors: Int
    ) -> Bool:
        """Whether every block can have a multiprocessor to itself."""
        return self.blocks(tokens, row_tiles) <= multiprocessors

    def is_alone(
        self, tokens: Int, row_tiles: Int, multiprocessors: Int
    ) -> Bool:
        """Whether blocks that could share a multiprocessor need not, and take the ring that two have room for.

        Larger clusters find too few places if each of their blocks must have a multiprocessor.
        """
        return (
            self.width == 128
            and self.splits <= 3
            and self.runs_at_once(tokens, row_tiles, multiprocessors)
        )

    def fits(
        self,
        tokens: Int,
        row_tiles: Int,
        steps: Int,
        copies: Int,
        multiprocessors: Int,
    ) -> Bool:
        """Whether a product may be cut so.

        Args:
            tokens: Number of tokens.
            row_tiles: Tiles of `TILE_M` weight rows.
            steps: Stages of `TILE_K` columns.
            copies: See `dense_cost`.
            multiprocessors: Of the GPU.
        """
        # A narrower tile holds all tokens too.
        if self.width - 64 >= tokens or self.splits > steps:
            return False
        # Thirds are for products whose quarters would not all run at once. Where the weights come in many copies they
        # took half as long again as what the estimate names second.
        return self.splits != 3 or (
            copies == 1
            and self.runs_at_once(tokens, row_tiles, multiprocessors)
        )

    def in_pairs(self) -> Bool:
        """Whether pairs of persistent blocks share the tokens of their tiles (`dense_wgmma_gpu`).
        """
        return self.splits == 1 and self.width >= PAIRED_FROM_WIDTH


def dense_cost(
    plan: DensePlan,
    tokens: Int,
    row_tiles: Int,
    steps: Int,
    copies: Int,
    multiprocessors: Int,
) -> Int:
    """Estimated nanoseconds: the slowest of memory, cache, multiprocessors and copies, and the splits' additions.

    Of 56 products of 64 to 512 tokens with 30 M weights and more on an H200 it is off by 7 % in the median and 25 % at most;
    small products, not among them, take about 4 microseconds more.

    Args:
        plan: How the product is cut.
        tokens: Number of tokens.
        row_tiles: Tiles of `TILE_M` weight rows.
        steps: Stages of `TILE_K` columns.
        copies: How many bring the weights of a stage where blocks do not work in pairs.
        multiprocessors: Of the GPU.
    """
    var blocks = plan.blocks(tokens, row_tiles)
    var alone = plan.is_alone(tokens, row_tiles, multiprocessors)
    # Two blocks with at most 128 tokens fit on a multiprocessor.
    var resident = 2 if plan.width <= 128 and not alone else 1
    var places = multiprocessors
    if plan.splits >= 4 and resident == 1:
        places -= OUTSIDE_CLUSTERS
    var each = ceildiv(steps, plan.splits)
    var weights = row_tiles * steps * (TILE_M * TILE_K * 2) // MEMORY
    # The tiles of other tokens find three quarters of the same weights in the cache.
    if not plan.in_pairs():
        weights += weights * (ceildiv(tokens, plan.width) - 1) // 4
    # Fewer blocks do not ask for the memory's full rate; one that is alone has the longer ring.
    var readers = multiprocessors if resident == 2 else multiprocessors * 3 // 4
    var memory = weights * readers // min(blocks, readers)
    var brought = plan.width // 2 if plan.in_pairs() else plan.width
    var cache = blocks * each * ((TILE_M + brought) * TILE_K * 2) // CACHE
    var rounds = ceildiv(blocks, places)
    var stage = STAGE_ALONE if alone else STAGE
    var multiply = rounds * each * (stage + plan.width * STAGE_TOKEN // 4)
    var copy = 0
    if not plan.in_pairs():
        copy = ceildiv(blocks, places * resident) * each * copies * COPY
    var add = rounds * plan.width * ADD if plan.splits > 1 else 0
    return max(max(memory, cache), max(multiply, copy)) + add


def plan_dense(
    tokens: Int, row_tiles: Int, steps: Int, copies: Int, multiprocessors: Int
) -> DensePlan:
    """The cheapest way; fewer splits and wider tiles unless the others save more than a sixteenth.

    Args:
        tokens: Number of tokens.
        row_tiles: Tiles of `TILE_M` weight rows.
        steps: Stages of `TILE_K` columns.
        copies: See `dense_cost`.
        multiprocessors: Of the GPU.
    """
    var best = DensePlan(64, 1)
    var least = Int.MAX // 16
    for splits in [1, 2, 3, 4, MAX_SPLITS]:
        for width in [256, 192, 128, 64]:
            var plan = DensePlan(width, splits)
            if not plan.fits(tokens, row_tiles, steps, copies, multiprocessors):
                continue
            var cost = dense_cost(
                plan, tokens, row_tiles, steps, copies, multiprocessors
            )
            if cost * 16 < least * 15:
                best = plan
                least = cost
    return best
