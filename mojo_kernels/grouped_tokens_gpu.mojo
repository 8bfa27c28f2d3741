"""Where a grouped product finds the tokens of its tiles: in order of expert, or row by row among all of them."""

from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder

from .operands import Ids


trait GroupedTokens(DevicePassable, TrivialRegisterPassable):
    """What distinguishes one order of tokens from another. A box is what one copy brings.
    """

    comptime NAME: StaticString
    """In the names of kernels."""

    comptime BOX: Int
    """Tokens of a box."""

    comptime FEEDERS: Int
    """Warps that bring nothing but tokens; where there are none, the warp that brings weights brings tokens too."""

    comptime EARLY: Bool
    """Whether the experts' offsets were complete when the preceding kernel began its work, so that this one may look at
    them before that one ends."""

    def row(self, slot: Int) -> Int:
        """The row of the token that an assignment takes; `slot` is its index in order of expert.
        """
        ...


@fieldwise_init
struct SortedTokens[TOKENS: Int](GroupedTokens):
    """Tokens in order of expert, `TOKENS` a box.

    The same op launched the preceding kernel, which brought them in order or found their places, and which waited for
    the offsets before it let this one begin.
    """

    comptime NAME: StaticString = "sorted"
    comptime BOX = Self.TOKENS
    comptime FEEDERS = 0
    comptime EARLY = True

    var begin: Int32
    """Assignment whose token is the first row."""

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "SortedTokens"

    @always_inline
    def row(self, slot: Int) -> Int:
        return slot - Int(self.begin)


@fieldwise_init
struct ChosenTokens[WARPS: Int](GroupedTokens):
    """Tokens in their own order, of which assignment `rows[s]` takes row `rows[s] // K`: a box is one token.

    A row of 128 bytes has its place in the swizzle by its address, wherever a copy begins.
    """

    comptime NAME: StaticString = "chosen"
    comptime BOX = 1
    comptime FEEDERS = Self.WARPS
    comptime EARLY = False

    var rows: Ids
    """Assignments grouped by expert."""
    var top_k: Int32
    """`K`."""

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "ChosenTokens"

    @always_inline
    def row(self, slot: Int) -> Int:
        return Int(self.rows[unsafe_offset=slot] // self.top_k)
