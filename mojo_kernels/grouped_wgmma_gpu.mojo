"""The grouped product on Hopper's tensor cores: persistent blocks, one warp loads, two warp groups multiply.

Weights are the left operand of WGMMA and tokens the right one, so that an expert with few tokens costs few columns. The
blocks of a cluster take neighbouring weight rows of one expert and share its tokens, which each brings in part to all.
"""

from layout import Coord, TileTensor, row_major
from layout.tma_async import TMATensorTile, create_tma_tile
from max.gpu import (
    MAX_THREADS_PER_BLOCK_METADATA,
    barrier,
    block_idx,
    grid_dim,
    thread_idx,
)
from max.gpu.host import DeviceBuffer, DeviceContext, Dim, FuncAttribute
from max.gpu.host.nvidia.tma import (
    TensorMapL2Promotion,
    TensorMapSwizzle,
    create_tma_descriptor,
)
from max.gpu.primitives.cluster import cluster_sync, elect_one_sync
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.sys import size_of
from std.sys._assembly import inlined_assembly
from std.utils.index import IndexList
from std.utils.static_tuple import StaticTuple

from .dense_maps_gpu import NoMap, WeightMaps
from .dense_output_gpu import DenseOutput
from .dense_ring_gpu import (
    BF16,
    DenseRing,
    LOADER,
    SWIZZLE,
    THREADS,
)
from .dense_store_gpu import (
    STAGING_BYTES,
    ThreadStore,
    TileStore,
    TokenRange,
    multiply_tile,
    staging_of,
)
from .grouped_config_gpu import TileConfig
from .grouped_load_gpu import (
    BlockTiles,
    GroupedWeights,
    feed_tokens,
    load_both,
    load_weights,
)
from .grouped_store_gpu import CopyStore, STORED_TOKENS
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .grouped_tokens_gpu import GroupedTokens
from .operands import Elements, Ids, elements

comptime PROMOTION = TensorMapL2Promotion.L2_256B
"""What the cache fetches of weight rows at once; a stage takes 128 bytes of every row."""

comptime CLUSTERS_OF_FOUR = 32
"""Clusters of four blocks that run at once, one block a multiprocessor: those of a cluster lie in one of the processor's
parts, whose multiprocessors are no multiple of four in all. A cluster more would run after all others."""


comptime FINE = 16
"""Columns between the widths from 192 on: 16, or 8, where a warp group multiplies all tokens."""


@always_inline
def widths[MAX_N: Int, STEP: Int]() -> List[Int]:
    """Numbers of columns for which the product is compiled; those from 192 on lie `STEP` apart.
    """
    comptime if MAX_N <= 64:
        return [16, 32, 64]
    elif MAX_N <= 128:
        return [32, 64, 96, 128]
    else:
        var all: List[Int] = [32, 64, 128, 160]
        for width in range(192, MAX_N + 1, STEP):
            all.append(width)
        return all^


@always_inline
def threads[T: GroupedTokens]() -> Int:
    """Threads of a block: those that multiply, and the warps that load."""
    return THREADS + T.FEEDERS * 32


@always_inline
def offset_places(experts: Int) -> Int:
    """Room for the offsets in shared memory, so that what follows is aligned.
    """
    return ceildiv(experts + 1, 8) * 8


@always_inline
def most_fed[T: GroupedTokens, CONFIG: TileConfig]() -> Int:
    """Most tokens of a tile that one warp brings, so many that the room for another's rows is aligned.
    """
    return ceildiv(CONFIG.width, CONFIG.sharers * T.FEEDERS * 8) * 8


@always_inline
def load_uncached(from_: Pointer[Int32, MutAnyOrigin]) -> Int32:
    """Reads what the cache of the multiprocessor may hold as it was before the preceding kernels.
    """
    return inlined_assembly[
        "ld.relaxed.gpu.global.b32 $0, [$1];",
        Int32,
        constraints="=r,l,~{memory}",
    ](from_)


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(threads[T]()))
)
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
@__llvm_arg_metadata(y, `nvvm.grid_constant`)
@__name(
    t"step3p5_grouped_{D.NAME}_{D.dtype}_{T.NAME}_{CONFIG.width}_{CONFIG.sharers}_{BOX_ROWS}"
)
def grouped_wgmma[
    D: DenseOutput,
    T: GroupedTokens,
    CONFIG: TileConfig,
    BOX_ROWS: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
    y_shape: Coord,
    y_desc: Coord,
](
    results: Pointer[Scalar[D.dtype], MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    tokens: T,
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
    y: TMATensorTile[BF16, y_shape, y_desc],
    experts: Int32,
    expert_rows: Int32,
    row_begin: Int32,
    features: Int32,
    depth: Int32,
    slot_begin: Int32,
    slot_end: Int32,
    limit: Float32,
):
    """All tiles of a grouped product; see `GroupedShape`."""
    comptime ROWS = TILE_M // D.TENSORS
    comptime MAX_N = CONFIG.width
    comptime SHARERS = CONFIG.sharers
    var output = D.of(elements(results), Int(features), limit)
    var ring = DenseRing[MAX_N, CONFIG.stages, SHARERS, CONFIG.lag]()
    comptime if SHARERS == 1:
        barrier()
    else:
        cluster_sync()
    comptime if not T.EARLY:
        wait_on_dependent_grids()
    var shared_offsets = ring.base.unsafe_offset(
        (ring.BYTES + CONFIG.stagings * STAGING_BYTES) // 2
    ).unsafe_bitcast[Int32]()
    for e in range(Int(thread_idx.x), Int(experts) + 1, threads[T]()):
        shared_offsets[unsafe_offset=e] = load_uncached(
            offsets.unsafe_offset(e)
        )
    barrier()
    var tiles = BlockTiles[MAX_N, SHARERS](
        TileWalk[MAX_N](
            shared_offsets,
            Int(experts),
            ceildiv(Int(features), SHARERS * ROWS),
            Int(slot_begin),
            Int(slot_end),
        ),
        Int(block_idx.x) // SHARERS,
        Int(grid_dim.x) // SHARERS,
        Int(block_idx.x) % SHARERS,
    )
    var steps = ceildiv(Int(depth), TILE_K)
    var warp = Int(thread_idx.x) // 32
    if warp >= LOADER:
        var weights = GroupedWeights[BOX_ROWS](
            WeightMaps[D.TENSORS](first, second, NoMap()),
            Int(expert_rows),
            Int(row_begin),
        )
        comptime if T.FEEDERS == 0:
            if elect_one_sync():
                load_both(ring, weights, x, tokens, tiles, steps)
        else:
            var feeder = warp - LOADER - 1
            if feeder >= 0:
                var rows = shared_offsets.unsafe_offset(
                    offset_places(Int(experts)) + feeder * most_fed[T, CONFIG]()
                )
                feed_tokens(ring, x, tokens, tiles, feeder, rows, steps)
            elif elect_one_sync():
                load_weights(ring, weights, tiles, steps)
        return
    wait_on_dependent_grids()
    launch_dependent_grids()
    var group = warp // 4
    var staging = staging_of(ring.base, ring.BYTES, group)
    comptime if CONFIG.stagings == 1:
        multiply_tiles[BOX_ROWS](
            output, ring, ThreadStore(staging), tiles, group, steps
        )
    else:
        var store = CopyStore[y_shape, y_desc](
            Pointer(to=y).unsafe_origin_cast[ImmUntrackedOrigin](), staging
        )
        multiply_tiles[BOX_ROWS](output, ring, store, tiles, group, steps)
        store.finish()


@always_inline
def multiply_tiles[
    D: DenseOutput,
    MAX_N: Int,
    SHARERS: Int,
    Store: TileStore,
    //,
    BOX_ROWS: Int,
](
    output: D,
    mut ring: DenseRing[MAX_N, _, SHARERS, _],
    store: Store,
    mut tiles: BlockTiles[MAX_N, SHARERS],
    group: Int,
    steps: Int,
):
    """A warp group's half of all of the block's tiles."""
    comptime WIDTHS = widths[MAX_N, FINE if BOX_ROWS == D.BOX_ROWS else 16]()
    while tiles.find():
        var walk = tiles.walk
        comptime for v in range(len(WIDTHS)):
            comptime N = WIDTHS[v]
            comptime LESS = WIDTHS[v - 1] if v > 0 else 0
            if walk.tokens > LESS and walk.tokens <= N:
                multiply_tile[N, BOX_ROWS](
                    output,
                    TokenRange(walk.slot, walk.slot + walk.tokens),
                    ring,
                    steps,
                    store,
                    group,
                    tiles.row(TILE_M // D.TENSORS),
                )


@always_inline
def clusters[SHARERS: Int](ctx: DeviceContext) -> Int:
    """Clusters that run at once."""
    var count = ctx.default_device_info.sm_count // SHARERS
    comptime if SHARERS == 4:
        count = min(count, CLUSTERS_OF_FOUR)
    return count


@fieldwise_init
struct GroupedShape(ImplicitlyCopyable):
    """Sizes of a grouped product: `results[.., features]` from `features` rows of every expert's weights.
    """

    var experts: Int
    var expert_rows: Int
    """Rows of an expert in each weight tensor."""
    var row_begin: Int
    """The first of them to multiply."""
    var features: Int
    """How many of them to multiply."""
    var depth: Int
    """Length of the dot products, a multiple of 8."""
    var slot_begin: Int
    """The first of the sorted assignments to take."""
    var slot_end: Int
    """The end of those to take."""


def launch_grouped_wgmma[
    D: DenseOutput,
    T: GroupedTokens,
    //,
    CONFIG: TileConfig,
    BOX_ROWS: Int,
](
    output: D,
    offsets: Ids,
    first: Elements[BF16],
    second: Elements[BF16],
    x: Elements[BF16],
    x_rows: Int,
    tokens: T,
    shape: GroupedShape,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `grouped_wgmma` on all multiprocessors.

    Parameters:
        D: What becomes of the sums.
        T: Where the tokens are.
        CONFIG: The kernel's sizes.
        BOX_ROWS: Rows of a weight tensor that one copy brings: all of a tile, or `D.BOX_ROWS`.

    Args:
        output: The results, in order of expert.
        offsets: First assignment of every expert, and the end.
        first: Weights `[E * expert_rows, depth]`.
        second: As `first`; the other tensor if `D` takes two.
        x: Tokens `[x_rows, depth]`.
        x_rows: Number of their rows.
        tokens: Which of them an assignment takes.
        shape: The sizes.
        limit: Bounds an activation.
        ctx: The device.
    """
    comptime Ring = DenseRing[
        CONFIG.width, CONFIG.stages, CONFIG.sharers, CONFIG.lag
    ]
    comptime BYTES = Ring.BYTES + CONFIG.stagings * STAGING_BYTES
    comptime assert (T.FEEDERS == 0) == (T.BOX > 1)
    comptime assert CONFIG.stagings == 1 or D.dtype == BF16
    var places = offset_places(shape.experts)
    comptime if T.FEEDERS > 0:
        places += T.FEEDERS * most_fed[T, CONFIG]()
    var bytes = BYTES + places * size_of[DType.int32]()
    var weight_rows = shape.experts * shape.expert_rows
    var first_tma = create_tma_tile[BOX_ROWS, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(first, row_major(Coord(weight_rows, shape.depth)))
    )

    def promoted(
        weights: Elements[BF16], out map: type_of(first_tma)
    ) raises {imm}:
        map = first_tma
        map.descriptor = create_tma_descriptor[BF16, 2, SWIZZLE, PROMOTION](
            DeviceBuffer[BF16](ctx, weights, 1, owning=False),
            IndexList[2](weight_rows, shape.depth),
            IndexList[2](shape.depth, 1),
            IndexList[2](BOX_ROWS, TILE_K),
        )

    var x_tma = create_tma_tile[T.BOX, TILE_K, swizzle_mode=SWIZZLE](
        ctx, TileTensor(x, row_major(Coord(x_rows, shape.depth)))
    )
    # Of the rows of results that a warp group has, in the swizzle in which it brings them in order.
    comptime WIDE = BOX_ROWS > 8
    var y_tma = create_tma_tile[
        STORED_TOKENS,
        64 if WIDE else 32,
        swizzle_mode=SWIZZLE if WIDE else TensorMapSwizzle.SWIZZLE_64B,
    ](
        ctx,
        TileTensor(
            rebind[Elements[BF16]](output.results()),
            row_major(Coord(shape.slot_end, output.features())),
        ),
    )
    comptime W = type_of(first_tma)
    comptime X = type_of(x_tma)
    comptime kernel = grouped_wgmma[
        D,
        T,
        CONFIG,
        BOX_ROWS,
        W.tile_shape,
        W.desc_shape,
        X.tile_shape,
        X.desc_shape,
        type_of(y_tma).tile_shape,
        type_of(y_tma).desc_shape,
    ]
    ctx.enqueue_function[kernel](
        output.results(),
        offsets,
        tokens,
        promoted(first),
        promoted(second),
        x_tma,
        y_tma,
        Int32(shape.experts),
        Int32(shape.expert_rows),
        Int32(shape.row_begin),
        Int32(shape.features),
        Int32(shape.depth),
        Int32(shape.slot_begin),
        Int32(shape.slot_end),
        limit,
        grid_dim=clusters[CONFIG.sharers](ctx) * CONFIG.sharers,
        block_dim=threads[T](),
        cluster_dim=Dim(CONFIG.sharers),
        shared_mem_bytes=bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(bytes)
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
