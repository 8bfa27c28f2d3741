"""Softmax attention over the paged cache for few new tokens a request, on NVIDIA's tensor cores.

A request's new tokens and the query heads that share a key head are rows of one matrix: a block reads that head's keys
and values once for all of them. Where requests are few, each one's keys are cut into parts that blocks take side by side,
and `attend_merge_gpu.mojo` joins their results.
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, WARP_SIZE, barrier
from max.gpu import block_idx, lane_id, warp_id
from max.gpu.host import DeviceContext, FuncAttribute
from max.gpu.primitives.grid_controls import (
    PDLLevel,
    launch_dependent_grids,
    pdl_launch_attributes,
    wait_on_dependent_grids,
)
from std.math import ceildiv
from std.utils.static_tuple import StaticTuple

from .attend_merge_gpu import Parts, launch_merge
from .attend_rows_gpu import (
    BFloatQueries,
    RowPair,
    join_groups,
    of_quad,
    row_of,
    store_nothing,
    store_rows,
)
from .key_tiles_gpu import HEAD_DIM, KEYS, KeyRange, KeyTiles

comptime ROWS = 16
"""Rows of a warp: lane `l` has elements of rows `l / 4` and `l / 4 + 8`."""

comptime MAX_ROWS = 128
"""Rows of a block: new tokens times the query heads of a key head."""

comptime STAGES = 3
"""Tiles of keys and values in shared memory."""

comptime MOST_PARTS = 32
"""Parts of a request's keys at most: a lane of the merging warp looks at each."""

comptime BLOCKS = 1056
"""Keys are cut into as many parts as make about so many blocks: four times what runs at a time."""

comptime LOG2_E = Float32(1.4426950408889634)


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](
        Int32(ROW_TILES * GROUPS * WARP_SIZE)
    )
)
@__name(t"step3p5_attend_few_{ROW_TILES}_{GROUPS}")
def attend_few_kernel[
    ROW_TILES: Int, GROUPS: Int
](queries: BFloatQueries, parts: Parts):
    """One part of the keys of one request's key head.

    Parameters:
        ROW_TILES: Tiles of 16 rows, a warp each.
        GROUPS: Warps that share a tile of rows, each with its part of every tile of keys.
    """
    comptime COUNT = KEYS // GROUPS
    var tiles = KeyTiles[STAGES, ROW_TILES * GROUPS * WARP_SIZE]()
    var request, key_head = divmod(Int(block_idx.x), queries.key_heads)
    var part = Int(block_idx.y)
    var row_tile = Int(warp_id()) % ROW_TILES
    var group = Int(warp_id()) // ROW_TILES
    var index = row_tile * ROWS + Int(lane_id()) // 4
    wait_on_dependent_grids()
    launch_dependent_grids()
    var low = row_of(queries, request, key_head, index)
    var high = row_of(queries, request, key_head, index + 8)
    var length = Int(queries.cache_lengths[unsafe_offset=request])
    var begin = 0
    if queries.window > 0:
        begin = max(length - queries.window + 1, 0)
    var end = (
        length
        + Int(queries.row_offsets[unsafe_offset=request + 1])
        - Int(queries.row_offsets[unsafe_offset=request])
    )
    var keys = KeyRange(queries.cache, request, key_head, begin, end)
    # This part's tiles of keys.
    var first = begin // KEYS
    var each = ceildiv(ceildiv(end, KEYS) - first, parts.count)
    first += part * each
    var count = max(min(first + each, ceildiv(end, KEYS)) - first, 0)
    if count == 0:
        if group == 0 and parts.count > 1:
            store_nothing(queries, parts, part, low)
            store_nothing(queries, parts, part, high)
        return
    comptime for ahead in range(STAGES - 1):
        if ahead < count:
            tiles.copy(keys, ahead, (first + ahead) * KEYS)
        tiles.commit()
    var rows = RowPair(queries, low, high)
    var scale = queries.scale * LOG2_E
    for tile in range(count):
        tiles.wait()
        barrier()
        # All warps are done with the tile before, whose place the next one takes.
        var next = tile + STAGES - 1
        if next < count:
            tiles.copy(keys, next, (first + next) * KEYS)
        tiles.commit()
        rows.attend[COUNT](
            tiles.keys(tile),
            tiles.values(tile),
            group * COUNT,
            (first + tile) * KEYS + group * COUNT,
            scale,
        )
    rows.total = of_quad[largest=False](rows.total)
    comptime if GROUPS > 1:
        join_groups[ROW_TILES, GROUPS](rows, tiles.base, row_tile, group)
    if group == 0:
        store_rows(queries, parts, part, rows)


def attend_few(
    queries: BFloatQueries, tokens: Int, most_tokens: Int, ctx: DeviceContext
) raises:
    """Enqueues the attention of `tokens` tokens, at most `most_tokens` of a request; see `few_fit`.
    """
    var row_tiles = ceildiv(
        most_tokens * (queries.heads // queries.key_heads), ROWS
    )
    var heads = queries.requests * queries.key_heads
    var count = min(max(BLOCKS // heads, 1), MOST_PARTS)
    if queries.window > 0:
        # No part without keys: of each the first and the last tile are cut.
        count = min(count, ceildiv(queries.window + most_tokens, KEYS))
    var all = tokens * queries.heads
    var room = all * count if count > 1 else 0
    var sums = ctx.enqueue_create_buffer[DType.float32](max(room * HEAD_DIM, 1))
    var softmax = ctx.enqueue_create_buffer[DType.float32](max(room * 2, 1))
    var parts = Parts(
        sums.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        softmax.unsafe_ptr().unsafe_origin_cast[MutUntrackedOrigin](),
        count,
        all,
    )

    def launch[ROW_TILES: Int, GROUPS: Int]() raises {imm}:
        comptime THREADS = ROW_TILES * GROUPS * WARP_SIZE
        comptime bytes = KeyTiles[STAGES, THREADS].BYTES
        ctx.enqueue_function[attend_few_kernel[ROW_TILES, GROUPS]](
            queries,
            parts,
            grid_dim=(heads, count),
            block_dim=THREADS,
            shared_mem_bytes=bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(
                UInt32(bytes)
            ),
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if row_tiles == 1:
        launch[1, 4]()
    elif row_tiles == 2:
        launch[2, 2]()
    elif row_tiles <= 4:
        launch[4, 1]()
    else:
        launch[8, 1]()
    if count > 1:
        launch_merge(queries.result, parts, ctx)
    _ = sums^
    _ = softmax^


def few_fit(
    heads: Int, key_heads: Int, head_dim: Int, page_size: Int, most_tokens: Int
) -> Bool:
    """Whether `attend_few` takes heads, pages and a number of tokens a request.
    """
    return (
        head_dim == HEAD_DIM
        and page_size % KEYS == 0
        and most_tokens * (heads // key_heads) <= MAX_ROWS
    )
