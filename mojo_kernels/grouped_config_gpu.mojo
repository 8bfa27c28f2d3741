"""Sizes of the grouped kernels on Hopper, by the number of tokens."""

comptime FEW_TOKENS = 768
"""Up to so many tokens, 64 columns of tokens a tile leave most room for weights on their way."""

comptime MANY_TOKENS = 3072
"""From so many tokens on, tiles of 256 columns."""


@fieldwise_init
struct TileConfig(ImplicitlyCopyable):
    """The kernel for some numbers of tokens."""

    var width: Int
    """Most tokens of a tile."""
    var stages: Int
    """Stages of the ring."""
    var sharers: Int
    """Blocks of a cluster, which share an expert's tokens: 1, 2 or 4."""
    var rows: Int
    """Rows of the gate and of the up matrix that lie together in shared memory: 64, or 8, where each warp group
    multiplies its rows of both with all tokens."""
    var box: Int
    """Tokens that one copy brings, where they lie in order."""
    var feeders: Int
    """Warps that bring the tokens of `gate_up_grouped` row by row, up to 3; 0: they are brought in order first."""
    var lag: Int
    """Steps by which the first warp group is ahead in a tile, so that one stores while the other multiplies."""
    var stagings: Int
    """2: a warp group's results leave shared memory by copies of their own, from two places by turns; 1: its threads
    store them."""


comptime FEW_SHARERS = 2

comptime FEW_ROWS = 64

comptime FEW_BOX = 32

comptime FEW_FEEDERS = 0

comptime FEW_LAG = 0

comptime FEW_STAGINGS = 1

comptime FEW = TileConfig(
    64, 8, FEW_SHARERS, FEW_ROWS, FEW_BOX, FEW_FEEDERS, FEW_LAG, FEW_STAGINGS
)
"""Up to `FEW_TOKENS`."""

comptime MIDDLE_SHARERS = 2

comptime MIDDLE_ROWS = 64

comptime MIDDLE_BOX = 32

comptime MIDDLE_FEEDERS = 0

comptime MIDDLE_LAG = 0

comptime MIDDLE_STAGINGS = 1

comptime MIDDLE = TileConfig(
    128,
    6,
    MIDDLE_SHARERS,
    MIDDLE_ROWS,
    MIDDLE_BOX,
    MIDDLE_FEEDERS,
    MIDDLE_LAG,
    MIDDLE_STAGINGS,
)
"""Between `FEW_TOKENS` and `MANY_TOKENS`."""

comptime MANY_SHARERS = 2

comptime MANY_ROWS = 64

comptime MANY_BOX = 64

comptime MANY_FEEDERS = 0

comptime MANY_LAG = 0

comptime MANY_STAGINGS = 1

comptime MANY = TileConfig(
    256,
    4,
    MANY_SHARERS,
    MANY_ROWS,
    MANY_BOX,
    MANY_FEEDERS,
    MANY_LAG,
    MANY_STAGINGS,
)
"""From `MANY_TOKENS` on."""
