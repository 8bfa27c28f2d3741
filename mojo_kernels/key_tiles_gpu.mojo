"""Keys and values on their way through shared memory, on NVIDIA: copied tile by tile, read as operands of `mma`.

A row of 128 elements is 16 chunks of 16 bytes; chunk `c` of row `r` lies at place `c ^ (r % 8)`, so that eight rows' same
chunks, which a matrix of `ldmatrix` is, hit all banks.
"""

from max.gpu import thread_idx
from max.gpu.memory import external_memory
from std.sys._assembly import inlined_assembly
from std.sys.intrinsics import _RegisterPackType

from .heads import PagedCache
from .operands import Elements

comptime HEAD_DIM = 128
"""The size of heads that the tiles are made for."""

comptime KEYS = 64
"""Keys of a tile; a page of the cache holds whole tiles."""

comptime CHUNKS = HEAD_DIM // 8
"""Pieces of 16 bytes of a head."""

comptime TILE_ELEMENTS = KEYS * HEAD_DIM

comptime SharedTile = Pointer[
    BFloat16, MutUntrackedOrigin, address_space=AddressSpace.SHARED
]


@fieldwise_init
struct KeyRange(ImplicitlyCopyable):
    """What of one request's cache is read, for one head: the keys `begin` to `end`, and nothing else.
    """

    var cache: PagedCache[DType.bfloat16]
    var request: Int
    var key_head: Int
    var begin: Int
    var end: Int


struct KeyTiles[THREADS: Int](ImplicitlyCopyable):
    """Two tiles that the block's threads copy by turns, each tile's keys and then its values. With a third, the streaming
    kernels behind attention were slower, by a tenth of a step at batch 8, for want of first-level cache.
    """

    comptime BYTES = 2 * 2 * TILE_ELEMENTS * 2

    var base: SharedTile

    @always_inline
    def __init__(out self):
        self.base = external_memory[
            BFloat16, address_space=AddressSpace.SHARED, alignment=128
        ]()

    @always_inline
    def keys(self, tile: Int) -> SharedTile:
        """Where the keys of the `tile`-th tile lie."""
        return self.base.unsafe_offset(tile % 2 * (2 * TILE_ELEMENTS))

    @always_inline
    def values(self, tile: Int) -> SharedTile:
        return self.keys(tile).unsafe_offset(TILE_ELEMENTS)

    @always_inline
    def copy(self, of: KeyRange, tile: Int, position: Int, held: Int):
        """Starts the copy of the keys from `position` on; those outside the range become zero, since what lies there may
        be anything, and a weight of zero does not hide a NaN. Those of the range from `held` on are left out: the block
        writes them to the tile itself.
        """
        var rows = of.cache.keys(of.request, position).unsafe_offset(
            of.key_head * HEAD_DIM
        )
        comptime for i in range(TILE_ELEMENTS // 8 // Self.THREADS):
            var piece = Int(thread_idx.x) + i * Self.THREADS
            var key = piece // CHUNKS
            var chunk = piece % CHUNKS
            var at = position + key
            var size = Int32(16) if at >= of.begin and at < of.end else Int32(0)
            var source = rows.unsafe_offset(key * of.cache.row_size + chunk * 8)
            var to = chunk_offset(key, chunk)
            if at < held or at >= of.end:
                copy_piece(self.keys(tile).unsafe_offset(to), source, size)
                copy_piece(
                    self.values(tile).unsafe_offset(to),
                    source.unsafe_offset(of.cache.value_offset),
                    size,
                )

    @always_inline
    def commit(self):
        """Ends a tile's copies."""
        inlined_assembly[
            "cp.async.commit_group;", NoneType, constraints="~{memory}"
        ]()

    @always_inline
    def wait(self):
        """Waits until all copies of this thread are done."""
        inlined_assembly[
            "cp.async.wait_group 0;", NoneType, constraints="~{memory}"
        ]()


@always_inline
def chunk_offset(row: Int, chunk: Int) -> Int:
    """Where a chunk of a row lies in its tile."""
    return row * HEAD_DIM + (chunk ^ (row % 8)) * 8


@always_inline
def copy_piece(to: SharedTile, source: Elements[DType.bfloat16], size: Int32):
    """Starts the copy of 16 bytes, of which only the first `size` are read and the others become zero.
    """
    inlined_assembly[
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
        NoneType,
        constraints="r,l,r,~{memory}",
    ](Int32(Int(to)), Int(source), size)


@always_inline
def load_matrices[transpose: Bool](source: SharedTile) -> SIMD[DType.uint32, 4]:
    """A warp loads four 8 x 8 matrices; lane `8 i + r` names the place of row `r` of matrix `i`.
    """
    comptime form = ".trans" if transpose else ""
    var words = inlined_assembly[
        "ldmatrix.sync.aligned.m8n8.x4"
        + form
        + ".shared.b16 {$0, $1, $2, $3}, [$4];",
        _RegisterPackType[UInt32, UInt32, UInt32, UInt32],
        constraints="=r,=r,=r,=r,r,~{memory}",
        has_side_effect=True,
    ](Int32(Int(source)))
    return SIMD[DType.uint32, 4](words[0], words[1], words[2], words[3])
