"""What a cycle of speculation accepts of each request's drafts, and what the depths read next."""

from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from .operands import Elements

comptime Tokens = Elements[DType.int64]


@fieldwise_init
struct Accepted[dtype: DType](DevicePassable, TrivialRegisterPassable):
    """The operands of `step3p5_accept`, and what follows from them for a request.

    Its states are those of the `keep` positions before its last token, then those of what was verified. As many rows as
    were verified are read next: those up to the last accepted position, which the depths have not read or have read
    with other drafts. Row `r` holds the hidden state of its position and, as its token, that of the position after it.
    """

    var previous: Elements[Self.dtype]
    """The rows' hidden states `[B * R, H]`; result."""
    var tokens: Tokens
    """The rows' tokens `[B * R]`; result."""
    var following: Tokens
    """Where a row's token at the next depth stands, in `tokens` followed by a draft of each request `[B * R]`; result.
    """
    var last_rows: Tokens
    """Row of the last accepted token `[B]`; result."""
    var lengths: Elements[DType.uint32]
    """Positions before the rows `[B]`; result."""
    var summary: Tokens
    """What was drawn, and how many drafts are accepted `[B, d + 2]`; result."""
    var drawn: Tokens
    """What the target draws after every verified token `[B, d + 1]`."""
    var hidden: Elements[Self.dtype]
    """The hidden states of the same `[B, d + 1, H]`."""
    var verified: Tokens
    """Each request's last token and its drafts `[B, d + 1]`; then its new last token, and the same drafts."""
    var cache_lengths: Elements[DType.uint32]
    """Positions in the cache before the cycle `[B]`."""
    var kept: Elements[Self.dtype]
    """Hidden states of the positions before the last token `[B, keep, H]`, before and after."""
    var window: Tokens
    """The tokens of the same and the last one `[B, keep + 1]`, before and after."""
    var requests: Int
    var depth: Int
    var keep: Int
    var hidden_size: Int

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Accepted"

    @always_inline
    def rows(self) -> Int:
        """Rows of a request."""
        return self.depth + 1

    @always_inline
    def first(self, count: Int) -> Int:
        """The first row's place among a request's states, where `count` drafts are accepted.

        Depth `k` reads the token `k + 1` places on, so that it has read the last `k` positions with drafts: those before
        the first row with accepted ones.
        """
        return max(self.keep + count - self.depth, 0)

    @always_inline
    def count(self, request: Int) -> Int:
        """How many drafts are accepted: those before the first that was not drawn.
        """
        var first = request * (self.depth + 1)
        var count = 0
        while (
            count < self.depth
            and self.verified[unsafe_offset=first + count + 1]
            == self.drawn[unsafe_offset=first + count]
        ):
            count += 1
        return count

    @always_inline
    def token(self, request: Int, place: Int) -> Int64:
        """The token at `place` of the window followed by what was drawn."""
        if place <= self.keep:
            return self.window[unsafe_offset=request * (self.keep + 1) + place]
        return self.drawn[
            unsafe_offset=request * (self.depth + 1) + place - self.keep - 1
        ]

    @always_inline
    def state(self, request: Int, place: Int) -> Elements[Self.dtype]:
        """Where the hidden state at `place` stands before the cycle is over."""
        if place < self.keep:
            return self.kept.unsafe_offset(
                (request * self.keep + place) * self.hidden_size
            )
        return self.hidden.unsafe_offset(
            (request * (self.depth + 1) + place - self.keep) * self.hidden_size
        )

    @always_inline
    def store_row(self, request: Int, row: Int, count: Int):
        """The small results of one row and of one verified token, where `count` drafts are accepted.
        """
        var at = request * self.rows() + row
        var place = self.first(count) + row
        self.tokens[unsafe_offset=at] = self.token(request, place + 1)
        # A row's token at the next depth is that of the row after it; of the last row it is drafted.
        var is_last = place == self.keep + count
        self.following[unsafe_offset=at] = Int64(
            self.requests * self.rows() + request if is_last else at + 1
        )
        if is_last:
            self.last_rows[unsafe_offset=request] = Int64(at)
        var to = request * (self.depth + 2) + row
        self.summary[unsafe_offset=to] = self.token(
            request, self.keep + row + 1
        )
        if row == self.depth:
            self.summary[unsafe_offset=to + 1] = Int64(count)
            self.lengths[unsafe_offset=request] = self.cache_lengths[
                unsafe_offset=request
            ] - UInt32(self.keep - self.first(count))

    @always_inline
    def store_window(self, request: Int, place: Int, token: Int64):
        """A token of the next cycle's window."""
        self.window[unsafe_offset=request * (self.keep + 1) + place] = token
        if place == self.keep:
            self.verified[unsafe_offset=request * (self.depth + 1)] = token

    @always_inline
    def move_states[width: Int](self, request: Int, count: Int, column: Int):
        """`width` columns of the rows' hidden states, and of those to keep.

        A state to keep lies behind the place that it goes to, so that none is overwritten before it is read.
        """
        var first = self.first(count)
        for row in range(self.rows()):
            var to = (request * self.rows() + row) * self.hidden_size + column
            self.previous.unsafe_offset(to).unsafe_store(
                self.state(request, first + row)
                .unsafe_offset(column)
                .unsafe_load[width=width]()
            )
        for place in range(self.keep):
            var to = (request * self.keep + place) * self.hidden_size + column
            self.kept.unsafe_offset(to).unsafe_store(
                self.state(request, count + 1 + place)
                .unsafe_offset(column)
                .unsafe_load[width=width]()
            )
