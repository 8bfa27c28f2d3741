"""How a dense product is cut into blocks: by an estimate of what each way costs on a Hopper GPU."""

from std.math import ceildiv

from .grouped_tiles_gpu import TILE_K, TILE_M

comptime MEMORY = 3000
"""Bytes that the memory delivers a nanosecond."""

comptime CACHE = 6500
"""Bytes that the second-level cache delivers a nanosecond."""

comptime MULTIPLY = 3
"""Nanoseconds a multiprocessor takes to multiply `[TILE_M, TILE_K]` with `[TILE_K, 1]`."""

comptime ADD = 12
"""Nanoseconds a token of a tile that a cluster's blocks take to add their sums."""

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
    """Blocks that share a tile's depth: 1, 2, 4 or 8."""

    def in_pairs(self) -> Bool:
        """Whether pairs of persistent blocks share the tokens of their tiles (`dense_wgmma_gpu`).
        """
        return self.splits == 1 and self.width >= PAIRED_FROM_WIDTH


def dense_cost(
    plan: DensePlan,
    tokens: Int,
    row_tiles: Int,
    steps: Int,
    multiprocessors: Int,
) -> Int:
    """Estimated nanoseconds: the slowest of memory, cache and tensor cores, and the splits' additions.

    Args:
        plan: How the product is cut.
        tokens: Number of tokens.
        row_tiles: Tiles of `TILE_M` weight rows.
        steps: Stages of `TILE_K` columns.
        multiprocessors: Of the GPU.
    """
    var blocks = row_tiles * ceildiv(tokens, plan.width) * plan.splits
    var rounds = ceildiv(blocks, multiprocessors)
    var each = ceildiv(steps, plan.splits)
    var weights = row_tiles * steps * (TILE_M * TILE_K * 2) // MEMORY
    # Fewer blocks than multiprocessors do not ask for the memory's full rate.
    var memory = weights * multiprocessors // min(blocks, multiprocessors)
    var brought = plan.width // 2 if plan.in_pairs() else plan.width
    var stage = (TILE_M + brought) * TILE_K * 2
    var cache = blocks * each * stage // CACHE
    var multiply = rounds * each * plan.width * MULTIPLY
    var add = rounds * plan.width * ADD if plan.splits > 1 else 0
    return max(memory, max(cache, multiply)) + add


def plan_dense(
    tokens: Int, row_tiles: Int, steps: Int, multiprocessors: Int
) -> DensePlan:
    """The cheapest way; of equal ones that with fewer splits and wider tiles.

    Args:
        tokens: Number of tokens.
        row_tiles: Tiles of `TILE_M` weight rows.
        steps: Stages of `TILE_K` columns.
        multiprocessors: Of the GPU.
    """
    var best = DensePlan(256, 1)
    var least = dense_cost(best, tokens, row_tiles, steps, multiprocessors)
    for splits in [1, 2, 4, MAX_SPLITS]:
        if splits > steps:
            break
        for width in [256, 192, 128, 64]:
            var plan = DensePlan(width, splits)
            var cost = dense_cost(
                plan, tokens, row_tiles, steps, multiprocessors
            )
            if cost < least:
                best = plan
                least = cost
    return best
