"""Softmax attention over the paged cache for few new tokens a request, on NVIDIA's tensor cores: from the projections to the
gated results in one launch.

A request's new tokens and the query heads that share a key head are rows of one matrix: a block reads that head's keys
and values once for all of them. Where requests are few, the blocks of a cluster take parts of the keys side by side and
join their results (`attend_join_gpu.mojo`).
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, WARP_SIZE, barrier
from max.gpu import block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext, Dim, FuncAttribute
from max.gpu.host.launch_attribute import (
    LaunchAttribute,
    LaunchAttributeID,
    LaunchAttributeValue,
)
from max.gpu.primitives.cluster import (
    cluster_arrive_relaxed,
    cluster_sync,
    cluster_wait,
)
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .attend_join_gpu import (
    MOST_PARTS,
    ROW_FLOATS,
    join_rows,
    leave_rows,
    own_gate,
)
from .attend_rows_gpu import (
    GROUP_FLOATS,
    RowPair,
    join_groups,
    of_quad,
    row_of,
)
from .few_tokens_gpu import FewTokens, NewKey, store_new_keys
from .key_tiles_gpu import HEAD_DIM, KEYS, KeyRange, KeyTiles

comptime ROWS = 16
"""Rows of a warp: lane `l` has elements of rows `l / 4` and `l / 4 + 8`."""

comptime MAX_ROWS = 128
"""Rows of a block: new tokens times the query heads of a key head."""

comptime MULTIPROCESSOR_SHARED = 228 * 1024
"""The most of a Hopper multiprocessor's memory that can be shared memory; the rest is first-level cache."""

comptime LOG2_E = Float32(1.4426950408889634)


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](
        Int32(ROW_TILES * GROUPS * WARP_SIZE)
    )
)
@__name(t"step3p5_attend_few_{ROW_TILES}_{GROUPS}_{HALF}")
def attend_few_kernel[
    weight_dtype: DType, ROW_TILES: Int, GROUPS: Int, HALF: Int
](few: FewTokens[weight_dtype], parts: Int32):
    """One part of the keys of one request's key head.

    Parameters:
        weight_dtype: Type of the norms' weights.
        ROW_TILES: Tiles of 16 rows, a warp each.
        GROUPS: Warps that share a tile of rows, each with its part of every tile of keys.
        HALF: Column `i` of a head pairs with `i + HALF` in the rotation.
    """
    comptime COUNT = KEYS // GROUPS
    comptime WARPS = ROW_TILES * GROUPS
    comptime THREADS = WARPS * WARP_SIZE
    var queries = few.queries
    var tiles = KeyTiles[THREADS]()
    var which, part = divmod(Int(block_idx.x), Int(parts))
    var request, key_head = divmod(which, queries.key_heads)
    var row_tile = Int(warp_id()) % ROW_TILES
    var group = Int(warp_id()) // ROW_TILES
    var index = row_tile * ROWS + Int(lane_id()) // 4
    var length = few.cached(request)
    var begin = 0
    if queries.window > 0:
        begin = max(length - queries.window + 1, 0)
    var tokens = few.count(request)
    var end = length + tokens
    var keys = KeyRange(queries.cache, request, key_head, begin, end)
    # This part's tiles of keys.
    var first = begin // KEYS
    var each = ceildiv(ceildiv(end, KEYS) - first, Int(parts))
    first += part * each
    var count = max(min(first + each, ceildiv(end, KEYS)) - first, 0)
    # Old keys were there before the preceding kernel. New ones of the first tile go to it directly.
    if count > 0:
        tiles.copy(keys, 0, first * KEYS, length)
    tiles.commit()
    wait_on_dependent_grids()
    launch_dependent_grids()
    var gate = own_gate[WARPS](few, request, key_head, part, Int(parts))
    # The request's new tokens whose keys lie in this part.
    var new = (
        max(first * KEYS - length, 0),
        min((first + count) * KEYS - length, tokens),
    )
    var own_token = new[0] + Int(warp_id())
    var own_row = 0
    if own_token < new[1]:
        own_row = few.first_token(request) + own_token
    var new_key = NewKey[HALF](few, own_row, key_head)
    var rows = RowPair(
        row_of(queries, request, key_head, index),
        row_of(queries, request, key_head, index + 8),
    )
    rows.prepare[HALF](few)
    store_new_keys[WARPS](
        few,
        new_key,
        request,
        key_head,
        new,
        first * KEYS,
        tiles.keys(0),
        tiles.values(0),
    )
    barrier()
    # A warp whose rows all lie behind the last leaves the tensor cores to the others.
    var works = row_tile * ROWS < tokens * (queries.heads // queries.key_heads)
    var scale = queries.scale * LOG2_E
    for tile in range(count):
        tiles.wait()
        barrier()
        # All warps are done with the tile before, whose place the next one takes.
        var next = tile + 1
        if next < count:
            tiles.copy(keys, next, (first + next) * KEYS, end)
        tiles.commit()
        if works:
            rows.attend[COUNT](
                tiles.keys(tile),
                tiles.values(tile),
                group * COUNT,
                (first + tile) * KEYS + group * COUNT,
                scale,
            )
    rows.total = of_quad[largest=False](rows.total)
    barrier()
    join_groups[ROW_TILES, GROUPS](rows, tiles.base, row_tile, group)
    # Behind what the groups hand over.
    var left = tiles.base.unsafe_bitcast[Float32]().unsafe_offset(
        (GROUPS - 1) * ROW_TILES * GROUP_FLOATS
    )
    if group == 0:
        leave_rows(left, row_tile * ROWS, rows)
    if Int(parts) == 1:
        barrier()
        join_rows[1, WARPS](few, left, gate, request, key_head, 0)
        return
    cluster_sync()
    comptime for all in [2, 4, MOST_PARTS]:
        if Int(parts) == all:
            join_rows[all, WARPS](few, left, gate, request, key_head, part)
    # The other blocks may still read this one's rows.
    cluster_arrive_relaxed()
    cluster_wait()


def attend_few[
    weight_dtype: DType, //, HALF: Int
](few: FewTokens[weight_dtype], most_tokens: Int, ctx: DeviceContext) raises:
    """Enqueues the attention of requests with at most `most_tokens` new tokens; see `few_fit`.

    Parameters:
        weight_dtype: Type of the norms' weights.
        HALF: See `attend_few_kernel`.

    Args:
        few: The batch.
        most_tokens: New tokens of the request with the most.
        ctx: The device.
    """
    var queries = few.queries
    var row_tiles = ceildiv(
        most_tokens * (queries.heads // queries.key_heads), ROWS
    )
    var heads = queries.requests * queries.key_heads
    var most_parts = MOST_PARTS
    if queries.window > 0:
        most_parts = min(most_parts, ceildiv(queries.window, KEYS))
    var multiprocessors = ctx.default_device_info.sm_count
    var parts = 1
    while 2 * parts <= most_parts and 2 * parts * heads <= multiprocessors:
        parts *= 2
    var alone = heads * parts <= multiprocessors

    def launch[ROW_TILES: Int, GROUPS: Int]() raises {imm}:
        comptime THREADS = ROW_TILES * GROUPS * WARP_SIZE
        comptime left = (GROUPS - 1) * ROW_TILES * GROUP_FLOATS + (
            ROW_TILES * ROWS * ROW_FLOATS
        )
        comptime bytes = max(KeyTiles[THREADS].BYTES, 4 * left)
        comptime kernel = attend_few_kernel[
            weight_dtype, ROW_TILES, GROUPS, HALF
        ]
        var attributes = pdl_launch_attributes(PDLLevel.ON)
        if alone:
            # By itself the driver seems to leave room for as many blocks as registers allow. The streaming kernels behind
            # this one, whose weights and tokens pass through the first-level cache, then take a tenth longer at batch 8.
            attributes.append(
                LaunchAttribute(
                    LaunchAttributeID.PREFERRED_SHARED_MEMORY_CARVEOUT,
                    LaunchAttributeValue(
                        Dim(ceildiv(100 * bytes, MULTIPROCESSOR_SHARED))
                    ),
                )
            )
        ctx.enqueue_function[kernel](
            few,
            Int32(parts),
            grid_dim=heads * parts,
            block_dim=THREADS,
            cluster_dim=Dim(parts),
            shared_mem_bytes=bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(bytes)
            ),
            attributes=attributes^,
        )

    if row_tiles == 1:
        launch[1, 4]()
    elif row_tiles == 2:
        launch[2, 2]()
    elif row_tiles > 4:
        launch[8, 1]()
    elif alone:
        launch[4, 2]()
    else:
        launch[4, 1]()


def half_fits(half: Int) -> Bool:
    """Whether a lane has both of the columns that are rotated together."""
    return half == 32 or half == 64


def few_fit[
    windowed: Bool
](
    heads: Int,
    key_heads: Int,
    head_dim: Int,
    half: Int,
    page_size: Int,
    requests: Int,
    most_tokens: Int,
    ctx: DeviceContext,
) -> Bool:
    """Whether `attend_few` takes heads, their rotation, pages and a number of tokens a request, and is to take them.

    A single new token of few requests that sees all keys goes to MAX's kernel, of which any number of blocks share them.

    Parameters:
        windowed: Whether a query sees no more than a window.

    Args:
        heads: Query heads.
        key_heads: Key heads.
        head_dim: Elements of a head.
        half: Columns from one that is rotated to its partner.
        page_size: Positions of a page.
        requests: Their number.
        most_tokens: New tokens of the request with the most.
        ctx: The device.
    """
    comptime if not windowed:
        if (
            most_tokens == 1
            and requests * key_heads <= ctx.default_device_info.sm_count
        ):
            return False
    return (
        head_dim == HEAD_DIM
        and half_fits(half)
        and page_size % KEYS == 0
        and most_tokens * (heads // key_heads) <= MAX_ROWS
    )
