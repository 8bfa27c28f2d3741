"""Multiplies few tokens with rows of weights at the speed of memory, on NVIDIA tensor cores.

A block takes 16 rows of weights at a time and its warps share their depth. A lane reads 16 bytes of two of the rows
straight into the registers in which `mma.m16n8k16` expects them: which lane holds which part of the depth does not
matter to a sum, as long as the tokens' values are read in the same order. Eight tokens cost the tensor cores what one
does, so that weights are read once for up to `8 * tiles` tokens, and loads of the following rows are in flight all the
time. The tokens' values are read through the first-level cache, which the weights bypass.
"""

from max.gpu import barrier, lane_id, thread_idx, warp_id
from max.gpu.primitives import warp
from std.bit import pop_count
from std.math import ceildiv
from std.memory import bitcast, unsafe_stack_allocation
from std.sys._assembly import inlined_assembly
from std.sys.intrinsics import _RegisterPackType

from .operands import Elements, Ids

comptime LANES = 32
"""Lanes of an NVIDIA warp."""

comptime TILE_ROWS = 16
"""Weight rows of a block: lanes `4 g .. 4 g + 3` hold rows `g` and `g + 8`."""

comptime TILE_TOKENS = 8
"""Tokens of a tile: a lane reads the values of token `lane / 4`, and gets the sums of `2 (lane % 4)` and the next."""

comptime CHUNK = 64
"""Depth that a warp takes at a time: a cache line of every row."""

comptime MAX_EXPERTS = 512
"""Experts in a block's list of those that have tokens."""

comptime BFloats = Elements[DType.bfloat16]

comptime Piece = SIMD[DType.uint32, 4]
"""Eight neighbouring bfloat16 of a row."""

comptime TileSums = SIMD[DType.float32, 4]
"""A lane's sums: row `g` with its two tokens, row `g + 8` with them."""

comptime SharedFloats = Pointer[
    Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]
comptime SharedIds = Pointer[
    Int32, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]


@always_inline
def stream_piece(source: BFloats) -> Piece:
    """Reads weights: kept out of the first-level cache, which is for the tokens.

    Not `ld.global.nc`: the assembler moves such reads behind the wait for the preceding kernel, which they are to precede.
    """
    var words = inlined_assembly[
        "ld.global.L1::no_allocate.L2::128B.v4.u32 {$0, $1, $2, $3}, [$4];",
        _RegisterPackType[UInt32, UInt32, UInt32, UInt32],
        constraints="=r,=r,=r,=r,l",
        has_side_effect=True,
    ](source)
    return Piece(words[0], words[1], words[2], words[3])


@always_inline
def token_piece(source: BFloats) -> Piece:
    """Reads values of a token."""
    return bitcast[DType.uint32, 4](source.unsafe_load[width=8, alignment=16]())


@always_inline
def multiply_add(
    low: SIMD[DType.uint32, 2],
    high: SIMD[DType.uint32, 2],
    tokens: SIMD[DType.uint32, 2],
    sums: TileSums,
) -> TileSums:
    """Adds the products of 16 rows with 8 tokens over a depth of 16."""
    var out = inlined_assembly[
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2,"
            " $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        ),
        _RegisterPackType[Float32, Float32, Float32, Float32],
        constraints="=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effect=False,
    ](
        low[0],
        high[0],
        low[1],
        high[1],
        tokens[0],
        tokens[1],
        sums[0],
        sums[1],
        sums[2],
        sums[3],
    )
    return TileSums(out[0], out[1], out[2], out[3])


@always_inline
def divide(number: Int, by: Int) -> Tuple[Int, Int]:
    """Quotient and remainder of numbers below 2^32: 64-bit division is a long sequence of instructions.
    """
    var quotient = Int(UInt32(number) // UInt32(by))
    return quotient, number - quotient * by


@fieldwise_init
struct RowPair(ImplicitlyCopyable):
    """A lane's place in its two rows of a block's 16."""

    var low: BFloats
    var high: BFloats
    var depth: Int
    """Length of the rows; 0: nothing to read."""


@always_inline
def lane_row() -> Int:
    """Row `g` of a lane, which is also the token that it reads."""
    return Int(lane_id()) // 4


@always_inline
def lane_column() -> Int:
    """A lane's first element in a row."""
    return Int(lane_id()) % 4 * 8


trait TokenRows(ImplicitlyCopyable):
    """Where the tokens' values are. A slot is a position in the list of (token, expert) assignments.
    """

    def row(self, slot: Int) -> BFloats:
        """The values of a slot's token."""
        ...


@fieldwise_init
struct ListedRows(TokenRows):
    """One row after the other."""

    var x: BFloats
    var depth: Int

    @always_inline
    def row(self, slot: Int) -> BFloats:
        return self.x.unsafe_offset(slot * self.depth)


@fieldwise_init
struct GatheredRows(TokenRows):
    """The row of the token of assignment `rows[slot] = t * top_k + k`."""

    var x: BFloats
    var rows: Ids
    var top_k: Int
    var depth: Int

    @always_inline
    def row(self, slot: Int) -> BFloats:
        var token = Int(self.rows[unsafe_offset=slot]) // self.top_k
        return self.x.unsafe_offset(token * self.depth)


struct Stream[warps: Int, stages: Int](Movable):
    """Weights on their way: every warp's next `stages` chunks of 16 rows.

    Parameters:
        warps: Warps of the block, which take chunks by turns.
        stages: Chunks that a warp has in flight; 16 registers each.
    """

    var pieces: Array[Piece, 4 * Self.stages]

    @always_inline
    def __init__(out self, rows: RowPair):
        self.pieces = Array[Piece, 4 * Self.stages](fill=0)
        comptime for s in range(Self.stages):
            self.load[s](rows, s)

    @always_inline
    def chunk(self, step: Int) -> Int:
        """Where the warp's chunk of a step begins."""
        return (step * Self.warps + Int(warp_id())) * CHUNK

    @always_inline
    def load[stage: Int](mut self, rows: RowPair, step: Int):
        """Requests a chunk."""
        var k = self.chunk(step)
        if k < rows.depth:
            comptime for half in range(2):
                comptime at = 4 * stage + 2 * half
                self.pieces[at] = stream_piece(
                    rows.low.unsafe_offset(k + half * CHUNK // 2)
                )
                self.pieces[at + 1] = stream_piece(
                    rows.high.unsafe_offset(k + half * CHUNK // 2)
                )

    @always_inline
    def multiply[
        tiles: Int
    ](
        mut self,
        rows: RowPair,
        next: RowPair,
        x: Array[BFloats, tiles],
        tokens: Int,
    ) -> Array[TileSums, tiles]:
        """Multiplies the rows with up to `8 * tiles` tokens and requests the beginning of the next rows.

        Parameters:
            tiles: Number of tiles of tokens.

        Args:
            rows: The rows, whose beginning has been requested.
            next: The rows after them.
            x: The lane's token of every tile.
            tokens: Number of tokens.
        """
        var sums = Array[TileSums, tiles](fill=0)
        var rounds = ceildiv(rows.depth, CHUNK * Self.warps * Self.stages)
        for r in range(rounds):
            var last = r + 1 == rounds
            var following = rows
            var following_step = (r + 1) * Self.stages
            if last:
                following = next
                following_step = 0
            comptime for s in range(Self.stages):
                var k = self.chunk(r * Self.stages + s)
                if k < rows.depth:
                    comptime for i in range(tiles):
                        var values = Array[Piece, 2](fill=0)
                        if lane_row() + i * TILE_TOKENS < tokens:
                            comptime for half in range(2):
                                values[half] = token_piece(
                                    x[i].unsafe_offset(k + half * CHUNK // 2)
                                )
                        comptime for half in range(2):
                            comptime at = 4 * s + 2 * half
                            comptime for q in range(2):
                                sums[i] = multiply_add(
                                    self.pieces[at].slice[2, offset=2 * q](),
                                    self.pieces[at + 1].slice[
                                        2, offset=2 * q
                                    ](),
                                    values[half].slice[2, offset=2 * q](),
                                    sums[i],
                                )
                self.load[s](following, following_step + s)
        return sums^


struct Partials[warps: Int, tiles: Int](Movable):
    """The warps' shares of the sums, in shared memory, twice: what one pass wrote is read while the next one multiplies.
    """

    var data: SharedFloats
    var parity: Int

    @always_inline
    def __init__(out self):
        self.data = unsafe_stack_allocation[
            2 * Self.warps * Self.tiles * LANES * 4,
            Float32,
            alignment=16,
            address_space=AddressSpace.SHARED,
        ]()
        self.parity = 0

    @always_inline
    def place(self, warp: Int, tile: Int) -> SharedFloats:
        var at = (self.parity * Self.warps + warp) * Self.tiles + tile
        return self.data.unsafe_offset((at * LANES + Int(lane_id())) * 4)

    @always_inline
    def exchange[used: Int](mut self, sums: Array[TileSums, used]):
        """Publishes the warp's share and waits for the others'."""
        self.parity = 1 - self.parity
        comptime for i in range(used):
            self.place(Int(warp_id()), i).unsafe_store[alignment=16](sums[i])
        barrier()

    @always_inline
    def total(self, tile: Int) -> TileSums:
        """A lane's sums over all warps, in order."""
        var sums = TileSums(0)
        comptime for w in range(Self.warps):
            sums += self.place(w, tile).unsafe_load[width=4, alignment=16]()
        return sums


@always_inline
def multiply_pass[
    Rows: TokenRows, warps: Int, stages: Int, tiles: Int
](
    mut stream: Stream[warps, stages],
    mut partials: Partials[warps, tiles],
    rows: RowPair,
    next: RowPair,
    x: Rows,
    slot: Int,
    tokens: Int,
):
    """Multiplies rows with the `tokens <= 8 * tiles` tokens from `slot` on, in as few tiles as they need.
    """
    comptime if tiles >= 4:
        if tokens > 2 * TILE_TOKENS:
            return _multiply_tiles[used=4](
                stream, partials, rows, next, x, slot, tokens
            )
    comptime if tiles >= 2:
        if tokens > TILE_TOKENS:
            return _multiply_tiles[used=2](
                stream, partials, rows, next, x, slot, tokens
            )
    _multiply_tiles[used=1](stream, partials, rows, next, x, slot, tokens)


@always_inline
def _multiply_tiles[
    Rows: TokenRows, warps: Int, stages: Int, tiles: Int, //, used: Int
](
    mut stream: Stream[warps, stages],
    mut partials: Partials[warps, tiles],
    rows: RowPair,
    next: RowPair,
    x: Rows,
    slot: Int,
    tokens: Int,
):
    var places = Array[BFloats, used](fill=x.row(slot))
    comptime for i in range(used):
        var token = min(lane_row() + i * TILE_TOKENS, tokens - 1)
        places[i] = x.row(slot + token).unsafe_offset(lane_column())
    partials.exchange(stream.multiply(rows, next, places, tokens))


struct HitList(ImplicitlyCopyable):
    """The experts that have tokens, and their first slots with the end behind, in shared memory.
    """

    var experts: SharedIds
    var begins: SharedIds

    @always_inline
    def __init__(out self):
        self.experts = unsafe_stack_allocation[
            MAX_EXPERTS, Int32, address_space=AddressSpace.SHARED
        ]()
        self.begins = unsafe_stack_allocation[
            MAX_EXPERTS + 2, Int32, address_space=AddressSpace.SHARED
        ]()

    @always_inline
    def fill(self, offsets: Ids, experts: Int):
        """Lists the experts; ends with a barrier."""
        if warp_id() == 0:
            # All loads before the first use: the block has nothing else to do meanwhile.
            comptime BATCH = 10
            var lane = Int(lane_id())
            var count = 0
            for base in range(0, experts, BATCH * LANES):
                var begins = Array[Int32, BATCH](fill=0)
                var ends = Array[Int32, BATCH](fill=0)
                comptime for i in range(BATCH):
                    var e = base + i * LANES + lane
                    if e < experts:
                        begins[i] = offsets[unsafe_offset=e]
                        ends[i] = offsets[unsafe_offset=e + 1]
                comptime for i in range(BATCH):
                    var hit = begins[i] != ends[i]
                    var mask = warp.vote[DType.uint32](hit)
                    var before = mask & ((UInt32(1) << UInt32(lane)) - 1)
                    var at = count + Int(pop_count(before))
                    if hit:
                        self.experts[unsafe_offset=at] = Int32(
                            base + i * LANES + lane
                        )
                        self.begins[unsafe_offset=at] = begins[i]
                        self.begins[unsafe_offset=at + 1] = ends[i]
                    count += Int(pop_count(mask))
            if lane == 0:
                self.begins[unsafe_offset=MAX_EXPERTS + 1] = Int32(count)
                # Where no expert is hit, its first rows are still requested.
                if count == 0:
                    self.experts[unsafe_offset=0] = 0
        barrier()

    @always_inline
    def fill_one(self, tokens: Int):
        """Lists one expert that has every token; ends with a barrier."""
        if thread_idx.x == 0:
            self.experts[unsafe_offset=0] = 0
            self.begins[unsafe_offset=0] = 0
            self.begins[unsafe_offset=1] = Int32(tokens)
            self.begins[unsafe_offset=MAX_EXPERTS + 1] = 1
        barrier()

    @always_inline
    def count(self) -> Int:
        return Int(self.begins[unsafe_offset=MAX_EXPERTS + 1])

    @always_inline
    def expert(self, hit: Int) -> Int:
        return Int(self.experts[unsafe_offset=hit])

    @always_inline
    def begin(self, hit: Int) -> Int:
        """The first slot of a hit expert, which is the end of the one before.
        """
        return Int(self.begins[unsafe_offset=hit])
