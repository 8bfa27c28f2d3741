"""Memory of every GPU that all GPUs read, and how one lets the others know that its own holds something new.

A GPU writes its own mailbox, then raises its flag in everybody's; whoever reads first waits for everybody's flags in
its own. Flags count: a round is one more than the last, on every GPU alike. There are two flags a GPU, for the tokens
that go to the experts and for the sums that come back. Between two rounds of the one lies one of the other, so that
nothing is overwritten that somebody may still read: who has seen all flags of this round knows that all have ended
reading the round before.
"""

from max.gpu import barrier, block_idx, grid_dim, thread_idx
from std.atomic import Atomic, Ordering
from std.builtin.device_passable import DevicePassable, DeviceTypeEncoder
from std.sys import size_of

from extensibility import InputTensor
from std.utils.static_tuple import StaticTuple

from .operands import Elements, Floats, Ids, expect_size

comptime MAX_DEVICES = 8

comptime HEADER_BYTES = 256
"""Before everything else: rounds, arrivals and flags, each int32."""

comptime WIDTH = 8
"""Elements that a thread moves at a time: 16 bytes of 16-bit ones."""

comptime BLOCKS = 512
"""Most blocks of a kernel that moves rows, each of which takes row after row."""

comptime THREADS = 256

comptime Bytes = Elements[DType.uint8]

comptime Bounds = StaticTuple[Int32, MAX_DEVICES + 1]
"""Where every GPU's tokens begin among all, and the end."""

comptime TOKENS = 0
"""The flags of the tokens that go to the experts."""

comptime SUMS = 1
"""The flags of the experts' sums."""


@always_inline
def owner_of(row: Int, bounds: Bounds, not_before: Int) -> Int:
    """The GPU whose token a row is; it does not lie before `not_before`."""
    var owner = not_before
    while row >= Int(bounds[owner + 1]):
        owner += 1
    return owner


@always_inline
def any_here(chosen: Ids, top_k: Int, first: Int32, end: Int32) -> Bool:
    """Whether one of a token's experts is among `first` to `end`."""
    var found = False
    for k in range(top_k):
        var id = chosen[unsafe_offset=k]
        found |= id >= first and id < end
    return found


@fieldwise_init
struct Mailboxes[dtype: DType](DevicePassable, TrivialRegisterPassable):
    """All GPUs' mailboxes, as this GPU sees them.

    Behind the header lie, for `capacity` tokens, their experts `[capacity, top_k]` int32, the weights of these, float32,
    the tokens' hidden states `[capacity, hidden_size]`, and for every GPU's tokens the experts' sums `[devices,
    capacity, hidden_size]`.
    """

    var bases: StaticTuple[Bytes, MAX_DEVICES]
    var devices: Int
    var device: Int
    """This GPU's."""

    var capacity: Int
    var top_k: Int
    var hidden_size: Int

    comptime device_type: AnyType = Self

    def _to_device_type(
        self, mut encoder: Some[DeviceTypeEncoder], target: MutOpaquePointer[_]
    ):
        encoder.encode(self, target)

    @staticmethod
    def get_type_name() -> String:
        return "Mailboxes"

    @staticmethod
    def num_bytes(
        capacity: Int, devices: Int, top_k: Int, hidden_size: Int
    ) -> Int:
        """Size of one mailbox."""
        var row = hidden_size * size_of[Scalar[Self.dtype]]()
        return HEADER_BYTES + capacity * (8 * top_k + (1 + devices) * row)

    @always_inline
    def ids(self, device: Int, token: Int) -> Ids:
        """The experts of a token of a GPU."""
        return (
            self.bases[device]
            .unsafe_offset(HEADER_BYTES)
            .unsafe_bitcast[Int32]()
            .unsafe_offset(token * self.top_k)
        )

    @always_inline
    def weights(self, device: Int, token: Int) -> Floats:
        """The weights of a token's experts."""
        return (
            self.ids(device, self.capacity)
            .unsafe_bitcast[Float32]()
            .unsafe_offset(token * self.top_k)
        )

    @always_inline
    def hidden(self, device: Int, token: Int) -> Elements[Self.dtype]:
        """A token's hidden state."""
        return (
            self.weights(device, self.capacity)
            .unsafe_bitcast[Scalar[Self.dtype]]()
            .unsafe_offset(token * self.hidden_size)
        )

    @always_inline
    def sums(self, device: Int, owner: Int, token: Int) -> Elements[Self.dtype]:
        """What the experts of a GPU add up to for a token of another, its owner.
        """
        return self.hidden(device, (1 + owner) * self.capacity + token)

    @always_inline
    def _round(self, kind: Int) -> Ids:
        """This GPU's rounds so far."""
        return (
            self.bases[self.device].unsafe_bitcast[Int32]().unsafe_offset(kind)
        )

    @always_inline
    def _arrivals(self, kind: Int) -> Ids:
        """Blocks of this GPU that have written their part of this round."""
        return self._round(2 + kind)

    @always_inline
    def _flag(self, to: Int, of: Int, kind: Int) -> Ids:
        """A GPU's flag in the mailbox of another: the rounds that it has completed.
        """
        return (
            self.bases[to]
            .unsafe_bitcast[Int32]()
            .unsafe_offset((1 + kind) * MAX_DEVICES + of)
        )

    @always_inline
    def announce(self, kind: Int):
        """Raises this GPU's flags once all blocks have come here; what they wrote before is then seen by all.
        """
        barrier()
        if thread_idx.x != 0:
            return
        var arrivals = self._arrivals(kind)
        var before = Atomic[Int32].fetch_add[ordering=Ordering.ACQUIRE_RELEASE](
            arrivals, 1
        )
        if Int(before) != Int(grid_dim.x) - 1:
            return
        arrivals[unsafe_offset=0] = 0
        var round = self._round(kind)[unsafe_offset=0] + 1
        self._round(kind)[unsafe_offset=0] = round
        for device in range(self.devices):
            Atomic[Int32].store[ordering=Ordering.RELEASE](
                self._flag(device, self.device, kind), round
            )

    @always_inline
    def await_all(self, kind: Int):
        """Waits until every GPU has announced this GPU's last round."""
        var device = Int(thread_idx.x)
        if device < self.devices:
            var round = self._round(kind)[unsafe_offset=0]
            var flag = self._flag(self.device, device, kind)
            # A difference, since rounds may wrap around.
            while (
                Atomic[Int32].load[ordering=Ordering.ACQUIRE](flag) - round < 0
            ):
                pass
        barrier()


def mailboxes[
    dtype: DType
](
    op: StaticString,
    num_bytes: Int,
    addresses: InputTensor[dtype=DType.int64, rank=1, ...],
    device: Int,
    tokens: Int,
    top_k: Int,
    hidden_size: Int,
) raises -> Mailboxes[dtype]:
    """The mailboxes at these addresses, which are on the host.

    Raises:
        They are not of `num_bytes` for a whole number of tokens, or have no room for a GPU's `tokens`.
    """
    var devices = addresses.dim_size(0)
    var token_bytes = (
        Mailboxes[dtype].num_bytes(1, devices, top_k, hidden_size)
        - HEADER_BYTES
    )
    var capacity = (num_bytes - HEADER_BYTES) // token_bytes
    expect_size(
        op,
        "mailbox[bytes]",
        num_bytes,
        Mailboxes[dtype].num_bytes(capacity, devices, top_k, hidden_size),
    )
    if devices > MAX_DEVICES or hidden_size % WIDTH != 0 or capacity % 4 != 0:
        raise Error(
            op,
            ": found ",
            devices,
            " GPUs, a hidden size of ",
            hidden_size,
            " and room for ",
            capacity,
            " tokens; expected at most ",
            MAX_DEVICES,
            ", a multiple of ",
            WIDTH,
            " and a multiple of 4",
        )
    if tokens > capacity:
        raise Error(
            op,
            ": found ",
            tokens,
            " tokens of one GPU, expected at most the ",
            capacity,
            " that its mailbox has room for. Lower --max-batch-input-tokens.",
        )
    var bases = StaticTuple[Bytes, MAX_DEVICES](
        fill=Bytes(unsafe_from_address=Int(addresses[0]))
    )
    for i in range(devices):
        bases[i] = Bytes(unsafe_from_address=Int(addresses[i]))
    return {bases, devices, device, capacity, top_k, hidden_size}


def row_bounds(
    op: StaticString,
    bounds: InputTensor[dtype=DType.int64, rank=1, ...],
    devices: Int,
) raises -> Bounds:
    """Where every GPU's tokens begin; the bounds are on the host."""
    expect_size(op, "row_bounds[N + 1]", bounds.dim_size(0), devices + 1)
    var result = Bounds(fill=Int32(bounds[devices]))
    for i in range(devices):
        result[i] = Int32(bounds[i])
    return result
