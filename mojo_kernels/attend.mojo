"""Softmax attention over the paged cache on a CPU: online softmax over blocks of keys, a block of queries at a time.

The query heads that share a key head are rows of one block, so that every key and value is read once for all of them.
"""

from std.math import ceildiv, exp, fma
from std.sys.intrinsics import prefetch
from std.utils.numerics import neg_inf

from .dot_tile import (
    DotTile,
    FETCH,
    LANES,
    Lanes,
    TILE_ROWS,
    TILE_TOKENS,
    load_row,
    load_tail,
)
from .heads import PagedCache
from .operands import Elements, Floats, Scratch
from .score import sigmoid

comptime BLOCK_ROWS = 48
"""Rows (query token and head) that go over the keys together, unless one token has more."""

comptime BLOCK_KEYS = 60
"""Keys of a block: whole tiles of the micro-kernel."""

comptime FETCH_FLOATS = 16
"""Floats of a cache line."""

comptime SCORES = 64
"""Scores of a row: a block's, and room behind them."""

comptime COLUMNS = 4
"""Vectors of a value row that are summed at a time."""


@fieldwise_init
struct Attend[gated: Bool](ImplicitlyCopyable):
    """`out = softmax(scale q k^T) v * sigmoid(gate)`, every query over the keys up to its own position.

    Parameters:
        gated: Whether there are gates.
    """

    var out_rows: Floats
    """Result `[T, heads, head_dim]`; may be `q`."""
    var q: Floats
    """Queries `[T, heads, head_dim]`."""
    var gates: Floats
    """`[T, heads]`."""
    var cache: PagedCache[DType.float32]
    var row_offsets: Elements[DType.uint32]
    """First token of every request, and the end `[batch + 1]`."""
    var cache_lengths: Elements[DType.uint32]
    """Tokens of every request in the cache before these `[batch]`."""
    var batch: Int
    var heads: Int
    var key_heads: Int
    var head_dim: Int
    var window: Int
    """A query sees so many keys at most, its own the last; 0: all."""
    var scale: Float32

    @always_inline
    def group(self) -> Int:
        """Query heads of a key head."""
        return self.heads // self.key_heads

    @always_inline
    def block_tokens(self) -> Int:
        """Tokens of a block."""
        return max(BLOCK_ROWS // self.group(), 1)

    @always_inline
    def first_token(self, request: Int) -> Int:
        return Int(self.row_offsets[unsafe_offset=request])

    def blocks(self, request: Int) -> Int:
        """Blocks of one request's tokens."""
        return ceildiv(
            self.first_token(request + 1) - self.first_token(request),
            self.block_tokens(),
        )

    def pieces(self) -> Int:
        """Number of pieces: one for every block and key head."""
        var blocks = 0
        for request in range(self.batch):
            blocks += self.blocks(request)
        return blocks * self.key_heads

    def run_piece(self, piece: Int):
        """Attends with one block of queries to one key head."""
        var block = piece // self.key_heads
        var request = 0
        while block >= self.blocks(request):
            block -= self.blocks(request)
            request += 1
        # The last block, which sees most, comes first: what is left at the end is small.
        block = self.blocks(request) - 1 - block
        var first = self.first_token(request) + block * self.block_tokens()
        var end = min(
            first + self.block_tokens(), self.first_token(request + 1)
        )
        self.attend(request, first, end, piece % self.key_heads)

    def attend(self, request: Int, first: Int, end: Int, head: Int):
        """Attends with the tokens `first` to `end` of a request to one key head.
        """
        var group = self.group()
        var rows = (end - first) * group
        var head_dim = self.head_dim
        var stride = ceildiv(head_dim, LANES) * LANES
        var position = (
            Int(self.cache_lengths[unsafe_offset=request])
            + first
            - self.first_token(request)
        )
        var last_position = position + end - first - 1

        var scores = Scratch[DType.float32](rows * SCORES)
        var sums = Scratch[DType.float32](rows * stride)
        var maxima = Scratch[DType.float32](rows)
        var totals = Scratch[DType.float32](rows)
        for i in range(rows * stride):
            sums.data[unsafe_offset=i] = 0
        for r in range(rows):
            maxima.data[unsafe_offset=r] = neg_inf[DType.float32]()
            totals.data[unsafe_offset=r] = 0

        var begin = 0
        if self.window > 0:
            begin = max(position - self.window + 1, 0)
        for key in range(begin, last_position + 1, BLOCK_KEYS):
            var count = min(BLOCK_KEYS, last_position + 1 - key)
            var keys = Array[Floats, BLOCK_KEYS](fill=self.q)
            for j in range(BLOCK_KEYS):
                # Past the end, any valid key; its score is masked.
                keys[j] = self.cache.keys(
                    request, key + min(j, count - 1)
                ).unsafe_offset(head * head_dim)
                # A head's keys and values are short pieces far apart, which the hardware does not foresee.
                for i in range(0, head_dim, FETCH_FLOATS):
                    prefetch[FETCH](keys[j].unsafe_offset(i))
                    prefetch[FETCH](
                        keys[j].unsafe_offset(self.cache.value_offset + i)
                    )
            self.score(scores.data, keys, first, rows, head, count)
            for r in range(rows):
                var query = position + r // group
                var low = 0
                if self.window > 0:
                    low = max(query - self.window + 1 - key, 0)
                var high = min(count, query + 1 - key)
                soften(
                    scores.data.unsafe_offset(r * SCORES),
                    low,
                    high,
                    self.scale,
                    maxima.data.unsafe_offset(r),
                    totals.data.unsafe_offset(r),
                    sums.data.unsafe_offset(r * stride),
                    stride,
                )
            add_values(
                sums.data,
                scores.data,
                keys,
                self.cache.value_offset,
                rows,
                count,
                head_dim,
            )

        for r in range(rows):
            var token = first + r // group
            var query_head = head * group + r % group
            var factor = 1 / totals.data[unsafe_offset=r]
            comptime if Self.gated:
                factor *= sigmoid(
                    self.gates[unsafe_offset=token * self.heads + query_head]
                )
            var to = self.out_rows.unsafe_offset(
                (token * self.heads + query_head) * head_dim
            )
            for i in range(head_dim):
                to[unsafe_offset=i] = (
                    sums.data[unsafe_offset=r * stride + i] * factor
                )
        scores.keep()
        sums.keep()
        maxima.keep()
        totals.keep()

    @always_inline
    def query(self, first: Int, row: Int, head: Int) -> Floats:
        """The query of a row of the block that begins with token `first`."""
        var group = self.group()
        return self.q.unsafe_offset(
            ((first + row // group) * self.heads + head * group + row % group)
            * self.head_dim
        )

    def score(
        self,
        scores: Floats,
        keys: Array[Floats, BLOCK_KEYS],
        first: Int,
        rows: Int,
        head: Int,
        count: Int,
    ):
        """`scores[r, j] = q_r k_j`, not scaled; behind `count`, any number."""
        for j in range(0, count, TILE_ROWS):
            var tile = Array[Elements[DType.float32], TILE_ROWS](fill=keys[j])
            comptime for i in range(1, TILE_ROWS):
                tile[i] = keys[j + i]
            var row = 0
            while rows - row >= TILE_TOKENS:
                self.score_tile[TILE_TOKENS](scores, tile, first, row, head, j)
                row += TILE_TOKENS
            comptime for tokens in range(1, TILE_TOKENS):
                if rows - row == tokens:
                    self.score_tile[tokens](scores, tile, first, row, head, j)

    @always_inline
    def score_tile[
        tokens: Int
    ](
        self,
        scores: Floats,
        tile: Array[Elements[DType.float32], TILE_ROWS],
        first: Int,
        row: Int,
        head: Int,
        column: Int,
    ):
        var queries = Array[Floats, tokens](fill=self.q)
        comptime for i in range(tokens):
            queries[i] = self.query(first, row + i, head)
        var dots = DotTile[tokens]()
        dots.add[step=LANES](
            queries,
            tile,
            self.head_dim,
            Array[Floats, 0](uninitialized=True),
        )
        comptime for i in range(tokens):
            # The two lanes of padding are the next tile's, or room behind the block.
            scores.unsafe_offset((row + i) * SCORES + column).unsafe_store(
                dots.reduced(i)
            )


@always_inline
def soften(
    scores: Floats,
    low: Int,
    high: Int,
    scale: Float32,
    maximum: Floats,
    total: Floats,
    sums: Floats,
    stride: Int,
):
    """Turns the scores `low` to `high` of a row into weights, all others into 0, and rescales what was summed before.
    """
    comptime vectors = SCORES // LANES
    if low >= high:
        comptime for c in range(vectors):
            scores.unsafe_offset(c * LANES).unsafe_store(Lanes(0))
        return
    for j in range(low):
        scores[unsafe_offset=j] = neg_inf[DType.float32]()
    for j in range(high, SCORES):
        scores[unsafe_offset=j] = neg_inf[DType.float32]()
    var best = Lanes(neg_inf[DType.float32]())
    comptime for c in range(vectors):
        var values = load_row(scores.unsafe_offset(c * LANES)) * scale
        scores.unsafe_offset(c * LANES).unsafe_store(values)
        best = max(best, values)
    var before = maximum[unsafe_offset=0]
    var now = max(before, best.reduce_max())
    var sum = Lanes(0)
    comptime for c in range(vectors):
        var weights = exp(load_row(scores.unsafe_offset(c * LANES)) - now)
        scores.unsafe_offset(c * LANES).unsafe_store(weights)
        sum += weights
    var shrink = exp(before - now)
    maximum[unsafe_offset=0] = now
    total[unsafe_offset=0] = total[unsafe_offset=0] * shrink + sum.reduce_add()
    if shrink != 1:
        for c in range(0, stride, LANES):
            sums.unsafe_offset(c).unsafe_store(
                load_row(sums.unsafe_offset(c)) * shrink
            )


def add_values(
    sums: Floats,
    weights: Floats,
    keys: Array[Floats, BLOCK_KEYS],
    value_distance: Int,
    rows: Int,
    count: Int,
    head_dim: Int,
):
    """`sums[r] += sum_j weights[r, j] v_j`, `v_j` at `value_distance` from key `j`.
    """
    var stride = ceildiv(head_dim, LANES) * LANES
    var row = 0
    while row < rows:
        var column = 0
        var few = rows - row < TILE_TOKENS
        while column < head_dim:
            var to = sums.unsafe_offset(row * stride + column)
            var from_weights = weights.unsafe_offset(row * SCORES)
            var distance = value_distance + column
            if head_dim - column >= COLUMNS * LANES:
                if few:
                    add_tile[1, COLUMNS, True](
                        to, from_weights, keys, distance, stride, count, LANES
                    )
                else:
                    add_tile[TILE_TOKENS, COLUMNS, True](
                        to, from_weights, keys, distance, stride, count, LANES
                    )
                column += COLUMNS * LANES
            else:
                var left = min(head_dim - column, LANES)
                if few:
                    add_tile[1, 1, False](
                        to, from_weights, keys, distance, stride, count, left
                    )
                else:
                    add_tile[TILE_TOKENS, 1, False](
                        to, from_weights, keys, distance, stride, count, left
                    )
                column += LANES
        row += 1 if few else TILE_TOKENS


@always_inline
def add_tile[
    rows: Int, columns: Int, whole: Bool
](
    sums: Floats,
    weights: Floats,
    keys: Array[Floats, BLOCK_KEYS],
    distance: Int,
    stride: Int,
    count: Int,
    left: Int,
):
    """`add_values` for a few rows and vectors; where not `whole`, a vector has `left` values.
    """
    var acc = Array[Lanes, rows * columns](fill=0)
    comptime for i in range(rows):
        comptime for c in range(columns):
            acc[i * columns + c] = load_row(
                sums.unsafe_offset(i * stride + c * LANES)
            )
    for j in range(count):
        var value = keys[j].unsafe_offset(distance)
        var values = Array[Lanes, columns](fill=0)
        comptime for c in range(columns):
            comptime if whole:
                values[c] = load_row(value.unsafe_offset(c * LANES))
            else:
                if left == LANES:
                    values[c] = load_row(value)
                else:
                    values[c] = load_tail(value, left)
        comptime for i in range(rows):
            var weight = Lanes(weights[unsafe_offset=i * SCORES + j])
            comptime for c in range(columns):
                acc[i * columns + c] = fma(
                    weight, values[c], acc[i * columns + c]
                )
    comptime for i in range(rows):
        comptime for c in range(columns):
            sums.unsafe_offset(i * stride + c * LANES).unsafe_store(
                acc[i * columns + c]
            )
