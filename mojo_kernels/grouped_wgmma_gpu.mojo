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
    lane_id,
    thread_idx,
)
from max.gpu.host import DeviceBuffer, DeviceContext, Dim, FuncAttribute
from max.gpu.host.nvidia.tma import TensorMapL2Promotion, create_tma_descriptor
from max.gpu.memory import CacheEviction
from max.gpu.primitives.cluster import cluster_sync
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.sys import size_of
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
    TokenRange,
    multiply_tile,
    staging_of,
)
from .grouped_tiles_gpu import TILE_K, TILE_M, TileWalk
from .operands import Elements, Ids, elements

comptime PROMOTION = TensorMapL2Promotion.L2_256B
"""What the cache fetches of weight rows at once; a stage takes 128 bytes of every row."""

comptime EVICTION = CacheEviction.EVICT_FIRST
"""An expert's weights are read once, or a few times soon after one another."""


@always_inline
def widths[MAX_N: Int]() -> List[Int]:
    """Numbers of columns for which the product is compiled."""
    comptime if MAX_N <= 64:
        return [16, 32, 64]
    elif MAX_N <= 128:
        return [32, 64, 96, 128]
    else:
        return [32, 64, 128, 160, 192, 208, 224, 240, 256]


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_arg_metadata(first, `nvvm.grid_constant`)
@__llvm_arg_metadata(second, `nvvm.grid_constant`)
@__llvm_arg_metadata(x, `nvvm.grid_constant`)
@__name(t"step3p5_grouped_{D.NAME}_{D.dtype}_{MAX_N}_{STAGES}_{SHARERS}_{BOX}")
def grouped_wgmma[
    D: DenseOutput,
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    BOX: Int,
    w_shape: Coord,
    w_desc: Coord,
    x_shape: Coord,
    x_desc: Coord,
](
    results: Pointer[Scalar[D.dtype], MutAnyOrigin],
    offsets: Pointer[Int32, MutAnyOrigin],
    first: TMATensorTile[BF16, w_shape, w_desc],
    second: TMATensorTile[BF16, w_shape, w_desc],
    x: TMATensorTile[BF16, x_shape, x_desc],
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
    var output = D.of(elements(results), Int(features), limit)
    var ring = DenseRing[MAX_N, STAGES, SHARERS]()
    var rank = Int(block_idx.x) % SHARERS
    comptime if SHARERS == 1:
        barrier()
    else:
        cluster_sync()
    wait_on_dependent_grids()
    launch_dependent_grids()
    var shared_offsets = ring.base.unsafe_offset(
        (ring.BYTES + STAGING_BYTES) // 2
    ).unsafe_bitcast[Int32]()
    for e in range(Int(thread_idx.x), Int(experts) + 1, THREADS):
        shared_offsets[unsafe_offset=e] = offsets[unsafe_offset=e]
    barrier()
    var walk = TileWalk[MAX_N](
        shared_offsets,
        Int(experts),
        ceildiv(Int(features), SHARERS * ROWS),
        Int(slot_begin),
        Int(slot_end),
    )
    var warp = Int(thread_idx.x) // 32
    var tile = Int(block_idx.x) // SHARERS
    var clusters = Int(grid_dim.x) // SHARERS
    if warp == LOADER:
        if lane_id() != 0:
            return
        var maps = WeightMaps[D.TENSORS](first, second, NoMap())
        while walk.find(tile):
            tile += clusters
            var boxes = ceildiv(walk.tokens, BOX)
            var row = (walk.row_tile * SHARERS + rank) * ROWS
            row += walk.expert * Int(expert_rows) + Int(row_begin)
            for k in range(0, Int(depth), TILE_K):
                ring.wait_empty()
                ring.expect(boxes * BOX)
                ring.load_tile[D.TENSORS, EVICTION](maps, 0, row, k)
                for box in range(rank, boxes, SHARERS):
                    ring.load_box[BOX](
                        x, box, walk.slot - Int(slot_begin) + box * BOX, k
                    )
                ring.step()
        comptime if SHARERS > 1:
            # The block must stay as long as another one may signal its barriers.
            comptime for _ in range(STAGES):
                ring.wait_empty()
                ring.step()
        return
    var group = warp // 4
    var staging = staging_of(ring.base, ring.BYTES, group)
    while walk.find(tile):
        tile += clusters
        var row = (walk.row_tile * SHARERS + rank) * ROWS
        comptime for v in range(len(widths[MAX_N]())):
            comptime N = widths[MAX_N]()[v]
            comptime LESS = widths[MAX_N]()[v - 1] if v > 0 else 0
            if walk.tokens > LESS and walk.tokens <= N:
                multiply_tile[N](
                    output,
                    TokenRange(walk.slot, walk.slot + walk.tokens),
                    ring,
                    ceildiv(Int(depth), TILE_K),
                    staging,
                    group,
                    row,
                )


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
    """The first of the sorted assignments to take; the matrix of tokens begins with it."""
    var slot_end: Int
    """The end of those to take."""


def launch_grouped_wgmma[
    D: DenseOutput,
    MAX_N: Int,
    STAGES: Int,
    SHARERS: Int,
    BOX: Int,
](
    output: D,
    offsets: Ids,
    first: Elements[BF16],
    second: Elements[BF16],
    x: Elements[BF16],
    shape: GroupedShape,
    limit: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues `grouped_wgmma` on all multiprocessors.

    Parameters:
        D: What becomes of the sums.
        MAX_N: Most tokens of a tile.
        STAGES: Stages of the ring.
        SHARERS: Blocks of a cluster.
        BOX: Tokens that one copy brings.

    Args:
        output: The results, in order of expert.
        offsets: First assignment of every expert, and the end.
        first: Weights `[E * expert_rows, depth]`.
        second: As `first`; the other tensor if `D` takes two.
        x: Tokens `[slot_end - slot_begin, depth]` in order of expert.
        shape: The sizes.
        limit: Bounds an activation.
        ctx: The device.
    """
    comptime Ring = DenseRing[MAX_N, STAGES, SHARERS]
    comptime BYTES = Ring.BYTES + STAGING_BYTES
    var bytes = BYTES + (shape.experts + 1) * size_of[DType.int32]()
    var weight_rows = shape.experts * shape.expert_rows
    var first_tma = create_tma_tile[
        TILE_M // D.TENSORS, TILE_K, swizzle_mode=SWIZZLE
    ](ctx, TileTensor(first, row_major(Coord(weight_rows, shape.depth))))

    def promoted(
        weights: Elements[BF16], out map: type_of(first_tma)
    ) raises {imm}:
        map = first_tma
        map.descriptor = create_tma_descriptor[BF16, 2, SWIZZLE, PROMOTION](
            DeviceBuffer[BF16](ctx, weights, 1, owning=False),
            IndexList[2](weight_rows, shape.depth),
            IndexList[2](shape.depth, 1),
            IndexList[2](TILE_M // D.TENSORS, TILE_K),
        )

    var x_tma = create_tma_tile[BOX, TILE_K, swizzle_mode=SWIZZLE](
        ctx,
        TileTensor(
            x, row_major(Coord(shape.slot_end - shape.slot_begin, shape.depth))
        ),
    )
    comptime W = type_of(first_tma)
    comptime X = type_of(x_tma)
    comptime kernel = grouped_wgmma[
        D,
        MAX_N,
        STAGES,
        SHARERS,
        BOX,
        W.tile_shape,
        W.desc_shape,
        X.tile_shape,
        X.desc_shape,
    ]
    ctx.enqueue_function[kernel](
        output.results(),
        offsets,
        promoted(first),
        promoted(second),
        x_tma,
        Int32(shape.experts),
        Int32(shape.expert_rows),
        Int32(shape.row_begin),
        Int32(shape.features),
        Int32(shape.depth),
        Int32(shape.slot_begin),
        Int32(shape.slot_end),
        limit,
        grid_dim=ctx.default_device_info.sm_count // SHARERS * SHARERS,
        block_dim=THREADS,
        cluster_dim=Dim(SHARERS),
        shared_mem_bytes=bytes,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
            UInt32(bytes)
        ),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
